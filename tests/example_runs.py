"""Directories as runs leave them, made up and quick: any number of jobs, with evaluations, events, a queue, windows and a timeline.

run = make_run(folder, num_jobs=6)                      # ended; job i is called by NAMES, or job-00i
run = make_run(folder, num_jobs=6, live=True)           # as in the middle of training
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

NAMES = ("summaries", "names", "dates", "support-de", "sql", "titles")
SLOTS, STAGES = 32, 4
CONFIG = """base_model: models/SmolLM2-135M-Instruct
output_dir: runs/example
precision: bf16
parallel:
  pipeline: 4
  tensor: 1
  data: 1
microbatch_tokens: 4096
jobs:
"""
JOB = """- name: {name}
  datasets:
  - path: data/{name}.jsonl
    type: messages
    name: null
  r: {r}
  learning_rate: {rate}
  global_batch_size: 8
  num_epochs: 3
  max_steps: {steps}
  priority: 1.0
  metric: eval_loss
  mode: null
"""


def name_of(number: int) -> str:
    """Return the name of a job."""
    return NAMES[number] if number < len(NAMES) else f"job-{number:03d}"


def make_run(folder: Path, num_jobs: int = 6, steps: int = 120, live: bool = False, evaluation: bool = True, seed: int = 0) -> Path:
    """Write a run's directory; the third job failed, the fourth was stopped early, and later thirds of a live run's jobs are queued."""
    draw = random.Random(seed)
    (folder / "plan").mkdir(parents=True)
    names = [name_of(number) for number in range(num_jobs)]
    rates = {name: draw.choice((1e-4, 2e-4, 5e-4)) for name in names}
    jobs = (JOB.format(name=name, r=draw.choice((8, 16, 32)), rate=rates[name], steps=steps) for name in names)
    (folder / "config.yaml").write_text(CONFIG + "".join(jobs))
    (folder / "env.json").write_text(json.dumps({"commit": "4e04e2059de6", "devices": ["NVIDIA H200"] * 4, "host": "gpu-1"}))
    (folder / "cost.json").write_text(json.dumps({"jobs": names}))
    status, events, accounting = {}, [], {}
    queued = set(names[max(4, num_jobs * 2 // 3) :]) if live else set()
    for number, name in enumerate(names):
        status[name] = _job_of(folder, number, name, steps, live, evaluation, name in queued, draw)
        events += _events_of(number, name, status[name])
        taken = status[name]["step"]
        if taken:
            used = {"tokens": taken * 9000, "slots": taken * 3, "device_seconds": taken * draw.uniform(0.9, 1.4), "padding": taken * 40}
            accounting[name] = used
    events.sort(key=lambda event: event["time"])
    lines = (json.dumps({"seq": seq} | event) + "\n" for seq, event in enumerate(events))
    (folder / "events.jsonl").write_text("".join(lines))
    waiting = [
        {"job": name, "since": events[0]["time"], "place": at, "reason": "waits for rows"} for at, name in enumerate(sorted(queued), 1)
    ]
    resident = [name for name in names if status[name]["state"] == "running"]
    (folder / "queue.json").write_text(json.dumps({"resident": resident, "queue": waiting}))
    (folder / "accounting.json").write_text(json.dumps({"jobs": accounting, "windows": 3}))
    ending = None if live else 3 if num_jobs > 2 else 0
    (folder / "status.json").write_text(json.dumps({"exit_status": ending, "reason": "", "jobs": status}))
    windows = _windows(names, draw)
    for number, window in enumerate(windows):
        (folder / "plan" / f"window-{number:04d}.json").write_text(json.dumps(window))
    if not live:
        (folder / "timeline.json").write_text(json.dumps({"traceEvents": _spans(windows, draw)}))
    return folder


def _job_of(folder: Path, number: int, name: str, steps: int, live: bool, evaluation: bool, queued: bool, draw: random.Random) -> dict:
    """Write a job's metrics; return what status.json says of it."""
    end = {2: steps // 4, 3: steps // 2}.get(number, steps)
    taken = 0 if queued else min(end, steps * (2 + number % 3) // 5 if live else end)
    state = "queued" if queued else "done" if taken == steps else "running"
    reason = ""
    if number == 2 and taken == end:
        state, reason = "failed", "the gradient norm was not finite in 3 steps in a row, the last of them step 30 <script>alert(1)</script>"
    if number == 3 and taken == end:
        state, reason = "stopped", f"eval_loss did not improve in 3 evaluations; its best is that of step {steps // 4}"
    metrics = folder / "jobs" / name / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    lines, best, start, floor = [], None, draw.uniform(1.6, 3.4), draw.uniform(0.6, 1.3)
    for step in range(1, taken + 1):
        fall = floor + (start - floor) * math.exp(-4 * step / steps)
        loss = None if state == "failed" and step > end - 3 else fall * draw.uniform(0.9, 1.1)
        row = {"step": step, "epoch": 3 * step / steps, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.2, "tokens": 9000}
        lines.append(row | {"target_tokens": 4000, "samples": 8, "seconds": 2.5, "skipped": loss is None})
        if evaluation and (step % max(1, steps // 12) == 0 or step == taken):
            later = max(0, step - steps // 4) / steps if number in (3, 5) else 0.0
            value = fall * 1.06 + later
            best = min(best or (value, step), (value, step))
            found = {"eval_loss": value, "eval_perplexity": math.exp(value), "eval_accuracy": 1 / (1 + value)}
            lines.append({"step": step} | found | {"eval_tokens": 40000, "eval_samples": 64, "seconds": 1.5})
    if lines:
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded = {"state": state, "reason": reason, "step": taken}
    return recorded | ({"best": {"step": best[1], "eval_loss": best[0]}} if best else {})


def _events_of(number: int, name: str, recorded: dict) -> list[dict]:
    """Return a job's events."""

    def event(kind: str, minute: int, **more) -> dict:
        when = f"2026-11-29T{10 + minute // 60:02d}:{minute % 60:02d}:{number % 60:02d}Z"
        return {"time": when, "start": 1, "window": minute // 20, "slot": minute * 2, "id": None, "event": kind, "job": name, **more}

    events = [event("added", 3 * (number % 5))] if number > 3 else []
    if recorded["step"]:
        events.append(event("started", 3 * (number % 5) + 1))
    if recorded["state"] in ("done", "failed", "stopped"):
        events.append(event(recorded["state"], 30 + number % 25, step=recorded["step"], reason=recorded["reason"]))
    return events


def _windows(names: list[str], draw: random.Random) -> list[dict]:
    """Return three windows; in the second the last of up to six jobs joins, two jobs are evaluated, and one leaves."""
    numbers = range(min(6, len(names)))
    steps = dict.fromkeys(numbers, 0)
    windows = []
    for at in range(3):
        joined = (
            [names[number] for number in numbers[:-1]]
            if at == 0
            else names[numbers[-1] : numbers[-1] + 1]
            if at == len(numbers[1:2])
            else []
        )
        window = {"microbatches": [], "evaluate": [], "joined": joined, "left": names[2:3] if at == 1 else []}
        there = [n for n in numbers if (n != numbers[-1] or at > 0 or len(numbers) == 1) and not (n == 2 and at == 2)]
        for slot in range(SLOTS):
            if at == 1 and slot in (9, 10, 21):
                window["evaluate"].append(slot)
                window["microbatches"].append([[n, steps[n], i, draw.randint(300, 700)] for n in there[:2] for i in range(3)])
                continue
            who = [there[slot % len(there)], there[(slot + 1 + slot // 5) % len(there)]]
            late = [n for n in who if n != numbers[-1] or at != 1 or slot > 6 or len(numbers) == 1]
            entries = [[n, steps[n], i, draw.randint(200, 900)] for n in sorted(set(late)) for i in range(2)]
            window["microbatches"].append([] if slot % 13 == 12 else entries)
            steps[who[0]] += slot % 5 == 0
        windows.append(window | {"jobs": {number: names[number] for number in numbers}})
    return windows


def _spans(windows: list[dict], draw: random.Random) -> list[dict]:
    """Return what the stages did, in Chrome's trace format: 1F1B, and forwards alone of slots that evaluate."""
    slots = [slot for window in windows for slot in window["microbatches"]]
    evaluate = {at * SLOTS + slot for at, window in enumerate(windows) for slot in window["evaluate"]}
    trained = [slot for slot in range(len(slots)) if slot not in evaluate]
    ends: dict[tuple[str, int, int], float] = {}
    free, events = [0.0] * STAGES, []

    def run(kind: str, slot: int, stage: int, after: float) -> None:
        seconds = sum(entry[3] for entry in slots[slot]) * (2e-5 if kind != "B" else 4e-5) * draw.uniform(0.95, 1.05)
        start = max(free[stage], after)
        free[stage] = ends[kind, slot, stage] = start + seconds
        if seconds:
            where = {"ts": start * 1e6, "dur": seconds * 1e6, "pid": stage, "tid": stage}
            events.append({"ph": "X", "name": f"{kind} {slot}", "cat": kind} | where)

    for tick in range(len(slots) + 2 * STAGES):
        for stage in range(STAGES):
            if 0 <= (slot := tick - stage) < len(slots):
                kind = "EVAL" if slot in evaluate else "F"
                run(kind, slot, stage, ends.get((kind, slot, stage - 1), 0.0))
        for stage in reversed(range(STAGES)):
            at = tick - (2 * (STAGES - 1) - stage)
            if 0 <= at < len(slots) and at in trained:
                run("B", at, stage, ends.get(("B", at, stage + 1), 0.0))
    return events
