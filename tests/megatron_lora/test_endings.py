"""Real runs of two ranks that end half-way: a killed, a stopped, a failing rank. Every process ends, and one line says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest

ROOT = Path(__file__).resolve().parents[2]
FAIL_IN_BACKWARD = """
import os
if os.environ.get("RANK") == "1":
    from megatron_lora import executor

    def fails(self, slot, before=executor.Executor._backward):
        if slot == 7:
            raise RuntimeError("matrix is torn")
        before(self, slot)

    executor.Executor._backward = fails
"""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    oracle.make_model(root / "model")
    oracle.make_rows(root / "rows.jsonl", num_rows=12, seed=0)
    return root


class Run:
    """A run of thousands of steps, in a process group of its own; `ranks` are its processes."""

    def __init__(self, materials: Path, folder: Path, parallel: dict, **environment: str):
        rows = [{"path": str(materials / "rows.jsonl"), "type": "prompt_completion"}]
        job = {"name": "a", "datasets": rows, "max_steps": 5000, "global_batch_size": 4}
        config = {"base_model": str(materials / "model"), "output_dir": str(folder / "run"), "microbatch_tokens": 64}
        (folder / "config.yaml").write_text(json.dumps(config | {"parallel": parallel, "jobs": [job]}))
        paths = os.pathsep.join([str(folder), str(ROOT)])
        here = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "MEGATRON_LORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = [sys.executable, "-m", "megatron_lora", "train", str(folder / "config.yaml")]
        self.mark, self.folder = f"MARK={folder}", folder
        self.errors = open(folder / "err", "w")  # noqa: SIM115
        environment |= here | {"MARK": str(folder)}
        self.process = subprocess.Popen(
            command, env=inherited | environment, stdout=subprocess.DEVNULL, stderr=self.errors, start_new_session=True
        )

    def processes(self) -> dict[int, dict[str, str]]:
        """Return all that this run has started and that still runs: process id -> its environment."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_text().split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark in words and state != "Z":
                found[int(entry.name)] = dict(word.partition("=")[::2] for word in words) | {"": (entry / "cmdline").read_text()}
        return found

    def rank(self, number: int) -> int:
        """Return a rank's process id."""
        processes = self.processes().items()
        return next(pid for pid, env in processes if env.get("RANK") == str(number) and "serve" not in env[""])

    def train(self) -> None:
        """Wait until it has taken some steps."""
        metrics = self.folder / "run" / "jobs" / "a" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "err").read_text()
            time.sleep(0.05)

    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for all of it to end; return status and standard error."""
        status = self.process.wait(timeout=seconds)
        end = time.monotonic() + 5
        while self.processes():
            assert time.monotonic() < end, self.processes()
            time.sleep(0.05)
        return status, (self.folder / "err").read_text()

    def close(self) -> None:
        """End what a failed test has left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


@pytest.fixture
def start(materials, tmp_path):
    """Return a function that starts a run of a layout; what is left of it ends with the test."""
    runs = []

    def begin(parallel: dict, **environment: str) -> Run:
        runs.append(Run(materials, tmp_path, parallel, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize(("parallel", "victim"), [({"pipeline": 2}, 0), ({"tensor": 2}, 1)])
def test_a_killed_rank_ends_the_run_within_seconds_and_with_one_line(parallel, victim, start):
    run = start(parallel)
    run.train()
    os.kill(run.rank(victim), signal.SIGKILL)
    status, error = run.end(20)
    assert (
        status == 1
        and error == f"megatron-lora: rank {victim} was ended by SIGKILL, which mostly means that the machine ran out of memory\n"
    )
    recorded = json.loads((run.folder / "run" / "status.json").read_text())
    assert recorded["jobs"]["a"]["state"] == "failed" and recorded["reason"] in error


def test_a_rank_that_stands_still_ends_the_run_once_another_has_lost_patience(start):
    run = start({"pipeline": 2}, MEGATRON_LORA_TIMEOUT_S="3")
    run.train()
    os.kill(run.rank(0), signal.SIGSTOP)
    status, error = run.end(60)  # torchrun gives the stopped rank half a minute to end
    assert status == 1 and error.count("\n") == 1 and error.startswith("megatron-lora: rank 0 stood still: rank 1 waited for it in vain")


def test_a_failing_rank_ends_the_run_with_its_own_words(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAIL_IN_BACKWARD)
    status, error = start({"pipeline": 2}).end(60)
    assert status == 1 and error.count("Traceback") == 1
    assert error.endswith("megatron-lora: rank 1: RuntimeError: matrix is torn\n")
