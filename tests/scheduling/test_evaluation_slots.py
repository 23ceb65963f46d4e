"""Evaluation slots and moves of rows: what the follower takes replays, and each way of breaking them is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.data_parallel import deal
from scheduling.follow import Follower, Window
from scheduling.pipeline import endings, stage_actions, with_drain
from scheduling.plan_json import evaluation_slots, stream_from_json, stream_to_json
from scheduling.planner import plan_stream
from scheduling.types import NOOP, Action, Ending, Microbatch, Op, PlanError, Segment
from scheduling.validate import replay, replay_replicas

CAPACITY = 64
WORKLOADS = st.lists(st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=4), max_size=4), min_size=1, max_size=4)
STAGES, DELAY = st.sampled_from((1, 2, 4, 8)), st.integers(0, 1)


def positions(stream, job, version, gap):
    """Return the range of numbers of indices before an evaluation, by the steps' ends in a drained training stream."""
    ends = {ending: slot for slot, ended in enumerate(endings(stream)) for ending in ended}
    first = ends[job, version - 1, False] + gap + 1 if version else 0
    return range(first, ends.get((job, version, False), len(stream)) + gap + 1)


@st.composite
def plans(draw):
    """Return a drained stream of steps and evaluations, and what it was made of."""
    lengths, num_stages, delay = draw(WORKLOADS), draw(STAGES), draw(DELAY)
    gap = num_stages + delay
    training = with_drain(plan_stream(lengths, num_stages, CAPACITY, delay, effort=0), num_stages, delay)
    inserted: list[tuple[int, Microbatch]] = []
    validation, evaluate_after = {}, {}
    for job, steps in enumerate(lengths):
        validation[job] = draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=3))
        evaluate_after[job] = sorted(draw(st.sets(st.integers(0, len(steps)))))
        for version in evaluate_after[job]:
            allowed = positions(training, job, version, gap)
            for sample, tokens in enumerate(validation[job]):
                position = draw(st.integers(allowed.start, min(allowed.stop - 1, len(training))))
                inserted.append((position, Microbatch((Segment(job, version, (sample,), tokens),), evaluate=True)))
    inserted.sort(key=lambda each: each[0])
    stream = []
    for position in range(len(training) + 1):
        stream += [microbatch for at, microbatch in inserted if at == position]
        stream += training[position : position + 1]
    return with_drain(tuple(stream), num_stages, delay), lengths, validation, evaluate_after, num_stages, delay


def follow(stream, lengths, validation, evaluate_after, num_stages, delay, size=5):
    """Follow a stream in windows; returns what ends in its slots."""
    follower = Follower([], num_stages, CAPACITY, delay)
    for job, steps in enumerate(lengths):
        follower.join(job, steps, 0, validation[job], evaluate_after[job])
    ended = [each for first in range(0, len(stream), size) for each in follower.follow(stream[first : first + size])]
    follower.finish()
    return tuple(ended)


def replayed(plan, **more):
    stream, lengths, validation, evaluate_after, num_stages, delay = plan
    replay(stream, lengths, num_stages, CAPACITY, delay, validation=validation, evaluate_after=evaluate_after, **more)


def accepted(check) -> bool:
    try:
        check()
    except PlanError:
        return False
    return True


@given(plans(), st.data())
def test_evaluations_anywhere_in_their_ranges_are_followed_and_replay(plan, data):
    stream, num_stages = plan[0], plan[-2]
    assert follow(*plan) == endings(stream)
    last_steps = {(job, len(steps) - 1) for job, steps in enumerate(plan[1])}
    steps = [(job, step) for ended in endings(stream) for job, step, evaluation in ended if not evaluation]
    moves = data.draw(st.sets(st.sampled_from(steps))) - last_steps if steps else set()
    replayed(plan, moves=moves)
    rebuilt = stream_from_json(stream_to_json(stream, plan[1], plan[2]), evaluation_slots(stream))
    assert rebuilt == stream
    for stage in range(num_stages):
        ops = [action.op for action in stage_actions(stream, stage, num_stages, plan[-1], moves)]
        assert ops.count(Op.MOVE) == len(moves) and ops.count(Op.EVAL) == len(evaluation_slots(stream))


