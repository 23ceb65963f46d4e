"""Mismatched slots: before each batch of their job, at its weights, once under the policy and once under the reference."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.data_parallel import DealtJob
from scheduling.follow import Follower
from scheduling.job_lengths import read_lengths
from scheduling.mismatched import with_needed
from scheduling.plan_json import evaluation_slots, stream_from_json, stream_to_json
from scheduling.types import NOOP, VALIDATION, PlanError
from scheduling.windows import WindowPlanner

CAPACITY = 40
BATCHES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=5)


def dealt(batches, mismatched, validation):
    job = DealtJob.of(read_lengths(0, batches), 1, None, validation)
    return replace(job, mismatched=DealtJob.of(read_lengths(0, mismatched), 1, None, [25] * len(validation)))


@settings(max_examples=60, deadline=None)
@given(BATCHES, BATCHES, st.integers(1, 3), st.booleans(), st.integers(2, 9))
def test_windows_with_mismatched_slots_follow_the_rules(batches, others, num_stages, evaluate, num_slots):
    validation, after = ([7, 30], range(0, len(batches) + 1, 2)) if evaluate else ([], ())
    job = dealt(batches, [[min(30, 3 * tokens) for tokens in batch] for batch in batches], validation)
    other = DealtJob.of(read_lengths(1, others), 1)
    planner = WindowPlanner(num_stages, CAPACITY, num_slots=num_slots)
    follower = Follower([], num_stages, CAPACITY)
    planner.join(0, job.rounds, job.validation_rounds, after, mismatched=True)
    planner.join(1, other.rounds)
    follower.join(0, job.rounds, 0, job.validation_rounds, after, mismatched=job.mismatched)
    follower.join(1, other.rounds)
    counts = {False: 0, True: 0}
    while planner.resident:
        lengths, held = planner.lengths, planner.evaluations.validation
        stream = planner.plan()
        window = {"microbatches": stream_to_json(stream, lengths, held), "evaluate": evaluation_slots(stream)}
        window = with_needed(window, {}, {0: job.mismatched}, follower.opened(), CAPACITY)
        rounds = stream_from_json(*(window[name] for name in ("microbatches", "evaluate", "reference", "mismatched")))
        follower.follow(rounds)
        for slot in rounds:
            counts[slot.reference] += sum(len(s.samples) for s in slot.segments) if slot.mismatched else 0
    follower.follow((NOOP,) * (num_stages + 1))
    follower.finish()
    assert counts[False] == counts[True] == sum(map(len, batches)) + len(validation) * len(after)


@pytest.mark.parametrize(
    ("slots", "mismatched", "reference", "words"),
    [
        ([[[0, 0, 0, 9]]], [], [], "before its mismatched samples are complete"),
        ([[[0, 0, 0, 5]], [[0, 0, 0, 9]]], [0], [], "before its mismatched samples are complete"),
        ([[[0, 1, 0, 5]], [[0, 0, 0, 9]]], [0], [], "no mismatched samples of step 1 at 0"),
        ([[[0, VALIDATION, 0, 25]], [[0, 0, 0, 5]]], [0, 1], [], None),
        ([[[0, 0, 0, 5]], [[0, 0, 0, 5]]], [0, 1], [], "takes a sample of"),
        ([[[0, 0, 0, 9]]], [0], [], "does not hold 9 tokens"),
    ],
)
def test_a_follower_refuses_a_batch_without_them(slots, mismatched, reference, words):
    job = dealt([[9], [9]], [[5], [5]], [8])
    follower = Follower([], 1, CAPACITY)
    follower.join(0, job.rounds, 0, job.validation_rounds, (0,), mismatched=job.mismatched)
    stream = stream_from_json(slots, mismatched, reference, mismatched)
    if words is None:
        follower.follow(stream)
        return
    with pytest.raises(PlanError, match=words):
        follower.follow(stream)
