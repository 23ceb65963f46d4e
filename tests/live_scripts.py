"""Live runs of a tiny model under random requests: jobs that are not cancelled end as they would alone, and events repeat the run.

scene = make_scene(root)                               # a model, the data of eight jobs
outcome = play(pool, scene, seed=3, parallel={"pp": 2}, folder=tmp_path)
check(pool, scene, outcome)                            # AssertionError where a job differs from its solo run
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import runs
from safetensors.torch import load_file

STEPS = 6
LATE = ("late-0", "late-1")
Script = dict[int, list[tuple[str, str]]]  # window -> what is asked for before it: verb and name
NAMES = (*(f"job-{k}" for k in range(6)), *LATE)


class Scene(NamedTuple):
    """A model, and the jobs of all scripts by name."""

    root: Path
    model: Path
    jobs: dict[str, dict[str, Any]]
    solo: dict[str, Path]  # runs of single jobs, once they are needed


class Outcome(NamedTuple):
    """A run that was played: its directory, its config, and how often it was started."""

    run: Path
    config: Path
    parallel: dict[str, Any]
    script: Script
    num_starts: int


def make_scene(root: Path) -> Scene:
    """Make a model and jobs of several ranks, some with dropout, some with validation data."""
    jobs = {}
    for k, name in enumerate(NAMES):
        rows = oracle.make_rows(root / f"rows-{k}.jsonl", num_rows=10, seed=20 + k)
        job = {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "r": (4, 8, 24)[k % 3], "lora_alpha": 16}
        job |= {"learning_rate": 1e-3, "global_batch_size": 2, "max_steps": STEPS, "seed": k, "adam_epsilon": 1e-6, "warmup_ratio": 0.0}
        job |= {"lora_dropout": 0.1} if k % 2 else {}
        job |= {"val_set_size": 3, "eval_steps": 2, "keep": "last"} if k % 3 == 0 else {}
        jobs[name] = job
    return Scene(root, oracle.make_model(root / "model"), jobs, {})


def train(config_path: Path, script: Script, jobs: dict[str, dict], stop_after: int | None, replay: str | None) -> None:
    """Run a config on this rank; on the first one, requests are left before the windows that `script` names."""
    from unittest import mock

    from megatron_lora.config.schema import load_config
    from megatron_lora.output.requests import new_request, write_request
    from megatron_lora.training.control import Control

    run, ask = Path(load_config(config_path).output_dir), Control.ask

    def asked(self, window, slot):
        for verb, name in script.get(window, ()):
            if verb == "add":
                write_request(run, new_request("add", jobs=[jobs[name]]))
            elif verb == "set":
                write_request(run, new_request("set", names=[name], values={"priority": 3.0}))
            else:
                write_request(run, new_request(verb, names=[name]))
        return ask(self, window, slot)

    with mock.patch.object(Control, "ask", asked):
        runs.train(config_path, stop_after, replay)


def random_script(seed: int) -> Script:
    """Return what is asked for before which windows."""
    rng, script = random.Random(seed), {}
    late = list(LATE)
    for _ in range(rng.randint(3, 8)):
        verb = rng.choice(["add", "pause", "pause", "resume", "cancel", "set"])
        name = late.pop() if verb == "add" and late else rng.choice(NAMES[:6])
        if verb != "add" or name in LATE:
            script.setdefault(rng.randint(0, 14), []).append((verb, name))
    return script


def play(pool, scene: Scene, seed: int, parallel: dict, folder: Path, *, stop: bool = False) -> Outcome:
    """Train six jobs, two or three of them at a time, under a random script; with `stop` they are stopped after a while and resumed.

    What is left paused is resumed, until all jobs are over.
    """
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.requests import new_request, write_request
    from megatron_lora.output.run_directory import RunDirectory, job_states

    rng = random.Random(1000 + seed)
    config = _config(scene, rng, parallel, folder)
    script, num_starts, status = random_script(seed), 0, 75
    jobs = {name: _complete(scene.jobs[name]) for name in LATE}
    while status == 75:
        assert num_starts < 12, "the run does not end"
        stop_after = rng.randint(2, 12) if stop and num_starts < 2 else None
        with RunDirectory.create(load_config(config)) as directory:
            pool(**parallel).run(train, config, script if num_starts == 0 else {}, jobs, stop_after, None)
            states = job_states(directory.path)
            status = 75 if set(states.values()) - {"done", "cancelled", "stopped", "failed"} else 0
            directory.finish(status)
        num_starts += 1
        paused = [name for name, state in states.items() if state == "paused"]
        on_request = [name for name in paused if _asked_last(folder / "run", name) == "paused"]
        if on_request:
            write_request(folder / "run", new_request("resume", names=on_request))
    return Outcome(folder / "run", config, parallel, script, num_starts)


def play_and_kill(scene: Scene, seed: int, parallel: dict, folder: Path) -> Outcome:
    """Train as `play` does with megatron-lora itself, whose processes are killed twice at random times, between and inside requests."""
    from megatron_lora.output.requests import new_request, write_request
    from megatron_lora.output.run_directory import job_states

    rng = random.Random(2000 + seed)
    config, script, jobs = _config(scene, rng, parallel, folder), random_script(seed), {name: _complete(scene.jobs[name]) for name in LATE}
    asked = [request for window in sorted(script) for request in script[window]]
    environment = os.environ | {"MEGATRON_LORA_CACHE": str(scene.root / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    status, num_starts, run = 75, 0, folder / "run"
    while status not in (0, 3):
        assert num_starts < 12, "the run does not end"
        process = subprocess.Popen([sys.executable, "-m", "megatron_lora", "train", str(config)], env=environment, start_new_session=True)
        while not (run / "status.json").exists() and process.poll() is None:
            time.sleep(0.05)
        killed_at = time.monotonic() + rng.uniform(8, 25) if num_starts < 2 else math.inf
        while process.poll() is None:
            if asked and rng.random() < 0.1 and (run / "queue.json").exists():
                verb, name = asked.pop(0)
                keys = {"jobs": [jobs[name]]} if verb == "add" else {"names": [name]}
                write_request(run, new_request(verb, **keys, values={"priority": 3.0} if verb == "set" else None))
            if time.monotonic() > killed_at:
                _kill(process.pid)
            time.sleep(0.05)
        status, num_starts = process.returncode, num_starts + 1
        states = job_states(run)
        assert status in (0, 75, -9), (status, states)
        paused = [name for name, state in states.items() if state == "paused" and _asked_last(run, name) == "paused"]
        if status == 75 and paused:
            write_request(run, new_request("resume", names=paused))
    return Outcome(run, config, parallel, script, num_starts)


def _kill(parent: int) -> None:
    """Kill a process and all that descend from it, at once."""
    import psutil

    processes = [*psutil.Process(parent).children(recursive=True), psutil.Process(parent)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def check(pool, scene: Scene, outcome: Outcome) -> Counter[str]:
    """Compare each job with its solo run, within promise 1's bounds; return how many jobs ended in each state."""
    from megatron_lora.output.run_directory import job_states

    states = job_states(outcome.run)
    for name, state in states.items():
        assert state in ("done", "cancelled"), states
        if state == "cancelled":
            continue
        solo = _solo(pool, scene, name)
        mine, theirs = runs.lines_of(outcome.run, name), runs.lines_of(solo, name)
        assert [line["step"] for line in mine] == [line["step"] for line in theirs], name
        for one, other in zip(mine, theirs, strict=True):
            for key in ("loss", "eval_loss"):
                if key in one:
                    assert abs(one[key] - other[key]) <= 1e-5 * abs(other[key]), (name, one, other)
        adapters = [load_file(run / "jobs" / name / "adapter_model.safetensors") for run in (outcome.run, solo)]
        for kind in ("lora_A", "lora_B"):
            assert oracle.distance(*adapters, kind) < 1e-4, (name, kind)
    return Counter(states.values())


