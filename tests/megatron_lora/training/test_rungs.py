"""Who continues at a rung: halving and its asynchronous form, as pure functions of the results."""

from __future__ import annotations

import math
import random

import pytest

from megatron_lora.config.sweep_keys import SweepConfig
from megatron_lora.training.rungs import Decision, Result, decide, expected_share

HALVING = SweepConfig(job="a", over={}, strategy="successive_halving")
ASHA = SweepConfig(job="a", over={}, strategy="asha")


def going(decisions: list[Decision]) -> list[int]:
    return [decision.result.point for decision in decisions if decision.continues]


def results(values, rung: int = 0, slot: int = 0) -> list[Result]:
    return [Result(rung, slot, point, value) for point, value in enumerate(values)]


def test_halving_waits_for_all_and_then_lets_the_best_third_go_on():
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 8.0, 3.0, 7.0, 6.0]
    assert decide(HALVING, "min", results(values[:8]), (), coming={0}) == []
    decisions = decide(HALVING, "min", results(values), (), coming={1})
    assert going(decisions) == [1, 3, 6]
    assert [decision.result.point for decision in decisions] == list(range(9))  # in the order of (rung, slot, point)
    assert {(decision.place, decision.num) for decision in decisions} == {(place, 9) for place in range(1, 10)}
    assert going(decide(HALVING, "max", results(values), (), coming=())) == [4, 5, 7]


def test_of_equals_the_first_goes_on_and_what_is_not_finite_never():
    assert going(decide(HALVING, "min", results([2.0, 2.0, 2.0, math.nan]), (), ())) == [0]
    assert going(decide(HALVING, "max", results([math.nan, math.inf, -math.inf]), (), ())) == []
    assert going(decide(ASHA, "min", results([math.nan]), (), ())) == []


def test_asha_judges_who_has_come_against_all_by_then_and_never_again():
    first = decide(ASHA, "min", results([3.0]), (), coming={0})
    assert going(first) == [0]
    there = [*results([3.0]), Result(0, 8, 1, 2.0), Result(0, 9, 2, 1.0)]
    later = decide(ASHA, "min", there, {(0, 0)}, coming={0})
    assert [(d.result.point, d.continues, d.place, d.num) for d in later] == [(1, False, 2, 3), (2, True, 1, 3)]


def test_what_a_sweep_costs_is_known_before():
    assert expected_share(SweepConfig(job="a", over={}, strategy="grid"), 32) == 1.0
    assert math.isclose(expected_share(HALVING, 9), (9 * 0.111 + 3 * 0.222 + 1 * 0.667) / 9)
    assert 0.24 < expected_share(HALVING, 32) < expected_share(ASHA, 32) < 0.35


@pytest.mark.parametrize("sweep", [HALVING, ASHA])
def test_the_order_in_which_results_are_listed_changes_nothing(sweep):
    rng = random.Random(0)
    there = [Result(rung, rng.randrange(4), point, rng.choice([1.0, 2.0, 3.0])) for rung in range(2) for point in range(12)]
    decisions = decide(sweep, "min", there, {(0, 3)}, ())
    rng.shuffle(there)
    assert decide(sweep, "min", there, {(0, 3)}, ()) == decisions
    assert len(decisions) == 23
