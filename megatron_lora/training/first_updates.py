"""Whether a job's first update reached all of its modules: checked without waiting for the device.

With B zero at the start, A has no gradient in the first step, and B moves wherever a gradient arrives. After the first step that is taken
with a learning rate above 0, the device says which B moved; the host reads that once the copy has arrived.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Job


@dataclass(frozen=True, slots=True)
class _Asked:
    job: Job
    paths: list[str]
    answers: Tensor  # host, bool [1 + modules]: whether the step was finite, then whether each B has moved
    ready: torch.cuda.Event | None


class FirstUpdates:
    """The jobs whose first update is still to come, or to be checked."""

    def __init__(self):
        self.unchecked: set[int] = set()  # numbers
        self.asked: deque[_Asked] = deque()

    def join(self, job: Job) -> None:
        """Check a job's first update from now on."""
        self.unchecked.add(job.number)

    def on_step(self, job: Job, done: StepDone) -> None:
        """Ask the device about a step that was just taken, and read what it has answered."""
        if job.number in self.unchecked and job.optimizer.settings.learning_rate_at(done.step) > 0:
            self.unchecked.remove(job.number)
            paths, moved = job.optimizer.moved()
            answers, ready = torch.cat([torch.isfinite(done.square_norm)[None], moved]), None
            if answers.is_cuda:
                answers = torch.empty(answers.shape, dtype=torch.bool, pin_memory=True).copy_(answers, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record()
            self.asked.append(_Asked(job, paths, answers, ready))
        while self.asked and (self.asked[0].ready is None or self.asked[0].ready.query()):
            self._read(self.asked.popleft())

    def _read(self, asked: _Asked) -> None:
        finite, *moved = asked.answers.tolist()
        if not finite:  # the step was skipped: the next one is looked at
            self.unchecked.add(asked.job.number)
            return
        unmoved = [path for path, has_moved in zip(asked.paths, moved, strict=True) if not has_moved]
        if unmoved:
            names = f"{', '.join(unmoved[:3])}{f' and {len(unmoved) - 3} more' if len(unmoved) > 3 else ''}"
            print(f"megatron-lora: warning: job {asked.job.name}: B has not moved in its first step: {names}", file=sys.stderr)