@given(plans(), st.data())
def test_what_is_accepted_replays(plan, data):
    """Break a plan at random: the follower accepts it exactly where the replay does."""
    stream, lengths, validation, evaluate_after, num_stages, delay = plan
    broken = list(stream)
    for _ in range(data.draw(st.integers(1, 2))):
        if not broken:
            return
        evaluations = evaluation_slots(tuple(broken)) or [0]
        a = data.draw(st.one_of(st.integers(0, len(broken) - 1), st.sampled_from(evaluations)))
        b = data.draw(st.integers(0, len(broken) - 1))
        kind = data.draw(st.sampled_from(["move", "move", "drop", "merge", "repeat", "turn"]))
        if kind == "move":
            broken.insert(b, broken.pop(a))
        elif kind == "drop":
            del broken[a]
        elif kind == "merge":
            broken[a] = Microbatch((*broken[a].segments, *broken[b].segments), broken[a].evaluate)
        elif kind == "repeat":
            broken.insert(b, broken[a])
        else:
            broken[a] = replace(broken[a], evaluate=not broken[a].evaluate)
    broken = with_drain(tuple(broken), num_stages, delay)
    rest = (lengths, validation, evaluate_after, num_stages, delay)
    assert accepted(lambda: follow(broken, *rest)) == accepted(lambda: replayed((broken, *rest)))


def by_hand():
    """One job of two steps on two stages, evaluated before the first and after each of them; no-ops fill its gaps."""
    steps = [Microbatch((Segment(0, step, (0,), 5),)) for step in range(2)]
    evaluations = [Microbatch((Segment(0, version, (0,), 7),), evaluate=True) for version in range(3)]
    stream = (evaluations[0], steps[0], NOOP, NOOP, evaluations[1], steps[1], NOOP, NOOP, evaluations[2], NOOP, NOOP)
    return stream, [[[5], [5]]], {0: [7]}, {0: [0, 1, 2]}, 2, 0


def moved(stream, first, to):
    changed = list(stream)
    changed.insert(to, changed.pop(first))
    return tuple(changed)


def test_evaluations_are_listed_where_a_gradient_message_can_carry_them():
    plan = by_hand()
    replayed(plan)
    listed = {slot: ended for slot, ended in enumerate(follow(*plan)) if ended}
    assert listed == {1: ((0, 0, False), (0, 0, True)), 5: ((0, 1, False), (0, 1, True)), 9: ((0, 2, True),)}
    assert " ".join(map(str, stage_actions(plan[0], 0, 2))) == "E0 F1 F2 B1 S0 F3 B2 E4 F5 B3 F6 B5 S0 F7 B6 E8 F9 B7 F10 B9 B10"


@pytest.mark.parametrize(
    ("first", "to", "followed", "replays"),
    [
        (4, 3, "has taken 0", "E3 meets job 0 at version 0, planned for 1"),  # before its version exists
        (4, 7, "takes step 1 before its evaluation after 1 steps is complete", "meets job 0 at version 2, planned for 1"),
        (8, 7, "has taken 1", "E7 meets job 0 at version 1, planned for 2"),
    ],
)
def test_an_evaluation_out_of_its_range_is_named(first, to, followed, replays):
    stream, *rest = by_hand()
    stream = moved(stream, first, to)
    with pytest.raises(PlanError, match=followed):
        follow(stream, *rest)
    with pytest.raises(PlanError, match=replays):
        replayed((stream, *rest))


