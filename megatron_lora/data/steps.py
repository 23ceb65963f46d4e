"""The order in which a job consumes its samples: a pure function of seed, epoch and number of samples.

Epoch e visits the samples in ascending order of hash(seed, e, index), so a sample's place depends on nothing that a run can change
(neighbours, ranks, list position, a library's random stream). An epoch's last global batch is smaller where the batch size does
not divide the number of samples, and no global batch crosses an epoch's border.

    job_steps(num_samples=5, global_batch_size=2, num_epochs=1, max_steps=None, shuffle=False, seed=0)
        == (((0, 0), (0, 1)), ((0, 2), (0, 3)), ((0, 4),))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the checks count steps before they load a tokenizer's library
    from megatron_lora.data.samples import Sample

Steps = tuple[tuple[tuple[int, int], ...], ...]


def job_steps(num_samples: int, global_batch_size: int, num_epochs: int, max_steps: int | None, shuffle: bool, seed: int) -> Steps:
    """List a job's steps; each is its global batch as (epoch, index into the job's samples) pairs.

    `max_steps` overrides `num_epochs`: it cuts the last epoch or adds epochs. `shuffle` False keeps the samples' own order.
    """
    assert num_samples > 0 and global_batch_size > 0 and num_epochs > 0, (num_samples, global_batch_size, num_epochs)
    num_steps = count_steps(num_samples, global_batch_size, num_epochs, max_steps)
    steps_per_epoch = -(-num_samples // global_batch_size)
    steps: list[tuple[tuple[int, int], ...]] = []
    for epoch in range(-(-num_steps // steps_per_epoch)):
        order = epoch_order(num_samples, epoch, seed).tolist() if shuffle else range(num_samples)
        visits = [(epoch, index) for index in order]
        steps += [tuple(visits[start : start + global_batch_size]) for start in range(0, num_samples, global_batch_size)]
    return tuple(steps[:num_steps])


def count_steps(num_samples: int, global_batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Return the number of a job's steps."""
    return num_epochs * -(-num_samples // global_batch_size) if max_steps is None else max_steps


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
class JobRows:
    """A job's samples in the order of its steps."""

    seed: int
    samples: Sequence[Sample]
    steps: Sequence[Sequence[tuple[int, int]]]  # [step][k] = (epoch, index into samples)

    def lengths(self) -> list[list[int]]:
        """Tokens of each sample, [step][k]: what the planner sees."""
        return [[len(self.samples[index].tokens) for _, index in step] for step in self.steps]

    def num_targets(self, step: int) -> int:
        """Target tokens of a step's global batch."""
        return sum(int(self.samples[index].targets.sum()) for _, index in self.steps[step])


def target_share(jobs: Iterable[tuple[Sequence[Sample], Steps]]) -> float:
    """Return which share of the tokens that a run trains on are targets, the only rows that the head computes.

    Of each job its samples and steps; a sample counts as often as the steps visit it.
    """
    num_targets = num_tokens = 0
    for samples, steps in jobs:
        visits = np.bincount([index for step in steps for _, index in step], minlength=len(samples))
        num_targets += int(visits @ [np.count_nonzero(sample.targets) for sample in samples])
        num_tokens += int(visits @ [len(sample) for sample in samples])
    return num_targets / num_tokens
