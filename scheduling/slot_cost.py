"""What a slot costs, in token-equivalents, and the even-slot estimate that plans are measured against.

    time(slot) = linear(tokens) + per_square * sum(length^2) + fixed + per_segment * (segments - 1)        (0 for a no-op)

for forward and backward each: linear layers, attention over packed samples, launches, and the cost of every further job. A GPU computes a
linear layer in tiles of 128 rows, a wave of them at a time, so that its time is a staircase: `tiles[n]` is linear(tokens) for n tiles, in
the tokens that would take as long without waste. Without `tiles`, linear(tokens) is the tokens. `cost.py` fits the constants to a model and
device.

Times are integer multiples of 1/1024 of a token, so that their sums are exact: one workload gives one plan in every Python (3.12's sum()
compensates for rounding, 3.11's does not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scheduling.job_lengths import JobLengths
from scheduling.timing import makespan
from scheduling.types import Lengths, Stream

TILE_ROWS = 128  # of the GEMMs
_GRAINS = 1024  # in a token


def in_grains(time: float) -> float:
    """Round a time to a multiple of 1/1024."""
    return round(time * _GRAINS) / _GRAINS


@dataclass(frozen=True, slots=True)
class SlotCost:
    """Constants of the slot time; the defaults are those of an 8B Llama on one H100-class device."""

    per_square: float = 1.9e-5
    fixed: float = 128.0
    per_segment: float = 0.0
    tiles: tuple[float, ...] = ()

    def sample(self, tokens: int) -> float:
        """Return the time of one sample in token-equivalents, without its slot's waste."""
        return in_grains(tokens + self.per_square * tokens * tokens)

    def steps(self, lengths: JobLengths) -> np.ndarray:
        """Return the time of each step's samples, by the sums of their tokens and squares: float64 [num_steps]."""
        tokens, squares = lengths.sums()
        return np.rint((tokens + self.per_square * squares) * _GRAINS) / _GRAINS

    def overhead(self, tokens: int, segments: int) -> float:
        """Return the time of a slot beyond its samples' (0 without tokens); past the end of `tiles` its waste is that of the last entry."""
        if not tokens:
            return 0.0
        waste, last = 0.0, len(self.tiles) - 1
        if last >= 0:
            row_tiles = -(-tokens // TILE_ROWS)
            waste = self.tiles[row_tiles] - tokens if row_tiles <= last else self.tiles[last] - last * TILE_ROWS
        return in_grains(self.fixed + self.per_segment * (segments - 1) + waste)

    def slot(self, sample_tokens: Sequence[int], segments: int = 1) -> float:
        """Return the time of a slot that packs samples of these lengths into `segments` segments."""
        return sum(map(self.sample, sample_tokens)) + self.overhead(sum(sample_tokens), segments)


def slot_times(stream: Stream, lengths: Lengths, cost: SlotCost, validation: Mapping[int, Sequence[int]] | None = None) -> list[float]:
    """Return the predicted time of every slot, one way; `validation` [job] has the tokens of what evaluation slots hold."""
    times = []
    for slot in stream:
        held = validation or {}
        batches = ((s.samples, held[s.job] if slot.of_validation(s) else lengths[s.job][s.step]) for s in slot.segments)
        times.append(cost.slot([batch[sample] for samples, batch in batches for sample in samples], len(slot.segments)))
    return times


def work_time(lengths: Lengths, cost: SlotCost) -> float:
    """Return the time of all samples, one way on one stage, without slots, fill or drain."""
    return sum(cost.sample(tokens) for steps in lengths for batch in steps for tokens in batch)


def efficiency(stream: Stream, lengths: Lengths, num_stages: int, cost: SlotCost | None = None) -> float:
    """Return ideal time of the tokens / makespan of the stream."""
    cost = cost or SlotCost()
    span = makespan(slot_times(stream, lengths, cost), num_stages)
    return 2 * work_time(lengths, cost) / span if span else 1.0


def even_slot_estimate(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost | None = None) -> float:
    """Return the efficiency of perfectly even slots at their best number.

    Indivisible samples and gaps between steps may forbid it; slots that ramp up and down at the ends can beat it
    by a percent, in a short run by three.
    """
    cost = cost or SlotCost()
    tokens = sum(tokens for steps in lengths for batch in steps for tokens in batch)
    return estimate_of(work_time(lengths, cost), tokens, num_stages, capacity, cost)


def estimate_of(work: float, tokens: int, num_stages: int, capacity: int, cost: SlotCost) -> float:
    """Return the even-slot estimate of a workload of `tokens` tokens whose samples take the time `work`."""
    least = -(-tokens // capacity)
    if not least:
        return 1.0
    best = max(least, round(((num_stages - 1) * work / max(cost.fixed, 1e-9)) ** 0.5))  # of (work + fixed n)(n + P - 1) / n
    return max(work * n / ((work + cost.fixed * n) * (n + num_stages - 1)) for n in (best, best + 1, max(least, best - 1)))