def test_evaluations_that_are_not_due_or_not_complete_are_named():
    stream, lengths, validation, _, *layout = by_hand()
    with pytest.raises(PlanError, match=r"after 1 steps, is due after \[2\]"):
        follow(stream[1:], lengths, validation, {0: [2]}, *layout)
    with pytest.raises(PlanError, match="no such sample"):
        replayed((stream[1:], lengths, validation, {0: [2]}, *layout))
    with pytest.raises(PlanError, match=r"at step 2 of 2, evaluations due after \[2\]"):
        follow(stream[1:4] + stream[5:], lengths, {0: [7, 7]}, {0: [2]}, *layout)
    with pytest.raises(PlanError, match="never scheduled"):
        replayed((stream, lengths, {0: [7, 7]}, {0: [0, 1, 2]}, *layout))
    with pytest.raises(PlanError, match="append no-op slots to report it"):
        follow(stream[:9], *by_hand()[1:])
    with pytest.raises(PlanError, match="append no-op slots to report it"):
        endings(stream[:9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5], [3]), r"evaluated after \[3\] steps: at most 2 steps"),
        (([5], [2, 1]), r"evaluated after \[2, 1\] steps: at most 2 steps, ascending"),
        (([], [1]), "without validation samples"),
        (([5, 65], [1]), "job 4 validation sample 1 has 65 tokens; the budget is 1 to 64"),
    ],
)
def test_evaluations_that_no_plan_can_serve_are_named(arguments, message):
    with pytest.raises(PlanError, match=message):
        Follower([], 2, CAPACITY).join(4, [[5], [5]], 0, *arguments)


def test_steps_and_evaluations_share_the_endings_of_a_slot():
    stream, lengths, validation, evaluate_after, num_stages, delay = by_hand()
    follower = Follower([], num_stages, CAPACITY, delay, max_endings=1)
    follower.join(0, lengths[0], 0, validation[0], evaluate_after[0])
    with pytest.raises(PlanError, match="2 steps and evaluations end in it, more than max_endings = 1"):
        follower.follow(stream)
    with pytest.raises(PlanError, match="more than max_endings = 1"):
        replayed(by_hand(), max_endings=1)


@pytest.mark.parametrize(
    ("moves", "change", "message"),
    [
        ({(0, 1)}, None, None),
        ({(0, 1)}, "drop", "rows have moved after"),
        (set(), "over", "which is over"),
        ({(0, 1)}, "swap", "not directly after its STEP"),
        ({(0, 1)}, "other", "not directly after its STEP"),
    ],
)
def test_rows_move_directly_after_their_own_step_alone(moves, change, message):
    """Two jobs of which job 0 is evaluated at its end: it is resident after its second step still, job 1 is not."""
    steps = [Microbatch((Segment(job, step, (0,), 5),)) for step in range(2) for job in range(2)]
    stream = with_drain((*steps, NOOP, Microbatch((Segment(0, 2, (0,), 7),), evaluate=True)), 2)
    plan = (stream, [[[5], [5]]] * 2, {0: [7]}, {0: [2]}, 2, 0)
    actions = [list(stage_actions(stream, stage, 2, 0, moves)) for stage in range(2)]
    last = actions[1]
    if change == "drop":
        last.remove(Action(Op.MOVE, 0))
    elif change == "over":
        last.insert(len(last) - last[::-1].index(Action(Op.STEP, 1)), Action(Op.MOVE, 1))
    elif change is not None:
        place = last.index(Action(Op.MOVE, 0))
        last[place : place + 2] = last[place + 1], Action(Op.MOVE, 0 if change == "swap" else 1)
    if message is None:
        replayed(plan, actions=actions, moves=moves)
    else:
        with pytest.raises(PlanError, match=message):
            replayed(plan, actions=actions, moves=moves)


@given(plans(), st.integers(1, 6))
def test_chunks_of_a_window_are_the_window(plan, size):
    stream = plan[0]
    window = Window(stream, endings(stream), frozenset({(0, 0)}))
    chunks = window.chunks(size)
    assert sum((chunk.stream for chunk in chunks), ()) == stream and sum((chunk.ended for chunk in chunks), ()) == window.ended
    assert [chunk.moves for chunk in chunks] == [window.moves, *[frozenset()] * (len(chunks) - 1)][: len(chunks)]


