"""Several replicas of a pipeline share every global batch: all reach a job's step at the same slot, with about the same work.

A step's samples, longest first, are dealt in *rounds* of one sample per replica; within a round, the replica with the least work so far
gets the longest. If the slowest replica is then more than 5% above the mean, a bounded exact search looks for a better partition. The
rounds are then planned as if each were one sample as long as its longest: a round's samples share a slot on all replicas, so every
step ends in the same slot everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scheduling.job_lengths import JobLengths, read_all, read_lengths
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch, Segment

BALANCE = 0.05  # a replica may be this much slower than the mean
_NODES = 20_000  # of the exact search


def split_batch(batch: Sequence[int], num_replicas: int, cost: SlotCost | None = None) -> np.ndarray:
    """Split the samples of one global batch (token counts) into parts of nearly equal time: int32 [replica, round] -> sample, or -1.

    The slowest part is at most BALANCE above the mean, unless no split is (or the search has given up).
    """
    cost = cost or SlotCost()
    times = [cost.sample(tokens) for tokens in batch]
    order = sorted(range(len(batch)), key=lambda sample: (-times[sample], sample))
    parts: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [0.0] * num_replicas
    for start in range(0, len(order), num_replicas):
        taken = order[start : start + num_replicas]
        behind = sorted(range(num_replicas), key=lambda replica: (loads[replica], replica))
        for replica, sample in zip(behind, taken, strict=False):
            parts[replica].append(sample)
            loads[replica] += times[sample]
    if max(loads) * num_replicas / sum(loads) - 1 > BALANCE:
        parts = _search(times, order, num_replicas) or parts
    dealt = np.full((num_replicas, max(map(len, parts))), -1, np.int32)
    for row, part in zip(dealt, parts, strict=True):
        row[: len(part)] = part
    return dealt


def _search(times: Sequence[float], order: Sequence[int], num_replicas: int) -> list[list[int]] | None:
    """Search, depth first, for a partition within BALANCE; return it, None if there is none or it takes too many nodes."""
    ceiling = sum(times) / num_replicas * (1 + BALANCE)
    loads, parts, nodes = [0.0] * num_replicas, [[] for _ in range(num_replicas)], 0

    def assign(position: int) -> bool:
        nonlocal nodes
        if position == len(order):
            return True
        nodes += 1
        tried = set()
        for replica in sorted(range(num_replicas), key=lambda replica: (loads[replica], replica)):
            load = loads[replica]
            if load in tried or load + times[order[position]] > ceiling or nodes > _NODES:
                continue
            tried.add(load)
            loads[replica] += times[order[position]]
            parts[replica].append(order[position])
            if assign(position + 1):
                return True
            parts[replica].pop()
            loads[replica] = load
        return False

    return parts if assign(0) else None


@dataclass(frozen=True, slots=True)
class DealtJob:
    """One job's global batches over the replicas, in arrays: 12 bytes a sample on one replica."""

    lengths: JobLengths
    rounds: JobLengths  # [step][round] -> tokens of the round's longest sample: what is planned
    samples: np.ndarray  # int32 [replica, place of a round in rounds.key] -> sample, or -1

    @classmethod
    def of(cls, lengths: JobLengths, num_replicas: int, cost: SlotCost | None = None) -> DealtJob:
        """Split every global batch of a job over the replicas."""
        rounds: list[list[int]] = []
        samples: list[np.ndarray] = []
        none = np.full((num_replicas, 1), -1, np.int32)
        for batch in lengths:
            split = split_batch(batch, num_replicas, cost)
            samples += [split, none]
            rounds.append([max(batch[k] for k in dealt if k >= 0) for dealt in split.T.tolist()])
        return cls(lengths, read_lengths(0, rounds), np.concatenate([none[:, :0], *samples], axis=1))

    def samples_of(self, segment: Segment, replica: int) -> list[int]:
        """Return the samples that a replica has in the rounds of a segment, ascending."""
        dealt = self.samples[replica, self.rounds.span(segment.step)]
        return sorted(sample for sample in dealt[list(segment.samples)].tolist() if sample >= 0)

    def part(self, segment: Segment, replica: int) -> Segment:
        """Turn a segment of rounds into one replica's segment of samples; an empty one where the replica has none."""
        samples, batch = self.samples_of(segment, replica), self.lengths[segment.step]
        return Segment(segment.job, segment.step, tuple(samples), sum(batch[sample] for sample in samples))


@dataclass(frozen=True, slots=True)
class Dealt:
    """Jobs, by number, over the replicas."""

    jobs: Mapping[int, DealtJob]

    @property
    def rounds(self) -> tuple[JobLengths, ...]:
        """What is planned: [job][step][round] -> tokens of the round's longest sample."""
        return tuple(job.rounds for job in self.jobs.values())

    def part(self, microbatch: Microbatch, replica: int) -> Microbatch:
        """Turn a slot of rounds into one replica's slot of samples; a job has an empty segment where the replica has no sample of it."""
        return Microbatch(tuple(self.jobs[segment.job].part(segment, replica) for segment in microbatch.segments))


def deal(lengths: Lengths, num_replicas: int, cost: SlotCost | None = None) -> Dealt:
    """Split every global batch over the replicas."""
    return Dealt({number: DealtJob.of(steps, num_replicas, cost) for number, steps in enumerate(read_all(lengths))})
