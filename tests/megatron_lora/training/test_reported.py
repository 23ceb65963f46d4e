"""The order of reports, what early stopping discards, and how the writer of snapshots waits for them."""

import dataclasses
import json
import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lora.config.schema import DatasetConfig, JobConfig, RunConfig
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import Mixture, Steps
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.standing import Best
from megatron_lora.parallel.messages import NUM_SUMS
from megatron_lora.training.early_stopping import Progress
from megatron_lora.training.executor import EvaluationDone, StepDone
from megatron_lora.training.jobs import Job
from megatron_lora.training.reported import ReportBoard, Reported
from megatron_lora.training.run_reporter import RunReporter
from megatron_lora.training.sweeps import Sweeps
from scheduling.types import Microbatch, Segment

NUM_TARGETS = 1 + 2 + 3 + 4


def make_job(**settings) -> Job:
    """Return a job of 6 steps that is evaluated on its own samples after every second."""
    dataset = (DatasetConfig(path="a.jsonl", type="text"),)
    config = JobConfig(name="a", seed=0, datasets=dataset, val_datasets=dataset, eval_steps=2, mode="min", max_steps=6, **settings)
    samples = Samples.of(Sample(i, np.arange(i + 2, dtype=np.int32), np.arange(i + 2) > 0) for i in range(4))
    data = JobData(samples=samples, mixture=Mixture((4,), (1.0,)), num_records=4, validation=JobData.of(samples))
    steps = JobSamples(seed=0, samples=samples, steps=Steps(data.mixture, 2, 6, False, 0))
    return Job(number=0, config=config, data=data, step_samples=steps)


