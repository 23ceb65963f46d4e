"""A job's lengths in one buffer: what comes out is what went in, buffers sort as lists do, sums are those of the planner."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.backlog import OpenJob
from scheduling.data_parallel import Dealt, DealtJob, split_batch
from scheduling.job_lengths import JobLengths, read_lengths
from scheduling.slot_cost import SlotCost, in_grains
from scheduling.types import Microbatch, PlanError, Segment

BATCHES = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 100_000)), min_size=1, max_size=6)
STEPS = st.lists(BATCHES, max_size=5)


@given(STEPS)
def test_lengths_come_back_as_they_were(steps):
    lengths = read_lengths(0, steps)
    assert list(lengths) == steps and len(lengths) == len(steps) and lengths == read_lengths(3, lengths)
    for step, batch in enumerate(steps):
        assert lengths[step] == batch and lengths.array(step).tolist() == batch
        assert list(lengths.cut(step)) == steps[:step] and list(lengths.from_step(step)) == steps[step:]
    assert lengths.from_step(len(steps)) == read_lengths(0, []) and lengths.cut(len(steps)) == lengths
    for step in (-1, len(steps)):
        with pytest.raises(IndexError):
            lengths[step]


@given(STEPS, STEPS)
def test_buffers_sort_as_lists_do(some, others):
    one, two = read_lengths(0, some).key, read_lengths(0, others).key
    assert (one < two, one == two) == (some < others, some == others)


@given(STEPS, st.floats(0, 1e-2))
def test_times_beyond_a_step_are_exact_sums_of_grains(steps, per_square):
    job = OpenJob.of(0, read_lengths(0, steps), SlotCost(per_square=per_square))
    for step in range(len(steps) + 1):
        expected = sum(in_grains(sum(batch) + per_square * sum(tokens * tokens for tokens in batch)) for batch in steps[step:])
        assert job.time_from(step) == expected
        assert job.cut(step).time_from(0) == job.time_from(0) - job.time_from(step)


@pytest.mark.parametrize(
    ("steps", "capacity", "message"),
    [
        ([[3], []], 9, "job 7 step 1 has no samples"),
        ([[3], [4, 0]], 9, "job 7 step 1 sample 1 has 0 tokens"),
        ([[3, -2]], 9, "job 7 step 0 sample 1 has -2 tokens"),
        ([[3], [4, 10]], 9, "job 7 step 1 sample 1 has 10 tokens; the budget is 1 to 9"),
        ([[2**31]], 2**40, "job 7 step 0 sample 0 has 2147483648 tokens"),
    ],
)
def test_lengths_that_no_plan_can_serve_are_named(steps, capacity, message):
    with pytest.raises(PlanError, match=message):
        read_lengths(7, steps, capacity)
    if all(0 < tokens < 2**31 for batch in steps for tokens in batch) and all(steps):
        with pytest.raises(PlanError, match=message):
            read_lengths(7, read_lengths(1, steps), capacity)


@given(STEPS, st.integers(1, 3))
def test_a_dealt_job_is_its_splits_in_arrays(steps, num_replicas):
    lengths = read_lengths(0, steps)
    job = DealtJob.of(lengths, num_replicas)
    assert isinstance(job.rounds, JobLengths) and len(job.rounds) == len(steps)
    for step, batch in enumerate(steps):
        split, rounds = split_batch(batch, num_replicas).tolist(), tuple(range(len(job.rounds[step])))
        dealt = list(zip(*split, strict=True))
        assert job.rounds[step] == [max(batch[k] for k in each if k >= 0) for each in dealt]
        for replica in range(num_replicas):
            for chosen in (rounds, rounds[1::2]):
                segment = Segment(5, step, chosen, 0)
                samples = tuple(sorted(k for one in chosen if (k := split[replica][one]) >= 0))
                expected = Microbatch((Segment(5, step, samples, sum(batch[k] for k in samples)),))
                assert Dealt({5: job}).part(Microbatch((segment,)), replica) == expected


def test_a_visit_takes_a_dozen_bytes():
    job = DealtJob.of(read_lengths(0, [[300 + k for k in range(32)]] * 100), 1)
    held = len(job.lengths.key) + job.lengths.ends.nbytes + len(job.rounds.key) + job.rounds.ends.nbytes + job.samples.nbytes
    assert held / 3200 < 13


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 4))
def test_a_validation_set_is_dealt_like_one_step(validation, num_replicas):
    """Its segments name the version that is evaluated, not a step of the job."""
    job = DealtJob.of(read_lengths(0, [[5, 6]]), num_replicas, validation=validation)
    alone = DealtJob.of(read_lengths(0, [validation]), num_replicas)
    rounds = tuple(range(len(job.validation_rounds)))
    assert job.validation_rounds == alone.rounds[0]
    for replica in range(num_replicas):
        part = Dealt({3: job}).part(Microbatch((Segment(3, 7, rounds, sum(job.validation_rounds)),), evaluate=True), replica)
        samples = alone.samples_of(Segment(3, 0, rounds, 0), replica)
        assert part == Microbatch((Segment(3, 7, tuple(samples), sum(validation[k] for k in samples)),), evaluate=True)


def test_a_large_set_with_one_sample_as_long_as_many_is_split_well():
    """The search goes as deep as there are samples."""
    split = split_batch([3000, *[3] * 3000], 4, SlotCost(per_square=0.0))
    assert sorted(split[split >= 0].tolist()) == list(range(3001))
    assert [int((part >= 0).sum()) for part in split] == [1, 1000, 1000, 1000]
