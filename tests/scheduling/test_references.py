"""Reference slots: each wanted reference once, before the slot that needs it, within the budget; a follower refuses anything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.follow import Follower
from scheduling.pipeline import with_drain
from scheduling.plan_json import stream_from_json, stream_to_json
from scheduling.planner import plan_stream
from scheduling.references import insert
from scheduling.types import NOOP, VALIDATION, PlanError

CAPACITY = 40
WORKLOADS = st.lists(st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=5), min_size=1, max_size=4), min_size=1, max_size=3)


@given(WORKLOADS, st.randoms(use_true_random=False))
def test_each_reference_once_and_before_its_use(lengths, draw):
    wanted = {
        job: {step: {k for k in range(len(batch)) if draw.random() < 0.7} for step, batch in enumerate(steps)}
        for job, steps in enumerate(lengths)
        if draw.random() < 0.7
    }
    slots = stream_to_json(with_drain(plan_stream(lengths, 2, CAPACITY, effort=0), 2), lengths)
    merged, moved, reference = insert(slots, [], wanted, CAPACITY)
    assert [merged[place] for place in moved] == slots and sorted(moved + reference) == list(range(len(merged)))
    found = [tuple(entry[:3]) for place in reference for entry in merged[place]]
    assert sorted(found) == sorted((job, step, k) for job, steps in wanted.items() for step, held in steps.items() for k in held)
    follower = Follower([], 2, CAPACITY)
    for job, steps in enumerate(lengths):
        follower.join(job, steps, wanted=wanted.get(job))
    follower.follow(stream_from_json(merged, reference, reference))
    follower.finish()


def test_slots_are_filled_over_the_slots_that_need_them_and_validation_has_its_own():
    slots = [[[0, 0, 0, 10]], [[0, 0, 1, 10], [1, 0, 0, 20]], [[0, 1, 0, 5]], [[0, 0, 0, 8]]]
    wanted = {0: {0: {0, 1}, VALIDATION: {0}}, 1: {0: {0}}}
    merged, moved, reference = insert(slots, [3], wanted, CAPACITY)
    assert reference == [0, 4] and moved == [1, 2, 3, 5]
    assert merged[0] == [[0, 0, 0, 10], [0, 0, 1, 10], [1, 0, 0, 20]] and merged[4] == [[0, VALIDATION, 0, 8]]


def test_a_follower_refuses_a_slot_before_its_reference_and_a_reference_twice():
    lengths, wanted = [[10, 10]], {0: {0, 1}}
    trained, referred = [[0, 0, 0, 10], [0, 0, 1, 10]], [[0, 0, 0, 10]]
    for slots, reference, words in (([trained], [], "needs the reference"), ([referred, trained], [0], "needs the reference of sample 1"),
                                    ([referred, referred], [0, 1], "twice")):  # fmt: skip
        follower = Follower([], 1, CAPACITY)
        follower.join(0, lengths, wanted=wanted)
        with pytest.raises(PlanError, match=words):
            follower.follow((*stream_from_json(slots, reference, reference), NOOP))
