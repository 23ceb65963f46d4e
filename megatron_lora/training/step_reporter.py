"""Turns the first stage's steps and evaluations into reports, without waiting for the device.

When a step is taken on a GPU, its loss and norm are not computed yet: the host runs ahead of the
device. Their copy to the host is queued behind that work, and the step is reported once the copy has
arrived (on the CPU at once). So it is with the sums of an evaluation.

While a job is evaluated after k steps, its next steps are taken. They are reported after the
evaluation, so that a job's reports are in the order of its steps, each step followed by its evaluation.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.output.metrics import EvalReport, StepReport
from megatron_lora.training.executor import EvaluationDone, StepDone
from megatron_lora.training.jobs import Job, Jobs
from megatron_lora.training.objectives import named
from scheduling.types import Microbatch

Report = StepReport | EvalReport


@dataclass(frozen=True, slots=True)
class _Pending:
    job: Job
    step: int
    evaluation: bool
    seconds: float
    values: Tensor  # host, [1 + NUM_SUMS]: squared norm and sums; of an evaluation the number of right predictions and sums
    ready: torch.cuda.Event | None


class StepReporter:
    """Reports every job's steps and evaluations in order."""

    def __init__(self, jobs: Jobs, report: Callable[[Job, Report], None]):
        """Report each step and evaluation by calling `report(job, its report)`."""
        self.jobs = jobs
        self.report = report
        self.started: dict[tuple[int, int, bool], float] = {}  # (job, step, whether an evaluation) -> time of its first forward
        self.pending: deque[_Pending] = deque()
        self.due: dict[str, deque[int]] = {}  # job -> the numbers of steps whose evaluation is still to be reported
        self.held: dict[str, deque[StepReport]] = {}  # job -> steps whose numbers are there

    def join(self, job: Job) -> None:
        """Begin to report a job."""
        self.due[job.name] = deque(job.evaluation_steps)
        self.held[job.name] = deque()

    def on_forward(self, microbatch: Microbatch) -> None:
        """Note the time at which steps and evaluations begin: with the first microbatch that has a segment of theirs."""
        now = time.perf_counter()
        for segment in (segment for segment in microbatch.segments if segment.step >= 0):
            self.started.setdefault((segment.job, segment.step, microbatch.of_validation(segment)), now)
        self.flush(wait=False)

    def on_step(self, done: StepDone) -> None:
        """Queue a step's report, and report all whose numbers have arrived."""
        self._queue(done.job, done.step, torch.cat([done.square_norm[None], done.sums]), evaluation=False)

    def on_evaluation(self, done: EvaluationDone) -> None:
        """Queue an evaluation's report, and report all whose numbers have arrived."""
        self._queue(done.job, done.step, torch.cat([done.num_right[None], done.sums]), evaluation=True)

    def _queue(self, number: int, step: int, values: Tensor, *, evaluation: bool) -> None:
        seconds = time.perf_counter() - self.started.pop((number, step, evaluation))
        ready = None
        if values.is_cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Pending(self.jobs[number], step, evaluation, seconds, values, ready))
        self.flush(wait=False)

    def flush(self, *, wait: bool) -> None:
        """Report what has arrived; with `wait` everything that is queued."""
        while self.pending:
            first = self.pending[0]
            if first.ready is not None:
                if wait:
                    first.ready.synchronize()
                elif not first.ready.query():
                    return
            self.pending.popleft()
            if first.evaluation:
                assert self._due(first.job).popleft() == first.step, "an evaluation is reported out of turn"
                self.report(first.job, _evaluation_report(first))
            else:
                self.held[first.job.name].append(_step_report(first))
            self._report_held(first.job)

    def is_due(self, job: Job, step: int) -> bool:
        """Whether the evaluation after `step` steps of a job is the next to be reported."""
        due = self._due(job)
        return bool(due) and due[0] == step

    def _due(self, job: Job) -> deque[int]:
        return self.due[job.name]

    def _report_held(self, job: Job) -> None:
        due, held = self._due(job), self.held[job.name]
        while held and (not due or held[0].step <= due[0]):
            self.report(job, held.popleft())


def _step_report(done: _Pending) -> StepReport:
    job = done.job
    square_norm, *sums = done.values.tolist()
    steps = job.step_samples.steps
    lengths = job.data.samples.lengths[steps.batch(done.step)]
    return StepReport(
        job=job.name,
        step=done.step + 1,
        total_steps=job.num_steps,
        epoch=(steps.num_visits(done.step) + len(lengths)) / steps.per_epoch_copies,
        loss=sums[0],
        learning_rate=job.optimizer_settings().learning_rate_at(done.step),
        grad_norm=math.sqrt(square_norm) if square_norm >= 0 else math.nan,
        tokens=int(lengths.sum()),
        target_tokens=job.step_samples.num_targets(done.step),
        samples=len(lengths),
        seconds=done.seconds,
        skipped=not math.isfinite(square_norm),
        reported=named(job.config.preference, sums),
    )


def _evaluation_report(done: _Pending) -> EvalReport:
    samples = done.job.validation_samples
    preference = done.job.config.preference
    num_right, *sums = done.values.tolist()
    num_targets = int(samples.num_targets.sum())
    return EvalReport(
        job=done.job.name,
        step=done.step,
        eval_loss=sums[0] / (num_targets if preference is None else 1),
        eval_accuracy=num_right / num_targets,
        eval_tokens=num_targets,
        eval_samples=len(samples),
        seconds=done.seconds,
        reported=named(preference, sums, "eval_"),
    )