def test_a_job_that_leaves_is_evaluated_for_what_was_due_or_not():
    """It has begun its second step, and its evaluation after the first when it leaves."""
    steps = [Microbatch((Segment(0, 0, (0,), 5),)), Microbatch((Segment(0, 1, (0,), 5),)), Microbatch((Segment(0, 1, (1,), 5),))]
    first, second, last = (Microbatch((Segment(0, version, (sample,), 7),), evaluate=True) for version, sample in ((1, 0), (1, 1), (2, 0)))
    last = (last, Microbatch((Segment(0, 2, (1,), 7),), evaluate=True))
    for evaluate, begun in itertools.product((True, False), repeat=2):
        follower = Follower([], 1, CAPACITY)
        follower.join(0, [[5], [5, 5], [5]], 0, [7, 7], [1, 2, 3])
        follower.follow((steps[0], NOOP, *([first] if begun else []), steps[1]))
        follower.leave(0, evaluate)
        assert list(follower.jobs[0].due) == ([1, 2] if evaluate else [1] if begun else [])
        rest = ([] if begun else [first]) + [second] if evaluate or begun else []
        ended = follower.follow((*rest, steps[2], NOOP, *(last if evaluate else ()), NOOP))
        follower.finish()
        assert sum(ended, ()).count(Ending(0, 1, True)) == (evaluate or begun)


def test_replicas_evaluate_their_samples_of_the_same_rounds():
    validation = [9, 30, 4, 4, 17]
    dealt = deal([[[5, 6], [7, 8]]], 2)
    job = replace(dealt.jobs[0], validation=deal([[validation]], 2).jobs[0])
    dealt = replace(dealt, jobs={0: job})
    rounds = job.validation_rounds
    slots = [Microbatch((Segment(0, 1, (k,), tokens),), evaluate=True) for k, tokens in enumerate(rounds)]
    training = plan_stream(dealt.rounds, 2, CAPACITY, 1)
    planned = with_drain((*training[:1], NOOP, NOOP, NOOP, *slots, *training[-1:]), 2, 1)
    streams = [tuple(dealt.part(microbatch, replica) for microbatch in planned) for replica in range(2)]
    more = {"validation": {0: validation}, "evaluate_after": {0: [1]}}
    replay_replicas(streams, [[[5, 6], [7, 8]]], 2, CAPACITY, **more)
    with pytest.raises(PlanError, match="scheduled 2 times"):
        replay_replicas([streams[0], streams[0]], [[[5, 6], [7, 8]]], 2, CAPACITY, **more)


@pytest.mark.parametrize(("num_noops", "allowed"), [(2, False), (3, True)])
def test_a_number_is_free_when_its_last_evaluation_has_reached_the_first_stage(num_noops, allowed):
    """On two stages with a delay of one slot: the sums are listed at the first no-op, and come with the backward after the third's F."""
    evaluation, new = Microbatch((Segment(0, 0, (0,), 7),), evaluate=True), Microbatch((Segment(0, 0, (0,), 5),))
    stream = (evaluation, *[NOOP] * num_noops, new)
    follower = Follower([], 2, CAPACITY, 1)
    follower.join(0, [], 0, [7], [0])
    follower.follow(stream[:-1])
    joins = {0: {0: []}, 1 + num_noops: {0: [[5]]}}
    more = {"joins": joins, "validation": {0: [7]}, "evaluate_after": {0: [0]}}
    if allowed:
        follower.join(0, [[5]])
        follower.follow(with_drain((new,), 2, 1))
        follower.finish()
        replay(stream, [], 2, CAPACITY, 1, **more)
    else:
        with pytest.raises(PlanError, match="it is free from index 3 on"):
            follower.join(0, [[5]])
        with pytest.raises(PlanError, match="the evaluation of job 0 in slot 3, when its number is another's already"):
            replay(stream, [], 2, CAPACITY, 1, **more)
