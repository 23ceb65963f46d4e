"""What the first rank reports: steps as they were taken, nothing of a job that has failed, a timeline that stays exact and small."""

import json
import queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lora.config.schema import DatasetConfig, JobConfig, RunConfig
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import MOST_VISITS, Mixture, Steps, check_visits
from megatron_lora.errors import UserError
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.timeline import Timeline, spans_of_a_rank
from megatron_lora.parallel.messages import NUM_SUMS
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Job
from megatron_lora.training.reported import ReportBoard
from megatron_lora.training.run_reporter import RunReporter
from megatron_lora.training.step_reporter import StepReporter
from scheduling.types import Microbatch, Segment


class OwnStepOnly(Steps):
    """Steps that are read one at a time: a report must not walk over all earlier steps."""

    def __getitem__(self, step):
        assert isinstance(step, int)
        return super().__getitem__(step)


def make_job(name: str, num_steps: int, number: int = 0, **settings) -> Job:
    config = JobConfig(
        name=name, seed=0, datasets=(DatasetConfig(path="a.jsonl", type="text"),), global_batch_size=2, max_steps=num_steps, **settings
    )
    samples = Samples.of(Sample(i, np.arange(i + 2, dtype=np.int32), np.arange(i + 2) > 0) for i in range(4))
    steps = OwnStepOnly(Mixture((4,), (1.0,)), 2, num_steps, False, 0)
    step_samples = JobSamples(seed=0, samples=samples, steps=steps)
    return Job(number=number, config=config, data=JobData.of(samples), step_samples=step_samples)


def take(reporter, job: int, step: int, square_norm: float, on_step=None) -> None:
    reporter.on_forward(Microbatch((Segment(job, step, (0, 1), 5),)))
    (on_step or reporter.on_step)(StepDone(job, step, torch.tensor(square_norm), torch.full((NUM_SUMS,), 1.5)))


def reporter_of(tmp_path, jobs) -> tuple[RunDirectory, RunReporter, list[tuple]]:
    config = RunConfig(base_model="m", output_dir=str(tmp_path / "run"), jobs=tuple(job.config for job in jobs))
    directory, told = RunDirectory.create(config), []
    control = SimpleNamespace(tell=lambda *news: told.append(news), later=queue.SimpleQueue(), accounts=SimpleNamespace(begin=lambda: None))
    reporter = RunReporter(config, dict(enumerate(jobs)), ReportBoard(), control)
    for job in jobs:
        reporter.join(job)
    return directory, reporter, told


def test_epochs_tokens_and_norms_of_each_step():
    reports, jobs = [], {0: make_job("a", 3), 1: make_job("b", 2, number=1)}
    reporter = StepReporter(jobs, lambda job, report: reports.append((job, report)))
    for job in jobs.values():
        reporter.join(job)
    for job, step, square_norm in ((0, 0, 4.0), (1, 0, float("inf")), (0, 1, 9.0), (1, 1, 1.0), (0, 2, 16.0)):
        take(reporter, job, step, square_norm)
    reported = [(job.number, r.step, r.epoch, r.tokens, r.target_tokens, r.grad_norm, r.skipped) for job, r in reports]
    assert reported == [
        (0, 1, 0.5, 5, 3, 2.0, False),
        (1, 1, 0.5, 5, 3, float("inf"), True),
        (0, 2, 1.0, 9, 7, 3.0, False),
        (1, 2, 1.0, 9, 7, 1.0, False),
        (0, 3, 1.5, 5, 3, 4.0, False),
    ]


def test_a_failed_job_is_removed_once_and_reports_no_more(tmp_path):
    directory, reporter, told = reporter_of(tmp_path, [make_job("a", 12)])
    norms = [1.0, *[float("nan")] * 3, 1.0, *[float("nan")] * 3]
    with directory, reporter:
        for step, square_norm in enumerate(norms):
            take(reporter.steps, 0, step, square_norm, lambda done: reporter.on_step(done, queue.SimpleQueue()))
        status = directory.status()["jobs"]["a"]
    assert told == [("failed", "a", status["reason"])] and status["state"] == "failed" and "step 4" in status["reason"]
    rows = [json.loads(line) for line in (tmp_path / "run/jobs/a/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped"]) for row in rows] == [(1, False), (2, True), (3, True), (4, True)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 1}, "jobs.a.warmup_ratio: 0.03 leaves a learning rate of 0 in all steps (1)"),
        ({"num_steps": 5, "learning_rate": 0.0}, "jobs.a.learning_rate: 0 leaves a learning rate of 0 in all steps (5)"),
        ({"num_steps": 2}, ""),
        ({"num_steps": 1, "warmup_ratio": 0.0}, ""),
    ],
)
def test_a_job_that_cannot_learn_is_reported_at_the_start(tmp_path, capsys, settings, words):
    directory, reporter, _ = reporter_of(tmp_path, [make_job("a", **settings)])
    with directory, reporter:
        said = capsys.readouterr().err
    assert said.count("\n") == bool(words) and words in said


@pytest.mark.parametrize(("key", "value", "most"), [("max_steps", 10**30, MOST_VISITS // 8), ("num_epochs", 10**30, MOST_VISITS // 1000)])
def test_a_job_without_end_is_refused(key, value, most):
    config = JobConfig(name="a", seed=0, datasets=(DatasetConfig(path="a.jsonl", type="text"),), **{key: value})
    with pytest.raises(UserError, match=f"jobs.a.{key}: {value} takes .* use at most {most}$"):
        check_visits(config, 1000)


class Event:
    """A CUDA event whose clock, like CUDA's, counts float32 milliseconds."""

    def __init__(self, ms: float):
        self.ms = ms

    def elapsed_time(self, end) -> float:
        return float(np.float32(end.ms - self.ms))


def test_a_long_runs_timeline_is_exact_and_keeps_the_last_spans(monkeypatch):
    assert [spans_of_a_rank(num_ranks) for num_ranks in (1, 8, 64)] == [100_000, 100_000, 12_500]
    timeline = Timeline(torch.device("cpu"), max_spans=50)
    hour_ms = 3_600_000.0
    moments = iter(Event(10 * hour_ms + 0.3 * i) for i in range(200))
    timeline.cuda, timeline.origin = True, Event(0.0)
    monkeypatch.setattr(timeline, "_now", lambda: next(moments))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for slot in range(100):
        with timeline.span("F", slot):
            pass
    events = timeline.events(0, 0)
    assert [event["name"] for event in events] == [f"F {slot}" for slot in range(50, 100)]
    assert [event["dur"] for event in events] == pytest.approx([300.0] * 50, rel=1e-4)
    assert np.diff([event["ts"] for event in events]) == pytest.approx([600.0] * 49, abs=1.0)
