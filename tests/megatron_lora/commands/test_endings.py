"""Real runs of two ranks that end half-way: a rank is killed, hangs or fails, which one line reports, or the run is asked to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import living_run
import oracle
import pytest
from waiting import wait_for

from megatron_lora.commands import stop_signals


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    oracle.make_model(root / "model")
    oracle.make_rows(root / "rows.jsonl", num_rows=12, seed=0)
    return root


@pytest.fixture
def start(materials, tmp_path):
    """Return a function that starts a run of a layout; its processes are killed when the test ends."""
    runs = []

    def begin(parallel: dict, *words: str, failing: bool = False, terminal: bool = False, **environment: str) -> living_run.LivingRun:
        datasets = [{"path": str(materials / "rows.jsonl"), "type": "prompt_completion"}]
        job = {"name": "a", "datasets": datasets, "max_steps": 5000, "global_batch_size": 4, "save_steps": 2}
        config = {"base_model": str(materials / "model"), "microbatch_tokens": 64, "parallel": parallel, "jobs": [job]}
        here = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        runs.append(living_run.LivingRun(tmp_path, config, here | environment, *words, failing=failing, terminal=terminal))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize(("parallel", "victim"), [({"pipeline": 2}, 0), ({"data": 2}, 1)])
def test_a_killed_rank_ends_the_run_within_seconds_and_with_one_line(parallel, victim, start):
    run = start(parallel)
    run.train()
    os.kill(run.rank(victim), signal.SIGKILL)
    status, error = run.end(20)
    assert status == 1 and error == living_run.KILLED.format(victim)
    recorded = json.loads((run.output / "status.json").read_text())
    assert recorded["jobs"]["a"]["state"] == "paused" and recorded["reason"] in error


def test_a_rank_that_hangs_ends_the_run_once_another_times_out(start):
    run = start({"pipeline": 2}, MEGATRON_LORA_TIMEOUT_S="3")
    run.train()
    os.kill(run.rank(0), signal.SIGSTOP)
    status, error = run.end(300)  # torchrun gives the stopped rank half a minute to end
    assert status == 1 and error.count("\n") == 1 and error.startswith(living_run.HUNG.format(0) + "1 timed out waiting for it")
    assert re.search(r"; rank 0 was (in|waiting for) the \w+ .*slot \d+; rank 1 was waiting for the forward message of slot \d+$", error)


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "sequence": True}])
def test_a_failing_rank_ends_the_run_with_its_own_words(parallel, start):
    status, error = start(parallel, failing=True).end(300)
    assert status == 1 and error.count("Traceback") == 1 and error.endswith(living_run.FAILED)


def steps_of(run: living_run.LivingRun) -> list[int]:
    return [json.loads(line)["step"] for line in (run.output / "jobs" / "a" / "metrics.jsonl").read_text().splitlines()]


def everybody(run: living_run.LivingRun) -> list[int]:
    """Return all processes of a run but the planner's, as SLURM signals those of a step."""
    return [pid for pid, environment in run.processes().items() if "serve" not in environment[""]]


@pytest.mark.parametrize(
    ("parallel", "number", "reached"),
    [
        ({"pipeline": 2}, signal.SIGHUP, lambda run: run.close_terminal() or [run.process.pid]),
        ({"data": 2}, signal.SIGTERM, everybody),
        ({"tensor": 2}, signal.SIGINT, lambda run: [run.process.pid]),
    ],
    ids=["terminal", "everybody", "interrupt"],
)
def test_a_run_that_is_asked_to_stop_ends_with_75_and_resumes_when_it_is_started_again(parallel, number, reached, start):
    run = start(parallel, terminal=number == signal.SIGHUP)
    run.train()
    for pid in reached(run):
        os.kill(pid, number)
    assert run.end(300) == (75, "")
    recorded, taken = json.loads((run.output / "status.json").read_text()), steps_of(run)
    assert recorded["exit_status"] == 75 and recorded["jobs"]["a"]["state"] == "paused"
    assert (run.output / "jobs" / "a" / f"checkpoint-{taken[-1]}").is_dir()
    again = start(parallel)
    again.train(num_steps=len(taken) + 3)
    os.kill(again.process.pid, signal.SIGTERM)
    assert again.end(300) == (75, "")
    assert steps_of(again) == list(range(1, len(steps_of(again)) + 1)) and len(steps_of(again)) > len(taken)


def test_a_second_signal_ends_a_run_at_once(start):
    run = start({"pipeline": 2})
    run.train()
    os.kill(run.rank(1), signal.SIGSTOP)  # it cannot agree to stop
    for _ in range(2):
        os.kill(run.process.pid, signal.SIGTERM)
        time.sleep(stop_signals.SAME_REQUEST_S + 0.5)
    os.kill(run.rank(1), signal.SIGCONT)
    status, error = run.end(300)
    assert status == 128 + signal.SIGTERM and error == "megatron-lora: stopped by SIGTERM before its state was saved\n"


def test_a_run_that_has_run_out_of_memory_is_started_again_with_less_and_no_step_is_lost_or_doubled(start, tmp_path):
    run = start({"pipeline": 2}, "--max-restarts", "1", failing=True, FAIL_ONCE=str(tmp_path / "failed"))
    wait_for(lambda: "restart 1 of at most 1" in run.error(), 300)
    assert "rank 1: torch.OutOfMemoryError: CUDA out of memory\n" in run.error() and "chosen for 85% of the memory" in run.error()
    run.train(num_steps=len(steps_of(run)) + 5)
    os.kill(run.process.pid, signal.SIGTERM)
    status, error = run.end(300)
    assert status == 75 and error.count("Traceback") == 1
    assert steps_of(run) == list(range(1, len(steps_of(run)) + 1))


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_that_is_asked_to_stop_before_it_trains_ends_at_once_and_may_be_started_again(ranks, start):
    run = start({"pipeline": 2})
    torchrun = "megatron_lora.commands.torchrun"  # it imports torch for a while before it listens
    wait_for(lambda: any(torchrun in environment[""] for environment in run.processes().values()))
    wait_for(lambda: sum("RANK" in environment for environment in run.processes().values()) >= ranks)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end(300) == (75, "megatron-lora: stopped by SIGTERM before it took a step\n")
