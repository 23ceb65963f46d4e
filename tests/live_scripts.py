"""Live runs of a tiny model under random requests: jobs that are not cancelled end as they would alone, and events repeat the run.

scene = make_scene(root)                               # a model, the data of eight jobs
outcome = play(pool, scene, seed=3, parallel={"pp": 2}, folder=tmp_path, end="stop")
check(pool, scene, outcome)                            # AssertionError where a job differs from its solo run
repeat(pool, scene, outcome, tmp_path)                 # ... where the first start, repeated from its events, gives other bits
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import leftovers
import oracle
import runs
from killed import changes_file
from rank_pool import RankError
from safetensors.torch import load_file

STEPS = 6
ENDS = ("none", "stop", "kill", "mixed")
NUM_ENDS = 2  # starts that are stopped, or killed, unless another number is asked for
LATE = ("late-0", "late-1")
NAMES = (*(f"job-{k}" for k in range(6)), *LATE)
VALUES = ({"priority": 3.0}, {"save_steps": 2}, {"save_total_limit": 1}, {"priority": 0.5, "save_steps": 3})
Script = dict[int, list[tuple[str, Any]]]  # window -> what is asked for before it: verb, and the keys of the request
Lines = dict[str, list[dict]]


class Scene(NamedTuple):
    """A model, and the jobs of all scripts by name."""

    root: Path
    model: Path
    jobs: dict[str, dict[str, Any]]
    solo: dict[str, Path]  # runs of single jobs, once they are needed


class Outcome(NamedTuple):
    """A run that was played: its directory and config, what its first start had written, and what happened."""

    run: Path
    config: Path
    parallel: dict[str, Any]
    first: Lines  # the metrics of each job that had any
    counts: Counter[str]


class Kill(NamedTuple):
    """Where a rank kills itself: at a forward, or at a change of the run's files."""

    rank: int
    what: str  # forward | file | time
    number: int  # of forwards, of changes, of milliseconds
    marker: Path


