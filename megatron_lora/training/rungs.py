"""Which points of a sweep continue at a rung: pure functions of the results there.

At each rung results are sorted by value, and of n the best max(1, n // reduction) continue, if their value is finite.
`successive_halving` judges a rung once no point is still to come; `asha` judges who has come against all that are there by then, so
that no point waits for another. No decision is made twice: of a point that is decided the result counts, and no more.

    decide(sweep, "min", results, decided, coming={0})          # -> decisions, in the order of (rung, slot, point)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from megatron_lora.config.sweep_keys import SweepConfig, badness


class Result(NamedTuple):
    """The metric of a point at a rung, and the slot of the plan in front of which it was there; sorted as decisions are made."""

    rung: int
    slot: int
    point: int
    value: float


class Decision(NamedTuple):
    """Whether a point continues beyond its result: it is the `place`-th best, from 1, of `num` that are at the rung."""

    result: Result
    continues: bool
    place: int
    num: int


def decide(
    sweep: SweepConfig, mode: str, results: Sequence[Result], decided: Collection[tuple[int, int]], coming: Collection[int]
) -> list[Decision]:
    """Return the decisions that can be made. `decided`: (rung, point); `coming`: rungs that a point may still come to."""
    found = []
    for rung in sorted({result.rung for result in results}):
        there = [result for result in results if result.rung == rung]
        new = sorted(result for result in there if (rung, result.point) not in decided)
        if not new or (sweep.strategy == "successive_halving" and rung in coming):
            continue
        order = [result.point for result in sorted(there, key=lambda result: (badness(result.value, mode), result.point))]
        num_kept = max(1, len(there) // sweep.reduction)
        for result in new:
            place = order.index(result.point) + 1
            found.append(Decision(result, place <= num_kept and math.isfinite(result.value), place, len(there)))
    return found


def expected_share(sweep: SweepConfig, num_points: int) -> float:
    """Return the share of all points' steps that is taken, where each point takes equally many and none is known to be better."""
    spent, num, before = 0.0, num_points, 0.0
    for share in (*sweep.rungs, 1.0):
        spent, before = spent + num * (share - before), share
        going = sum(max(1, come // sweep.reduction) / come for come in range(1, num + 1))
        num = round(going) if sweep.strategy == "asha" else max(1, num // sweep.reduction)
    return spent / num_points
