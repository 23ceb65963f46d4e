"""The fast recursion, its unrolled twin, its tails and the event simulation agree on every stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.simulate import simulate
from scheduling.slot_cost import SlotCost, efficiency, even_slot_estimate, slot_times
from scheduling.timing import Clock, makespan
from scheduling.types import NOOP, Microbatch, Op, Segment

COSTS = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 10)), min_size=1, max_size=14)
STAGES = st.integers(1, 6)


def one_job_per_slot(costs):
    """A stream with a job of one step per slot; a slot without cost is a no-op."""
    return tuple(Microbatch((Segment(k, 0, (0,), 1),)) if cost else NOOP for k, cost in enumerate(costs))


@given(COSTS, STAGES)
def test_recursion_equals_the_event_simulation(costs, num_stages):
    """The simulation adds the drain slots that deliver the last verdicts; they cost nothing but do take their turns."""
    timeline = simulate(one_job_per_slot(costs), [costs] * num_stages, [costs] * num_stages)
    while costs and not costs[-1]:
        costs = costs[:-1]
    assert makespan(costs + [0.0] * num_stages, num_stages) == pytest.approx(timeline.makespan_s)
    assert (1 - timeline.bubble(0)) * timeline.makespan_s == pytest.approx(2 * sum(costs))


@given(COSTS, STAGES, st.lists(st.tuples(st.integers(0, 14), st.floats(0.01, 10)), max_size=6))
def test_evaluation_slots_take_the_same_time_in_the_recursion_and_the_simulation(costs, num_stages, placed):
    """Each stands before a round; the last ones come when training is over."""
    placed = sorted((min(at, len(costs)), cost) for at, cost in placed)
    stream, times, evaluations = [], [], {}
    for at in range(len(costs) + 1):
        here = [cost for place, cost in placed if place == at]
        evaluations |= {at: here} if here else {}
        stream += [Microbatch((Segment(99, at, (k,), 1),), evaluate=True) for k in range(len(here))]
        stream += one_job_per_slot(costs[at : at + 1])
        times += [*here, *costs[at : at + 1]]
    timeline = simulate(tuple(stream), [times] * num_stages, [times] * num_stages)
    while costs and not costs[-1] and len(costs) - 1 not in evaluations and len(costs) not in evaluations:
        costs = costs[:-1]
    assert makespan(costs + [0.0] * num_stages, num_stages, evaluations) == pytest.approx(timeline.makespan_s)


@given(COSTS, STAGES, st.data())
def test_unrolled_rounds_and_tails_equal_the_plain_ones(costs, num_stages, data):
    clock, end = Clock(num_stages), len(costs) + num_stages - 1
    k = data.draw(st.integers(0, end))
    empty = (0.0,) * num_stages
    head = clock.advance(empty, costs, 0, k)
    assert head == pytest.approx(clock.border(empty, costs, 0, k))
    assert max(map(float.__add__, head, clock.tails(costs)[k])) == pytest.approx(makespan(costs, num_stages))


def test_an_even_stream_by_hand():
    timeline = simulate(one_job_per_slot([1.0] * 6), [[1.0] * 6] * 3, [[1.0] * 6] * 3)
    assert timeline.makespan_s == 2 * (6 + 3 - 1)
    assert timeline.bubble(1) == pytest.approx(0.25)
    first = next(event for event in timeline.events if event.op is Op.STEP)
    assert (first.index, first.end_s) == (0, 6.0)  # through three stages and back, then the STEP before F3


def test_uneven_stages_and_hops_take_longer():
    stream, even = one_job_per_slot([1.0] * 6), [[1.0] * 6] * 2
    slow_last = [[1.0] * 6, [1.5] * 6]
    assert simulate(stream, slow_last, slow_last).makespan_s == pytest.approx(1 + 6 * 3 + 1)
    assert simulate(stream, even, even, hop_s=0.1).makespan_s > simulate(stream, even, even).makespan_s
    assert simulate(stream, even, [[2.0] * 6] * 2).makespan_s == pytest.approx(3 * (6 + 1))


def test_efficiency_of_even_full_slots_is_the_estimate():
    lengths = [[[64]] for _ in range(20)]
    stream = tuple(Microbatch((Segment(job, 0, (0,), 64),)) for job in range(20))
    cost = SlotCost(per_square=2**-10, fixed=50.0)
    assert slot_times(stream, lengths, cost)[0] == pytest.approx(64 + 64 * 64 * 2**-10 + 50)
    assert efficiency(stream, lengths, 4, cost) == pytest.approx(even_slot_estimate(lengths, 4, 64, cost), abs=1e-6)
    assert [action.op for action in simulate(stream[:1], [[1.0]], [[1.0]]).events][:3] == [Op.FORWARD, Op.BACKWARD, Op.STEP]
