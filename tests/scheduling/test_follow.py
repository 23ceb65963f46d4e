"""A stream followed window by window: what the follower accepts replays correctly, what it says of endings is true; the served planner."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.follow import Follower
from scheduling.pipeline import endings, with_drain
from scheduling.plan_json import stream_from_json
from scheduling.planner import plan_stream
from scheduling.serve import serve
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch, PlanError, Segment
from scheduling.validate import replay
from scheduling.windows import WindowPlanner

CAPACITY = 64
WORKLOADS = st.lists(st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=5), min_size=1, max_size=4), min_size=1, max_size=4)
STAGES, DELAY = st.integers(1, 4), st.integers(0, 1)


def follow(stream, lengths, num_stages, delay, size):
    """Follow a stream in windows of `size` slots; returns the endings of all slots."""
    follower = Follower(lengths, num_stages, CAPACITY, delay)
    ended = [each for first in range(0, len(stream), size) for each in follower.follow(stream[first : first + size])]
    follower.finish()
    return tuple(ended)


@given(WORKLOADS, STAGES, DELAY, st.integers(1, 9))
def test_a_correct_stream_is_accepted_with_its_endings(lengths, num_stages, delay, size):
    stream = plan_stream(lengths, num_stages, CAPACITY, delay, effort=0)
    assert follow(stream, lengths, num_stages, delay, size) == endings(stream)


@given(WORKLOADS, STAGES, DELAY, st.data())
def test_what_is_accepted_replays(lengths, num_stages, delay, data):
    """Break a plan at random: whenever the follower still accepts it, the replay must too, and the other way round."""
    stream = list(plan_stream(lengths, num_stages, CAPACITY, delay, effort=0))
    for _ in range(data.draw(st.integers(1, 3))):
        a, b = (data.draw(st.integers(0, len(stream) - 1)) for _ in range(2))
        kind = data.draw(st.sampled_from(["swap", "drop", "merge", "repeat"]))
        if kind == "swap":
            stream[a], stream[b] = stream[b], stream[a]
        elif kind == "drop":
            del stream[a]
        elif kind == "merge":
            stream[a] = Microbatch((*stream[a].segments, *stream[b].segments))
        else:
            stream.insert(b, stream[a])
        if not stream:
            return

    def verdict(check) -> bool:
        try:
            check()
        except PlanError:
            return False
        return True

    followed = verdict(lambda: follow(stream, lengths, num_stages, delay, 4))
    assert followed == verdict(lambda: replay(tuple(stream), lengths, num_stages, CAPACITY, delay))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(1, 0, (0,), 5), "there is no job 1"),
        (Segment(0, 1, (0,), 5), "is at step 0, not 1"),
        (Segment(0, 0, (2,), 5), "has no samples"),
        (Segment(0, 0, (0, 0), 10), "twice"),
        (Segment(0, 0, (0,), 6), "does not hold 6 tokens"),
    ],
)
def test_broken_segments_are_named(segment, message):
    with pytest.raises(PlanError, match=message):
        Follower([[[5, 7]]], 1, CAPACITY).follow((Microbatch((segment,)),))


@given(WORKLOADS, STAGES, DELAY, st.integers(1, 6), st.data())
def test_served_windows_form_one_stream_and_jobs_leave_between_steps(lengths, num_stages, delay, num_slots, data):
    cost = {"per_square": 1e-3, "fixed": data.draw(st.sampled_from((0.5, 100.0)))}
    settings = {"num_stages": num_stages, "capacity": CAPACITY, "delay": delay, "num_slots": num_slots, "cost": cost}
    leaver, when = data.draw(st.integers(0, len(lengths) - 1)), data.draw(st.integers(1, 3))

    def requests():
        yield json.dumps(settings)
        yield json.dumps({"join": {job: {"steps": steps} for job, steps in enumerate(lengths)}, "leave": {}})
        for number in itertools.count(1):
            yield json.dumps({"join": {}, "leave": {leaver: True} if number == when else {}})

    answers = []
    for answer in serve(requests()):
        answers.append(json.loads(answer))
        if answers[-1]["last"]:
            break
    follower = Follower(lengths, num_stages, CAPACITY, delay)
    stream = ()
    for answer in answers:
        for job in answer["left"]:
            follower.leave(int(job))
        window = stream_from_json(answer["microbatches"])
        follower.follow(window)
        stream += window
    follower.finish()
    steps = {(segment.job, segment.step) for microbatch in stream for segment in microbatch.segments}
    cut = [[batch for step, batch in enumerate(batches) if (job, step) in steps] for job, batches in enumerate(lengths)]
    assert all(cut[job] == lengths[job] for job in range(len(lengths)) if job != leaver), "another job lost steps"
    if all(cut):
        replay(with_drain(stream, num_stages, delay), cut, num_stages, CAPACITY, delay)


@given(WORKLOADS, STAGES, DELAY, st.sampled_from((0.5, 20.0)))
def test_served_windows_are_those_planned_here_at_the_same_cost(lengths, num_stages, delay, fixed):
    settings = {"num_stages": num_stages, "capacity": CAPACITY, "delay": delay, "num_slots": 4}
    cost = SlotCost(per_square=1e-2, fixed=fixed, per_segment=fixed, tiles=(0.0, 4.0 * CAPACITY))
    planned = list(WindowPlanner(cost=cost, **settings).plan_all(lengths))
    jobs = {job: {"steps": steps} for job, steps in enumerate(lengths)}
    requests = [settings | {"cost": asdict(cost)}, {"join": jobs, "leave": {}}, *[{"join": {}, "leave": {}}] * (len(planned) - 1)]
    answers = list(map(json.loads, serve(map(json.dumps, requests))))
    assert [stream_from_json(answer["microbatches"]) for answer in answers] == planned
    assert [answer["last"] for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert sorted(job for answer in answers for job in answer["departed"]) == list(range(len(lengths)))
