"""Several replicas of a pipeline share every global batch: all reach a job's step at the same slot, with about the same work.

A step's samples, longest first, are dealt in *rounds* of one sample per replica; within a round, the replica with the least work so far
gets the longest. If the slowest replica is then more than 5% above the mean, a bounded exact search looks for a better partition. The
rounds are then planned as if each were one sample as long as its longest: a round's samples share a slot on all replicas, so every
step ends in the same slot everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch, Segment

BALANCE = 0.05  # a replica may be this much slower than the mean
_NODES = 20_000  # of the exact search


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """One global batch over the replicas: [replica][round] -> sample, or None; `excess` is slowest / mean - 1.

    `proven`: this split's excess is over BALANCE, and no partition has one within it.
    """

    rounds: tuple[tuple[int | None, ...], ...]
    excess: float
    proven: bool


def split_batch(batch: Sequence[int], num_replicas: int, cost: SlotCost | None = None) -> BatchSplit:
    """Split the samples of one global batch (token counts) into num_replicas parts of nearly equal time."""
    cost = cost or SlotCost()
    times = [cost.sample(tokens) for tokens in batch]
    order = sorted(range(len(batch)), key=lambda sample: (-times[sample], sample))
    dealt: list[list[int | None]] = [[] for _ in range(num_replicas)]
    loads = [0.0] * num_replicas
    for start in range(0, len(order), num_replicas):
        taken = order[start : start + num_replicas]
        behind = sorted(range(num_replicas), key=lambda replica: (loads[replica], replica))
        for replica, sample in zip(behind, [*taken, *[None] * (num_replicas - len(taken))], strict=True):
            dealt[replica].append(sample)
            loads[replica] += 0.0 if sample is None else times[sample]
    excess, proven = _excess(loads), False
    if excess > BALANCE:
        found, proven = _search(times, order, num_replicas)
        if found is not None:
            dealt = _align(found)
            excess = _excess([sum(times[sample] for sample in part) for part in found])
    return BatchSplit(tuple(map(tuple, dealt)), excess, proven)


def _excess(loads: Sequence[float]) -> float:
    return max(loads) * len(loads) / sum(loads) - 1


def _search(times: Sequence[float], order: Sequence[int], num_replicas: int) -> tuple[list[list[int]] | None, bool]:
    """Search, depth first, for a partition within BALANCE; return it or None, and whether None is proven."""
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

    if assign(0):
        return parts, False
    return None, nodes <= _NODES


def _align(parts: Sequence[Sequence[int]]) -> list[list[int | None]]:
    """Turn partitions, whose samples are longest first, into rounds."""
    depth = max(map(len, parts))
    return [[*part, *[None] * (depth - len(part))] for part in parts]


@dataclass(frozen=True, slots=True)
class Dealt:
    """All global batches over the replicas. `rounds` [job][step][round] -> tokens of the round's longest sample: what is planned."""

    lengths: Lengths
    splits: tuple[tuple[BatchSplit, ...], ...]  # [job][step]
    rounds: tuple[tuple[tuple[int, ...], ...], ...]

    def part(self, microbatch: Microbatch, replica: int) -> Microbatch:
        """Turn a slot of rounds into one replica's slot of samples; a job has an empty segment where the replica has no sample of it."""
        segments = []
        for segment in microbatch.segments:
            dealt = self.splits[segment.job][segment.step].rounds[replica]
            samples = tuple(sorted(sample for k in segment.samples if (sample := dealt[k]) is not None))
            tokens = sum(self.lengths[segment.job][segment.step][sample] for sample in samples)
            segments.append(Segment(segment.job, segment.step, samples, tokens))
        return Microbatch(tuple(segments))


def deal(lengths: Lengths, num_replicas: int, cost: SlotCost | None = None) -> Dealt:
    """Split every global batch over the replicas."""
    splits = tuple(tuple(split_batch(batch, num_replicas, cost) for batch in steps) for steps in lengths)
    rounds = tuple(
        tuple(
            tuple(max(batch[sample] for sample in dealt if sample is not None) for dealt in zip(*split.rounds, strict=True))
            for split, batch in zip(job_splits, steps, strict=True)
        )
        for job_splits, steps in zip(splits, lengths, strict=True)
    )
    return Dealt(lengths, splits, rounds)
