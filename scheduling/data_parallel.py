"""Several replicas of a pipeline share every global batch: all reach a job's step at the same slot, with about the same work.

A step's samples, longest first, are dealt in *rounds* of one sample per replica; within a round, the replica with the least work so far
gets the longest. If the slowest replica is then more than 5% above the mean, a bounded exact search looks for a better partition. The
rounds are then planned as if each were one sample as long as its longest: a round's samples share a slot on all replicas, so every
step ends in the same slot everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    trail: list[tuple[int, float]] = []  # of each sample placed so far, its replica and that one's load before
    choices: list[list[int]] = []  # of each of them and the next, the replicas still to try, the best last
    while len(trail) < len(order):
        if len(choices) == len(trail):
            nodes += 1
            if nodes > _NODES:
                return None
            time = times[order[len(trail)]]
            fullest_first = sorted(range(num_replicas), key=lambda replica: (loads[replica], replica), reverse=True)
            choices.append(list({loads[replica]: replica for replica in fullest_first if loads[replica] + time <= ceiling}.values()))
        if choices[-1]:
            replica, sample = choices[-1].pop(), order[len(trail)]
            trail.append((replica, loads[replica]))
            loads[replica] += times[sample]
            parts[replica].append(sample)
        elif trail:
            choices.pop()
            replica, loads_before = trail.pop()
            loads[replica] = loads_before
            parts[replica].pop()
        else:
            return None
    return parts


@dataclass(frozen=True, slots=True)
class DealtJob:
    """One job's global batches and validation set over the replicas, in arrays: 12 bytes a sample on one replica."""

    lengths: JobLengths
    rounds: JobLengths  # [step][round] -> tokens of the round's longest sample: what is planned
    samples: np.ndarray  # int32 [replica, place of a round in rounds.key] -> sample, or -1
    validation: DealtJob | None = None  # its validation set, as one step
    mismatched: DealtJob | None = None  # the mismatched samples of its batches, where its objective has them (mismatched.py)

    @classmethod
    def of(cls, lengths: JobLengths, num_replicas: int, cost: SlotCost | None = None, validation: Sequence[int] = ()) -> DealtJob:
        """Split every global batch of a job over the replicas, and its validation samples as if they were one more."""
        rounds: list[list[int]] = []
        samples: list[np.ndarray] = []
        none = np.full((num_replicas, 1), -1, np.int32)
        for batch in lengths:
            split = split_batch(batch, num_replicas, cost)
            samples += [split, none]
            rounds.append([max(batch[k] for k in dealt if k >= 0) for dealt in split.T.tolist()])
        held = cls.of(read_lengths(0, [validation]), num_replicas, cost) if len(validation) else None
        return cls(lengths, read_lengths(0, rounds), np.concatenate([none[:, :0], *samples], axis=1), held)

    @property
    def validation_rounds(self) -> Sequence[int]:
        """Tokens of the longest sample of each round of the validation set: what is planned."""
        return self.validation.rounds[0] if self.validation else ()

    def samples_of(self, segment: Segment, replica: int, evaluate: bool = False) -> list[int]:
        """Return the samples that a replica has in the rounds of a segment, ascending."""
        held, step = (self.validation, 0) if evaluate else (self, segment.step)
        assert held is not None, f"job {segment.job} has no validation set"
        dealt = held.samples[replica, held.rounds.span(step)]
        return sorted(sample for sample in dealt[list(segment.samples)].tolist() if sample >= 0)

    def part(self, segment: Segment, replica: int, evaluate: bool = False) -> Segment:
        """Turn a segment of rounds into one replica's segment of samples; an empty one where the replica has none."""
        samples = self.samples_of(segment, replica, evaluate)
        batch = self.validation.lengths[0] if evaluate and self.validation else self.lengths[segment.step]
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
        jobs = {number: job.mismatched or job for number, job in self.jobs.items()} if microbatch.mismatched else self.jobs
        parts = (jobs[segment.job].part(segment, replica, microbatch.of_validation(segment)) for segment in microbatch.segments)
        return replace(microbatch, segments=tuple(parts))


def deal(lengths: Lengths, num_replicas: int, cost: SlotCost | None = None) -> Dealt:
    """Split every global batch over the replicas."""
    return Dealt({number: DealtJob.of(steps, num_replicas, cost) for number, steps in enumerate(read_all(lengths))})