def repeat(pool, scene: Scene, outcome: Outcome, folder: Path) -> None:
    """Run again from the events alone, and compare what jobs wrote that are done bit for bit; for a run that was started once."""
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.run_directory import RunDirectory, job_states

    assert outcome.num_starts == 1
    keys = json.loads(outcome.config.read_text()) | {"output_dir": str(folder / "again")}
    config = folder / "again.yaml"
    config.write_text(json.dumps(keys))
    with RunDirectory.create(load_config(config)) as directory:
        pool(**outcome.parallel).run(train, config, {}, {}, None, str(outcome.run))
        assert job_states(directory.path) == job_states(outcome.run)
        directory.finish(0)
    for name in [name for name, state in job_states(outcome.run).items() if state == "done"]:
        mine, theirs = runs.lines_of(folder / "again", name), runs.lines_of(outcome.run, name)
        for line in (*mine, *theirs):
            del line["seconds"]
        assert mine == theirs, name
        files = [(run / "jobs" / name / "adapter_model.safetensors").read_bytes() for run in (folder / "again", outcome.run)]
        assert files[0] == files[1], name


def _config(scene: Scene, rng: random.Random, parallel: dict, folder: Path) -> Path:
    """Write a config of six jobs, with room for two to four of them."""
    config = runs.write_config(folder / "config.yaml", scene.model, folder / "run", [scene.jobs[n] for n in NAMES[:6]], parallel, 96)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"adapter_memory": rng.uniform(0.003, 0.006), "window_s": 1e-3}))
    return config


def _complete(job: dict) -> dict:
    from megatron_lora.config.schema import load_jobs
    from megatron_lora.output.changes import job_mapping

    return job_mapping(load_jobs(None, [job], 0)[0])


def _asked_last(run: Path, name: str) -> str | None:
    from megatron_lora.output.events import read_events

    asked = [event.event for event in read_events(run) if event.id is not None and event.job == name and event.event != "set"]
    return asked[-1] if asked else None


def _solo(pool, scene: Scene, name: str) -> Path:
    if name not in scene.solo:
        folder = scene.root / f"solo-{name}"
        config = runs.write_config(scene.root / f"solo-{name}.yaml", scene.model, folder, [scene.jobs[name]], {}, 96)
        assert runs.start(pool, config, {}) == 0
        scene.solo[name] = folder
    return scene.solo[name]
