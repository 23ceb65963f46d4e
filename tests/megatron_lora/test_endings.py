"""Real runs of two ranks that end half-way: a killed, a stopped, a failing rank. Every process ends, and one line says why."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import living_run
import oracle
import pytest


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    oracle.make_model(root / "model")
    oracle.make_rows(root / "rows.jsonl", num_rows=12, seed=0)
    return root


@pytest.fixture
def start(materials, tmp_path):
    """Return a function that starts a run of a layout; what is left of it ends with the test."""
    runs = []

    def begin(parallel: dict, failing: bool = False, **environment: str) -> living_run.LivingRun:
        rows = [{"path": str(materials / "rows.jsonl"), "type": "prompt_completion"}]
        job = {"name": "a", "datasets": rows, "max_steps": 5000, "global_batch_size": 4}
        config = {"base_model": str(materials / "model"), "microbatch_tokens": 64, "parallel": parallel, "jobs": [job]}
        here = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        runs.append(living_run.LivingRun(tmp_path, config, here | environment, failing=failing))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize(("parallel", "victim"), [({"pipeline": 2}, 0), ({"tensor": 2}, 1), ({"data": 2}, 1)])
def test_a_killed_rank_ends_the_run_within_seconds_and_with_one_line(parallel, victim, start):
    run = start(parallel)
    run.train()
    os.kill(run.rank(victim), signal.SIGKILL)
    status, error = run.end(20)
    assert status == 1 and error == living_run.KILLED.format(victim)
    recorded = json.loads((run.output / "status.json").read_text())
    assert recorded["jobs"]["a"]["state"] == "failed" and recorded["reason"] in error


def test_a_rank_that_stands_still_ends_the_run_once_another_has_lost_patience(start):
    run = start({"pipeline": 2}, MEGATRON_LORA_TIMEOUT_S="3")
    run.train()
    os.kill(run.rank(0), signal.SIGSTOP)
    status, error = run.end(60)  # torchrun gives the stopped rank half a minute to end
    assert status == 1 and error.count("\n") == 1 and error.startswith(living_run.STOOD_STILL.format(0) + "1 waited for it in vain")


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "sequence": True}, {"data": 2}])
def test_a_failing_rank_ends_the_run_with_its_own_words(parallel, start):
    status, error = start(parallel, failing=True).end(60)
    assert status == 1 and error.count("Traceback") == 1 and error.endswith(living_run.FAILED)
