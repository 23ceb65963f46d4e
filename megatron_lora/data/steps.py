"""The order in which a job consumes its samples: a pure function of seed, epoch and number of samples.

Epoch e visits the samples in ascending order of hash(seed, e, index), so a sample's position
depends on nothing else: not on other jobs, ranks, the job's position in the config or a library's
random stream. An epoch's last global batch is smaller where the batch size does not divide the
number of samples, and no global batch holds samples of two epochs.

    steps = job_steps(num_samples=5, global_batch_size=2, num_epochs=1, max_steps=None, shuffle=False, seed=0)
    len(steps) == 3 and steps[2] == ((0, 4),)          # (epoch, index into the job's samples)

Steps are computed when they are asked for, so that they take no memory, however many epochs a job has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from megatron_lora.config.schema import JobConfig
from megatron_lora.errors import UserError

MOST_VISITS = 50_000_000  # samples over all of a job's steps (a sample counts once per epoch); each takes about 100 bytes on every rank
Step = tuple[tuple[int, int], ...]  # a global batch: (epoch, index into the job's samples) of each of its samples


@dataclass(frozen=True, slots=True)
class Sample:
    """One record as trained. targets[i] says that token i is predicted from the tokens before it; targets[0] is False."""

    record: int
    tokens: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool

    def __len__(self) -> int:
        return len(self.tokens)


class Steps(Sequence[Step]):
    """A job's steps, computed when they are asked for; equal to any sequence of the same steps."""

    __hash__ = None  # type: ignore[assignment]  # equal to tuples, which have another hash

    def __init__(self, num_samples: int, global_batch_size: int, num_steps: int, shuffle: bool, seed: int):
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.num_steps = num_steps
        self.shuffle = shuffle
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs that were asked for

    @property
    def per_epoch(self) -> int:
        """Steps of a complete epoch."""
        return -(-self.num_samples // self.global_batch_size)

    def __len__(self) -> int:
        return self.num_steps

    @overload
    def __getitem__(self, step: int) -> Step: ...

    @overload
    def __getitem__(self, step: slice) -> tuple[Step, ...]: ...

    def __getitem__(self, step: int | slice) -> Step | tuple[Step, ...]:
        if isinstance(step, slice):
            return tuple(self[i] for i in range(*step.indices(self.num_steps)))
        epoch, indices = self.batch(step)
        return tuple((epoch, index) for index in indices.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Return a step's epoch, and the indices of its samples, int64. Raises IndexError beyond the last step."""
        if not -self.num_steps <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        epoch, position = divmod(step % self.num_steps, self.per_epoch)
        start = position * self.global_batch_size
        return epoch, self._order(epoch)[start : start + self.global_batch_size]

    def num_visits(self, end: int | None = None) -> int:
        """Return how many samples the steps before `end` take; None: all steps."""
        epochs, position = divmod(self.num_steps if end is None else end, self.per_epoch)
        return epochs * self.num_samples + position * self.global_batch_size

    def visits(self) -> np.ndarray:
        """Return how often each sample is taken, int64 [num_samples]."""
        epochs, position = divmod(self.num_steps, self.per_epoch)
        counts = np.full(self.num_samples, epochs, dtype=np.int64)
        if position:
            counts[self._order(epochs)[: position * self.global_batch_size]] += 1
        return counts

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        if epoch not in self._orders:
            if len(self._orders) > 1:  # the step that is reported and the one that is collated may lie in two epochs
                del self._orders[min(self._orders)]
            self._orders[epoch] = epoch_order(self.num_samples, epoch, self.seed)
        return self._orders[epoch]


def job_steps(num_samples: int, global_batch_size: int, num_epochs: int, max_steps: int | None, shuffle: bool, seed: int) -> Steps:
    """Return a job's steps. `max_steps` overrides `num_epochs`: it cuts the last epoch or adds epochs.

    `shuffle` False keeps the samples' own order.
    """
    assert num_samples > 0 and global_batch_size > 0 and num_epochs > 0, (num_samples, global_batch_size, num_epochs)
    num_steps = count_steps(num_samples, global_batch_size, num_epochs, max_steps)
    return Steps(num_samples, global_batch_size, num_steps, shuffle, seed)


def count_steps(num_samples: int, global_batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Return the number of a job's steps."""
    return num_epochs * -(-num_samples // global_batch_size) if max_steps is None else max_steps


def check_visits(job: JobConfig, num_samples: int) -> None:
    """Raise UserError for a job with more steps than memory can list."""
    if job.max_steps is None:
        key, each = "num_epochs", num_samples
    else:
        key, each = "max_steps", min(job.global_batch_size, num_samples)
    value = getattr(job, key)
    if value * each > MOST_VISITS:
        raise UserError(
            f"jobs.{job.name}.{key}: {value} takes {value * each} samples, and a job may take {MOST_VISITS}; "
            f"use at most {MOST_VISITS // each}"
        )


def epoch_order(num_samples: int, epoch: int, seed: int) -> np.ndarray:
    """Permute range(num_samples) for one epoch: int64 [num_samples]."""
    key = mix(mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    return np.argsort(mix(key + np.arange(num_samples, dtype=np.uint64)), kind="stable")


def mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64, one to one: a step of the splitmix64 generator (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSamples:
    """A job's samples, and which of them each step takes."""

    seed: int
    samples: Sequence[Sample]
    steps: Steps

    @classmethod
    def of(cls, job: JobConfig, samples: Sequence[Sample]) -> JobSamples:
        """Return a job's samples, in the steps that its config asks for."""
        steps = job_steps(len(samples), job.global_batch_size, job.num_epochs, job.max_steps, job.shuffle, job.seed)
        return cls(seed=job.seed, samples=samples, steps=steps)

    def lengths(self) -> list[list[int]]:
        """Tokens of each sample, [step][k], for the planner."""
        tokens = np.array([len(sample.tokens) for sample in self.samples])
        return [tokens[self.steps.batch(step)[1]].tolist() for step in range(len(self.steps))]

    def num_targets(self, step: int) -> int:
        """Target tokens of a step's global batch."""
        return sum(int(self.samples[index].targets.sum()) for _, index in self.steps[step])


def target_share(jobs: Iterable[tuple[Sequence[Sample], Steps]]) -> float:
    """Return the share of a run's tokens that are targets, the only rows that the head computes.

    `jobs`: the samples and steps of each job; a sample counts as often as the steps visit it.
    """
    num_targets = num_tokens = 0
    for samples, steps in jobs:
        visits = steps.visits()
        num_targets += int(visits @ [np.count_nonzero(sample.targets) for sample in samples])
        num_tokens += int(visits @ [len(sample) for sample in samples])
    return num_targets / num_tokens
