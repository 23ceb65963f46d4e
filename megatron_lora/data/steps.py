"""The order in which a job consumes its samples: a pure function of seed, epoch, and the sizes and weights of its datasets.

An epoch takes *copies* of samples: copy p * num_samples + i is sample i taken for the p-th time. Without sampling weights there is one
copy of each. A dataset of weight w gives floor(w) copies of each sample, and one more of a share w - floor(w) of its samples, those
with the smallest draw(seed, epoch, index). Epoch e visits its copies in ascending order of hash(seed, e, copy), so a sample's position
depends on nothing else: not on other jobs, ranks, the job's position in the config or a library's random stream. An epoch's last
global batch is smaller where the batch size does not divide the number of copies, and no global batch holds copies of two epochs.

    steps = job_steps(num_samples=5, global_batch_size=2, num_epochs=1, max_steps=None, shuffle=False, seed=0)
    len(steps) == 3 and steps[2] == ((0, 4),)          # (pass, index into the job's samples)

A pass is epoch * copies of a sample + p: the epoch itself without weights. Steps are computed when they are asked for, so that they take
no memory, however many epochs a job has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from megatron_lora.config.schema import JobConfig
from megatron_lora.errors import UserError

MOST_VISITS = 400_000_000  # samples over all of a job's steps (a sample counts once per copy and epoch); each takes 4 bytes on every rank
Step = tuple[tuple[int, int], ...]  # a global batch: (pass, index into the job's samples) of each of its samples


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many samples each dataset of a job has, and how often an epoch takes them."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(self.sizes)

    @property
    def num_copies(self) -> int:
        """Copies of samples that an epoch takes, at least one of each dataset."""
        return sum(whole * size + extra for size, (whole, extra) in zip(self.sizes, self._copies(), strict=True))

    @property
    def passes(self) -> int:
        """Most copies of a sample in an epoch."""
        return max((whole + (extra > 0) for whole, extra in self._copies()), default=1)

    def copies(self, epoch: int, seed: int) -> np.ndarray:
        """Return the copies of an epoch, ascending: int64 [num_copies]."""
        taken, start = [], 0
        for size, (whole, extra) in zip(self.sizes, self._copies(), strict=True):
            indices = np.arange(start, start + size)
            taken += [indices + p * self.num_samples for p in range(whole)]
            if extra:
                draw = np.argsort(_hash(seed ^ 0x5A5A5A5A00000000, epoch, indices), kind="stable")[:extra]
                taken.append(indices[np.sort(draw)] + whole * self.num_samples)
            start += size
        return np.sort(np.concatenate(taken)) if len(taken) > 1 else taken[0]

    def _copies(self) -> list[tuple[int, int]]:
        """Return, of each dataset, the copies of each sample, and how many samples get one more."""
        pairs = [(int(weight), round((weight - int(weight)) * size)) for size, weight in zip(self.sizes, self.weights, strict=True)]
        return [(whole, extra or int(whole == 0 and size > 0)) for size, (whole, extra) in zip(self.sizes, pairs, strict=True)]


class Steps(Sequence[Step]):
    """A job's steps, computed when they are asked for; equal to any sequence of the same steps."""

    __hash__ = None  # type: ignore[assignment]  # equal to tuples, which have another hash

    def __init__(self, mixture: Mixture, global_batch_size: int, num_steps: int, shuffle: bool, seed: int):
        self.mixture = mixture
        self.num_samples, self.per_epoch_copies, self.passes = mixture.num_samples, mixture.num_copies, mixture.passes
        self.global_batch_size = global_batch_size
        self.num_steps = num_steps
        self.shuffle = shuffle
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs that were asked for

    @property
    def per_epoch(self) -> int:
        """Steps of a complete epoch."""
        return -(-self.per_epoch_copies // self.global_batch_size)

    def __len__(self) -> int:
        return self.num_steps

    @overload
    def __getitem__(self, step: int) -> Step: ...

    @overload
    def __getitem__(self, step: slice) -> tuple[Step, ...]: ...

    def __getitem__(self, step: int | slice) -> Step | tuple[Step, ...]:
        if isinstance(step, slice):
            return tuple(self[i] for i in range(*step.indices(self.num_steps)))
        epoch, copies = self._copies(step)
        first = epoch * self.passes
        return tuple((first + copy // self.num_samples, copy % self.num_samples) for copy in copies.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def batch(self, step: int) -> np.ndarray:
        """Return the indices of a step's samples, int64. Raises IndexError beyond the last step."""
        return self._copies(step)[1] % self.num_samples

    def num_visits(self, end: int | None = None) -> int:
        """Return how many samples the steps before `end` take; None: all steps."""
        epochs, position = divmod(self.num_steps if end is None else end, self.per_epoch)
        return epochs * self.per_epoch_copies + position * self.global_batch_size

    def visits(self) -> np.ndarray:
        """Return how often each sample is taken, int64 [num_samples]."""
        epochs, position = divmod(self.num_steps, self.per_epoch)
        counts = np.zeros(self.num_samples, dtype=np.int64)
        if set(self.mixture.weights) == {1.0}:
            counts += epochs
        else:
            for epoch in range(epochs):
                counts += np.bincount(self.mixture.copies(epoch, self.seed) % self.num_samples, minlength=self.num_samples)
        if position:
            np.add.at(counts, self._order(epochs)[: position * self.global_batch_size] % self.num_samples, 1)
        return counts

    def epoch_indices(self) -> Iterator[np.ndarray]:
        """Yield the indices of the samples that each epoch takes, in its order: int64, the last epoch perhaps cut short."""
        for first in range(0, self.num_steps, self.per_epoch):
            num_steps = min(self.per_epoch, self.num_steps - first)
            yield self._order(first // self.per_epoch)[: num_steps * self.global_batch_size] % self.num_samples

    def _copies(self, step: int) -> tuple[int, np.ndarray]:
        """Return a step's epoch and the copies that it takes."""
        if not -self.num_steps <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        epoch, position = divmod(step % self.num_steps, self.per_epoch)
        start = position * self.global_batch_size
        return epoch, self._order(epoch)[start : start + self.global_batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # the step that is reported and the one that is collated may lie in two epochs
                del self._orders[min(self._orders)]
            copies = self.mixture.copies(epoch, self.seed)
            self._orders[epoch] = copies[epoch_order(copies, epoch, self.seed)] if self.shuffle else copies
        return self._orders[epoch]


def job_steps(
    num_samples: int | Mixture, global_batch_size: int, num_epochs: int, max_steps: int | None, shuffle: bool, seed: int
) -> Steps:
    """Return a job's steps. `max_steps` overrides `num_epochs`: it cuts the last epoch or adds epochs.

    `num_samples` may be a mixture of datasets. `shuffle` False keeps the samples' own order, second copies after all first ones.
    """
    mixture = num_samples if isinstance(num_samples, Mixture) else Mixture((num_samples,), (1.0,))
    assert mixture.num_samples > 0 and global_batch_size > 0 and num_epochs > 0, (mixture, global_batch_size, num_epochs)
    num_steps = count_steps(mixture.num_copies, global_batch_size, num_epochs, max_steps)
    return Steps(mixture, global_batch_size, num_steps, shuffle, seed)


def count_steps(num_copies: int, global_batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Return the number of a job's steps, of whose samples an epoch takes `num_copies`."""
    return num_epochs * -(-num_copies // global_batch_size) if max_steps is None else max_steps


def check_visits(job: JobConfig, num_copies: int) -> None:
    """Raise UserError for a job with more steps than memory can list."""
    if job.max_steps is None:
        key, each = "num_epochs", num_copies
    else:
        key, each = "max_steps", min(job.global_batch_size, num_copies)
    value = getattr(job, key)
    if value * each > MOST_VISITS:
        raise UserError(
            f"jobs.{job.name}.{key}: {value} takes {value * each} samples, and a job may take {MOST_VISITS}; "
            f"use at most {MOST_VISITS // each}"
        )


def epoch_order(copies: int | np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """Permute an epoch's copies, or range(copies), by their hashes: int64 [copies]."""
    return np.argsort(_hash(seed, epoch, np.arange(copies) if isinstance(copies, int) else copies), kind="stable")


def _hash(seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    """Hash numbers below 2**63, int64, to uint64."""
    key = mix(mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    return mix(key + numbers.astype(np.uint64))


def mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64, one to one: a step of the splitmix64 generator (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
