"""Turns the first stage's steps into reports, without waiting for the device.

When a step is taken on a GPU, its loss and norm are not computed yet: the host runs ahead of the
device. Their copy to the host is queued behind that work, and the step is reported once the copy has
arrived (on the CPU at once).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.output.metrics import StepReport
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Jobs
from scheduling.types import Microbatch


@dataclass(frozen=True, slots=True)
class _Pending:
    job: int
    step: int
    seconds: float
    values: Tensor  # host, [2]: squared norm, loss
    ready: torch.cuda.Event | None


class StepReporter:
    """Reports every job's steps in the order in which they are taken."""

    def __init__(self, jobs: Jobs, report: Callable[[int, StepReport], None]):
        """Report each step by calling `report(job number, step_report)`."""
        self.jobs = jobs
        self.report = report
        self.started: dict[tuple[int, int], float] = {}  # (job, step) -> time of its first forward
        self.pending: deque[_Pending] = deque()

    def on_forward(self, microbatch: Microbatch) -> None:
        """Note the time at which steps begin: with the first microbatch that has a segment of theirs."""
        now = time.perf_counter()
        for segment in microbatch.segments:
            self.started.setdefault((segment.job, segment.step), now)

    def on_step(self, done: StepDone) -> None:
        """Queue a step's report, and report all steps whose numbers have arrived."""
        seconds = time.perf_counter() - self.started.pop((done.job, done.step))
        values = torch.stack([done.square_norm, done.loss])
        ready = None
        if values.is_cuda:
            values = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Pending(done.job, done.step, seconds, values, ready))
        self.flush(wait=False)

    def flush(self, *, wait: bool) -> None:
        """Report the steps whose numbers have arrived; with `wait` all steps."""
        while self.pending:
            first = self.pending[0]
            if first.ready is not None:
                if wait:
                    first.ready.synchronize()
                elif not first.ready.query():
                    return
            self.pending.popleft()
            self.report(first.job, self._build(first))

    def _build(self, done: _Pending) -> StepReport:
        job = self.jobs[done.job]
        square_norm, loss = done.values.tolist()
        steps = job.step_samples.steps
        lengths = job.data.samples.lengths[steps.batch(done.step)]
        return StepReport(
            job=job.name,
            step=done.step + 1,
            total_steps=job.num_steps,
            epoch=(steps.num_visits(done.step) + len(lengths)) / steps.per_epoch_copies,
            loss=loss,
            learning_rate=job.optimizer_settings().learning_rate_at(done.step),
            grad_norm=math.sqrt(square_norm) if square_norm >= 0 else math.nan,
            tokens=int(lengths.sum()),
            target_tokens=job.step_samples.num_targets(done.step),
            samples=len(lengths),
            seconds=done.seconds,
            skipped=not math.isfinite(square_norm),
        )