class Run:
    """A reporter of one job, and what it is given."""

    def __init__(self, path, **settings):
        self.job, self.board, self.told = make_job(**settings), ReportBoard(), []
        self.path = path / "run"
        config = RunConfig(base_model="m", output_dir=str(self.path), jobs=(self.job.config,))
        self.directory = RunDirectory.create(config)
        accounts, sweeps = SimpleNamespace(begin=lambda: None), Sweeps(self.path, (), config.jobs)
        told = {"tell": lambda *news: self.told.append(news[:2]), "write_later": lambda *words: None}
        control = SimpleNamespace(**told, accounts=accounts, sweeps=sweeps)
        self.reporter = RunReporter(config, {0: self.job}, self.board, control)
        self.reporter.join(self.job)

    def step(self, step: int) -> None:
        if (step + 1) % 2 == 0:
            self.board.expect("a", step + 1)
        self.reporter.on_forward(Microbatch((Segment(0, step, (0, 1), 5),)))
        self.reporter.on_step(StepDone(0, step, torch.tensor(1.0), torch.full((NUM_SUMS,), 1.5)), queue.SimpleQueue())

    def evaluation(self, step: int, loss: float) -> None:
        self.reporter.on_forward(Microbatch((Segment(0, step, (0, 1, 2, 3), 14),), evaluate=True))
        self.reporter.on_evaluation(EvaluationDone(0, step, torch.full((NUM_SUMS,), loss * NUM_TARGETS), torch.tensor(5.0)))

    def lines(self) -> list:
        lines = map(json.loads, (self.path / "jobs/a/metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["eval_loss"]) if "eval_loss" in line else line["step"] for line in lines]


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path, early_stopping_patience=1)
    with made.directory, made.reporter:
        yield made


def test_a_watchdog_has_its_job_paused_once_and_knows_the_first_evaluation_of_an_earlier_residence(tmp_path):
    run = Run(tmp_path, loss_watchdog_threshold=1.0, loss_watchdog_patience=2, eval_watchdog_patience=1)
    for step in range(4):
        run.step(step)
        if step % 2:
            run.evaluation(step + 1, 2.0)
    assert run.told == [("paused", "a")] and run.reporter.alarms["a"].startswith("loss_watchdog: the loss was above 1 in 2 steps")
    written = queue.SimpleQueue()
    written.put((run.job, "paused"))
    run.reporter.on_window(written, begins=False)
    assert run.directory.status()["jobs"]["a"]["reason"] == run.reporter.alarms["a"]
    run.reporter.join(run.job)
    assert not run.reporter.alarms and run.reporter.watchdogs["a"].first_evaluation == 2.0


def test_a_step_is_reported_after_the_evaluation_before_it(run):
    for step in range(4):
        run.step(step)
    assert run.lines() == [1, 2]
    run.evaluation(2, 3.0)
    assert run.lines() == [1, 2, (2, 3.0), 3, 4]
    run.step(4)
    run.evaluation(4, 2.0)
    assert run.lines() == [1, 2, (2, 3.0), 3, 4, (4, 2.0), 5] and not run.told
    (line,) = (line for line in map(json.loads, (run.path / "jobs/a/metrics.jsonl").open()) if line["step"] == 4 and "eval_loss" in line)
    assert (line["eval_accuracy"], line["eval_tokens"], line["eval_samples"]) == (0.5, NUM_TARGETS, 4)
    assert line["eval_perplexity"] == pytest.approx(np.exp(2.0))


def test_steps_after_the_evaluation_that_stops_a_job_are_discarded(run):
    for step in range(5):
        run.step(step)
    run.evaluation(2, 2.0)
    run.evaluation(4, 2.0)
    run.step(5)
    run.evaluation(6, 1.0)
    assert run.lines() == [1, 2, (2, 2.0), 3, 4, (4, 2.0)] and run.told == [("stopped", "a")]
    assert run.board.wait_for("a", 2).progress == Progress(best=Best(2, 2.0))
    assert run.board.wait_for("a", 4).progress == Progress(best=Best(2, 2.0), num_without=1, over=True)
    assert run.board.wait_for("a", 6) is None
    written = queue.SimpleQueue()
    written.put((run.job, "stopped"))
    run.reporter.end_reports()
    run.reporter.finish(written, stopped=True)
    status = run.directory.status()["jobs"]["a"]
    assert status["state"] == "stopped" and "best after step 2" in status["reason"]


def test_a_failed_job_keeps_no_snapshot_waiting(run):
    for step in range(2):
        run.step(step)
    run.evaluation(2, 2.0)
    for step in range(2, 5):
        run.reporter.on_forward(Microbatch((Segment(0, step, (0, 1), 5),)))
        run.reporter.on_step(StepDone(0, step, torch.tensor(float("nan")), torch.full((NUM_SUMS,), 1.5)), queue.SimpleQueue())
        if step == 3:
            run.evaluation(4, 1.0)
    assert run.job.state == "failed" and run.told == [("failed", "a")]
    assert run.board.wait_for("a", 6) is None


def test_a_snapshot_is_handed_its_report_after_save_steps_was_set_to_another_value(run):
    """Its report is held back until the evaluation before it is recorded, and others follow at once."""
    run.step(0)
    run.step(1)
    run.board.expect("a", 3)
    for step in range(2, 4):
        run.step(step)
    run.job.config = dataclasses.replace(run.job.config, save_steps=0)
    run.evaluation(2, 3.0)
    assert run.lines()[-1] == 4 and run.board.wait_for("a", 3).step == 3


def waiting(board: ReportBoard, step: int) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(board.wait_for("a", step)), daemon=True)
    thread.start()
    return thread, found


def test_the_writer_waits_for_a_steps_evaluation_or_the_end(run):
    (first, of_two), (second, of_four) = waiting(run.board, 2), waiting(run.board, 4)
    for step in range(4):
        run.step(step)
    first.join(0.1)
    assert first.is_alive(), "a step's snapshot is written before its evaluation"
    run.evaluation(2, 3.0)
    first.join(10)
    assert of_two == [Reported(step=2, evaluation_due=False, progress=Progress(best=Best(2, 3.0)))]
    second.join(0.1)
    assert second.is_alive() and not of_four
    run.reporter.end_reports()
    second.join(10)
    assert of_four == [Reported(step=4, evaluation_due=True, progress=Progress(best=Best(2, 3.0)))]


def test_after_a_failure_nothing_more_is_written(tmp_path):
    made = Run(tmp_path)
    with made.directory, pytest.raises(ZeroDivisionError), made.reporter:
        made.step(0)
        made.step(1)
        thread, found = waiting(made.board, 2)
        raise ZeroDivisionError
    thread.join(10)
    assert found == [None]