def make_scene(root: Path) -> Scene:
    """Make a model and jobs of several ranks: some with dropout, some with validation data, one of which stops early."""
    jobs = {}
    for k, name in enumerate(NAMES):
        rows = oracle.make_rows(root / f"rows-{k}.jsonl", num_rows=12, seed=20 + k)
        job = {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "r": (4, 24, 40)[k % 3], "lora_alpha": 16}
        job |= {"learning_rate": 1e-3, "global_batch_size": 2, "max_steps": STEPS, "seed": k, "adam_epsilon": 1e-6, "warmup_ratio": 0.0}
        job |= {"lora_dropout": 0.1} if k % 2 else {}
        job |= {"val_set_size": 5, "eval_steps": 1 + k // 3, "keep": "last"} if k % 3 == 0 else {}
        job |= {"save_steps": 2} if k % 3 == 1 else {}
        jobs[name] = job
    jobs["job-3"] |= {"early_stopping_patience": 1, "early_stopping_threshold": 1.0}
    return Scene(root, oracle.make_model(root / "model"), jobs, {})


class InlineReader:
    """Reads jobs where it is asked to, in place of a process of its own, whose start takes longer than a short run."""

    def __init__(self, check: Callable[[Any], str | None]):
        self.check, self.found, self.asked = check, {}, set()

    def start(self) -> None:
        pass

    def ask(self, job) -> None:
        self.found[job.name] = self.check(job)

    def answers(self) -> dict[str, str | None]:
        found, self.found = self.found, {}
        return found

    def close(self) -> None:
        pass


def train(config_path: Path, script: Script, stop_after: int | None, kill: Kill | None, replay: str | None, reader: str) -> None:
    """Run a config on this rank; on the first one, requests are left before the windows that `script` names.

    Jobs that are paused when nothing else is left are resumed. `reader`: process | inline.
    """
    import torch.distributed as dist

    from megatron_lora.config.schema import load_config
    from megatron_lora.output.requests import new_request, write_request
    from megatron_lora.training.control import Control
    from megatron_lora.training.executor import Executor
    from megatron_lora.training.job_reader import JobReader

    run, ask, begin, left, asking = Path(load_config(config_path).output_dir), Control.ask, Executor._begin, 0, False
    os.environ[leftovers.MARK] = str(run)

    def end() -> None:
        kill.marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def count(*_) -> None:
        nonlocal left
        left -= not asking
        if left < 0:
            end()

    def asked(self, window, slot):
        nonlocal asking
        asking = True  # a user's process does it
        for verb, keys in script.get(window, ()):
            write_request(run, new_request(verb, **keys))
        names = [] if replay is not None else list(self.entries)
        if names and all(entry.state == "paused" and not entry.resident for entry in self.entries.values()):
            write_request(run, new_request("resume", names=names))
        asking = False
        return ask(self, window, slot)

    def begun(self, slot):
        count()
        return begin(self, slot)

    readers = {"process": JobReader, "inline": InlineReader}
    with mock.patch.object(Control, "ask", asked), mock.patch("megatron_lora.training.train.JobReader", readers[reader]):
        if kill is None or kill.rank != dist.get_rank():
            runs.train(config_path, stop_after, replay)
            return
        left = kill.number if kill.what != "time" else math.inf
        timer = threading.Timer(kill.number / 1e3, end)
        if kill.what == "time":
            timer.start()
        elif kill.what == "file":
            sys.addaudithook(lambda event, words: count() if changes_file(event, words, str(run)) else None)
        try:
            with mock.patch.object(Executor, "_begin", begun if kill.what == "forward" else begin):
                runs.train(config_path, stop_after, replay)
        finally:
            left = math.inf  # what was not reached is not meant for the next start: hooks stay
            timer.cancel()
            if kill.what == "time":
                timer.join()


def random_script(rng: random.Random, scene: Scene, start: int) -> Script:
    """Return what is asked for before which windows of a start; jobs are added in the first two, mostly, and cancelled there alone."""
    script: Script = {}
    late = LATE[start % len(LATE)]
    for _ in range(rng.randint(3, 8)):
        verb = rng.choice(["add", "pause", "pause", "resume", "cancel", "set"] if start < len(LATE) else ["pause", "resume", "set"])
        if verb == "add":
            keys: dict[str, Any] = {"jobs": [_complete(scene.jobs[late])]}  # refused the second time
        else:
            keys = {"names": [rng.choice(NAMES[:6])], "values": rng.choice(VALUES) if verb == "set" else None}
        script.setdefault(rng.randint(0, 20), []).append((verb, keys))
    return script


def play(pool, scene: Scene, seed: int, parallel: dict, folder: Path, end: str = "none", num_ends: int = NUM_ENDS) -> Outcome:
    """Train six jobs, two to four of them at a time, under a random script.

    By `end` the first `num_ends` starts end early: they are stopped, or killed, or either. After each end and each start the directory
    holds what it may, and no process is left.
    """
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.events import read_events
    from megatron_lora.output.job_states import exit_status
    from megatron_lora.output.run_directory import RunDirectory, job_states
    from megatron_lora.output.standing import resume_points

    rng = random.Random(f"{seed} {end}")
    config, run = _config(scene, rng, parallel, folder), folder / "run"
    counts: Counter[str] = Counter()
    first: Lines = {}
    status = 75
    while status == 75:
        start = counts["starts"]
        assert start <= num_ends, f"the run does not end: {job_states(run)}"
        is_last = start == num_ends
        script = random_script(rng, scene, start) if start < max(num_ends, len(LATE)) and not (is_last and num_ends) else {}
        ends_early = "none" if is_last else rng.choice(["stop", "kill", "kill"]) if end == "mixed" else end
        stop_after = rng.randint(2, 14) if ends_early == "stop" else None
        kill = random_kill(rng, parallel, folder / f"killed-{start}") if ends_early == "kill" else None
        with RunDirectory.create(load_config(config)) as directory:
            leftovers.check(run)
            try:
                pool(**parallel).run(train, config, script, stop_after, kill, None, "inline" if start else "process")
            except RankError:
                if kill is None or not kill.marker.exists():
                    raise
                counts["kills"] += 1
            status = exit_status(job_states(run).values())
            was_killed = kill is not None and kill.marker.exists()
            if not was_killed:
                directory.finish(status)
        leftovers.check(run, was_killed=was_killed, has_ended=True)
        if start == 0:
            first = {path.parent.name: _whole_lines(path) for path in run.glob("jobs/*/metrics.jsonl")}
        counts["starts"] += 1
        counts["requests"] += sum(map(len, script.values()))
        if status == 75:
            counts["stops"] += ends_early == "stop"
            points = resume_points(load_config(run / "config.yaml"), job_states(run)).values()
            counts["evaluations due"] += sum(point.state is not None and point.evaluation_due for point in points)
    counts["refused"] += len(list(run.glob("requests/refused/*Z-*.json")))
    counts["parked"] += sum(event.event == "parked" for event in read_events(run))
    return Outcome(run, config, parallel, first, counts)


def random_kill(rng: random.Random, parallel: dict, marker: Path) -> Kill:
    """Return a kill that is early rather than late, so that the next start has something left to do."""
    what, most = rng.choice([("forward", 40), ("file", 300), ("time", 4000)])
    rank = 0 if what == "file" or not parallel else rng.randrange(2)
    return Kill(rank, what, int(most ** rng.random()), marker)


def _whole_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def check(pool, scene: Scene, outcome: Outcome) -> Counter[str]:
    """Compare each job with its solo run, within promise 1's bounds; return how many jobs ended in each state."""
    from megatron_lora.output.run_directory import job_states

    states = job_states(outcome.run)
    for name, state in states.items():
        if state == "cancelled":
            continue
        solo = _solo(pool, scene, name)
        assert state == job_states(solo)[name], (name, states)
        mine, theirs = runs.lines_of(outcome.run, name), runs.lines_of(solo, name)
        assert [(line["step"], line.keys()) for line in mine] == [(line["step"], line.keys()) for line in theirs], name
        for one, other in zip(mine, theirs, strict=True):
            for key in one.keys() & {"loss", "eval_loss"}:
                assert abs(one[key] - other[key]) <= 1e-5 * abs(other[key]), (name, one, other)
        adapters = [load_file(run / "jobs" / name / "adapter_model.safetensors") for run in (outcome.run, solo)]
        for kind in ("lora_A", "lora_B"):
            assert oracle.distance(*adapters, kind) < 1e-4, (name, kind)
    return Counter(states.values())


def repeat(pool, outcome: Outcome, folder: Path) -> None:
    """Run the first start again from its events alone: it writes the same bits, and continues where the first one was stopped or killed."""
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.run_directory import RunDirectory, job_states

    config, again = folder / "again.yaml", folder / "again"
    config.write_text(json.dumps(json.loads(outcome.config.read_text()) | {"output_dir": str(again)}))
    with RunDirectory.create(load_config(config)) as directory:
        pool(**outcome.parallel).run(train, config, {}, None, None, str(outcome.run), "inline")
        directory.finish(0)
    for name, lines in outcome.first.items():
        if not lines:  # it was killed before the job's first step was reported
            continue
        repeated = runs.lines_of(again, name)[: len(lines)]
        assert [line | {"seconds": 0} for line in repeated] == [line | {"seconds": 0} for line in lines], name
    if outcome.counts["starts"] == 1:
        assert job_states(again) == job_states(outcome.run)
        for name in [name for name, state in job_states(again).items() if state in ("done", "stopped")]:
            files = [(run / "jobs" / name / "adapter_model.safetensors").read_bytes() for run in (again, outcome.run)]
            assert files[0] == files[1], name


def _config(scene: Scene, rng: random.Random, parallel: dict, folder: Path) -> Path:
    """Write a config of six jobs, with room for the two to four largest."""
    from megatron_lora.config.schema import load_config
    from megatron_lora.huggingface.weight_files import read_base_model
    from megatron_lora.planning.adapter_memory import adapters_of, bytes_of, in_gb, rows_of
    from megatron_lora.planning.predict import rank_row_bytes_of
    from megatron_lora.planning.targets import jobs_of

    path = runs.write_config(folder / "config.yaml", scene.model, folder / "run", [scene.jobs[n] for n in NAMES[:6]], parallel, 96)
    keys = json.loads(path.read_text()) | {"window_s": 1e-3, "max_wait_s": rng.choice([None, 0.3])}
    keys["parallel"]["layers_per_stage"] = [4 // parallel.get("pp", 1)] * parallel.get("pp", 1)
    path.write_text(json.dumps(keys))
    config, architecture = load_config(path), read_base_model(scene.model)
    rows = rows_of(adapters_of(jobs_of(config, architecture)), rng.randint(2, 4))
    room = in_gb(bytes_of(rows, rank_row_bytes_of(config, architecture, 4)))
    path.write_text(json.dumps(keys | {"adapter_memory": room}))
    return path


def _complete(job: dict) -> dict:
    from megatron_lora.config.schema import load_jobs
    from megatron_lora.output.changes import job_mapping

    return job_mapping(load_jobs(None, [job], 0)[0])


def _solo(pool, scene: Scene, name: str) -> Path:
    if name not in scene.solo:
        folder = scene.root / f"solo-{name}"
        config = runs.write_config(scene.root / f"solo-{name}.yaml", scene.model, folder, [scene.jobs[name]], {}, 96)
        assert runs.start(pool, config, {}) == 0
        scene.solo[name] = folder
    return scene.solo[name]
