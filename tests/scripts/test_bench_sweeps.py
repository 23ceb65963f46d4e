"""The sweeps benchmark plays decisions as runs make them, on the curves that were recorded."""

from __future__ import annotations

import math

from scripts.bench import sweeps


def test_strategies_are_played_on_recorded_curves():
    curves = [sweeps.shares_of(point) for point in sweeps.recorded()]
    assert len(curves) == 32 and all(curve[-1][0] == 1.0 for curve in curves)
    share, regret = sweeps.play(curves, "successive_halving", 0)
    assert math.isclose(share, (32 * 0.111 + 10 * 0.222 + 3 * 0.667) / 32)
    assert math.isclose(regret, sweeps.regret(curves, sweeps.halved(curves)))
    assert {sweeps.play(curves, "successive_halving", seed) for seed in range(4)} == {(share, regret)}
    assert len({sweeps.play(curves, "random", seed) for seed in range(4)}) > 1
    stops = sweeps.stopped_at(curves)
    assert [round(27 * stop) for stop in sorted(set(stops))] == [3, 9, 27] and [stops.count(stop) for stop in sorted(set(stops))] == [
        22,
        7,
        3,
    ]


def test_asha_on_curves_that_never_cross_finds_the_best():
    curves = [[(share, point + 1 - share) for share in (1 / 9, 1 / 3, 1.0)] for point in range(27)]
    played = [sweeps.play(curves, "asha", seed) for seed in range(5)]
    assert all(regret == 0.0 and share < 0.5 for share, regret in played)
