"""Planned evaluations: in their ranges, listed in time, packed together, and at little cost; training slots are those planned without."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.follow import Follower
from scheduling.pipeline import with_drain
from scheduling.plan_json import stream_from_json
from scheduling.serve import serve
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import NOOP, PlanError
from scheduling.validate import replay
from scheduling.windows import WindowPlanner

CAPACITY, COST = 64, SlotCost(per_square=1e-3, fixed=2.0)
STEPS = st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=4), max_size=4)
STAGES, DELAY = st.sampled_from((1, 2, 4, 8)), st.integers(0, 1)


@st.composite
def evaluated(draw):
    """Return a job's steps, validation samples and the numbers of steps after which it is evaluated."""
    steps = draw(STEPS)
    return steps, draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=9)), sorted(draw(st.sets(st.integers(0, len(steps)))))


@given(st.lists(evaluated(), min_size=1, max_size=7), STAGES, DELAY, st.integers(1, 6), st.integers(2, 4), st.data())
def test_jobs_with_evaluations_come_and_go(waiting, num_stages, delay, num_slots, max_endings, data):
    """As for steps alone in test_windows.py: the follower agrees at every border, and the whole replays."""
    planner = WindowPlanner(num_stages, CAPACITY, num_slots, delay, 0, COST, max_endings=max_endings)
    follower = Follower([], num_stages, CAPACITY, delay, max_endings=max_endings)
    joins, order, ran, stream = {}, {}, [], ()
    new_numbers = itertools.count(3)
    while waiting or planner.resident:
        for number in [*data.draw(st.lists(st.integers(0, 2), unique=True)), *([] if planner.resident else [next(new_numbers)])]:
            free = planner.numbers.is_free(number, planner.first_slot, planner.resident)
            assert free == follower.numbers.is_free(number, follower.num_indices, follower.jobs)
            if waiting and free:
                steps, validation, evaluate_after = waiting.pop()
                planner.join(number, steps, validation, evaluate_after)
                follower.join(number, steps, 0, validation, evaluate_after)
                if number not in joins.setdefault(len(stream), {}):  # else who has joined here has left at once
                    order[number] = len(ran)
                    ran.append(())
                joins[len(stream)][number] = steps
                ran[order[number]] = steps, validation, evaluate_after
        for number in data.draw(st.lists(st.sampled_from(sorted(planner.resident)), unique=True, max_size=1)) if planner.resident else ():
            evaluate, of = data.draw(st.booleans()), order[number]
            due = list(planner.evaluations.jobs[number].due) if number in planner.evaluations.jobs else []
            num_steps = planner.leave(number, evaluate)
            still_due = list(planner.evaluations.jobs[number].due) if number in planner.evaluations.jobs else []
            steps, validation, evaluate_after = ran[of]
            assert not evaluate or still_due == [version for version in due if version <= num_steps]
            ran[of] = steps[:num_steps], validation, [version for version in evaluate_after if version not in set(due) - set(still_due)]
            joined = max(slot for slot, jobs in joins.items() if number in jobs)
            joins[joined][number] = ran[of][0]
            follower.leave(number, evaluate)
        window = planner.plan()
        assert len(window) <= num_slots
        follower.follow(window)
        assert planner.resident == follower.jobs.keys() and planner.first_slot == follower.num_indices
        stream += window
    follower.follow(with_drain(stream, num_stages, delay)[len(stream) :])
    follower.finish()
    replay(
        stream,
        [],
        num_stages,
        CAPACITY,
        delay,
        max_endings=max_endings,
        joins=joins,
        validation={job: validation for job, (_, validation, _) in enumerate(ran)},
        evaluate_after={job: versions for job, (_, _, versions) in enumerate(ran)},
    )


@given(st.lists(evaluated(), min_size=1, max_size=5), STAGES, DELAY)
def test_training_slots_are_those_planned_without_evaluations(jobs, num_stages, delay):
    """In one window; only no-ops that lead to the last evaluations are added."""
    streams = []
    for evaluate in (False, True):
        planner = WindowPlanner(num_stages, CAPACITY, 500, delay, 0, COST)
        for number, (steps, validation, evaluate_after) in enumerate(jobs):
            planner.join(number, steps, validation, evaluate_after if evaluate else ())
        streams.append(planner.plan() if planner.resident else ())
    training = tuple(microbatch for microbatch in streams[1] if not microbatch.evaluate)
    assert training[: len(streams[0])] == streams[0] and all(microbatch.is_noop for microbatch in training[len(streams[0]) :])
    if not any(evaluate_after for _, _, evaluate_after in jobs):
        assert streams[1] == streams[0]


@given(st.lists(evaluated(), min_size=2, max_size=5), STAGES, DELAY, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_plans_do_not_depend_on_numbers(jobs, num_stages, delay, num_slots, rng):
    jobs = [*jobs, jobs[0]]

    def planned(numbers: list[int]) -> list:
        planner, named = WindowPlanner(num_stages, CAPACITY, num_slots, delay, 0, COST), []
        for number, job in zip(numbers, jobs, strict=True):
            planner.join(number, *job)
        while planner.resident:
            for microbatch in planner.plan():
                segments = ((jobs[numbers.index(s.job)], s.step, s.samples) for s in microbatch.segments)
                named.append((microbatch.evaluate, sorted(segments)))
        return named

    numbers = list(range(len(jobs)))
    assert planned(numbers) == planned([7 + 3 * k for k in rng.sample(numbers, len(numbers))])


def test_evaluations_that_are_due_together_share_full_slots():
    """Eight validation sets of three quarters of a slot each, all before the first steps."""
    planner, stream = WindowPlanner(1, CAPACITY, 100, cost=COST), ()
    for number in range(8):
        planner.join(number, [[60]], [8] * 6, [0])
    while planner.resident:
        stream += planner.plan()
    slots = [microbatch for microbatch in stream if microbatch.evaluate]
    assert [slot.num_tokens for slot in slots] == [CAPACITY] * 6


def first_evaluation(validation: list[int], num_stages: int = 2) -> int:
    """Plan a long step after an evaluation in windows of 4 slots; return the window that the evaluation is in."""
    planner = WindowPlanner(num_stages, CAPACITY, 4, cost=COST)
    planner.join(0, [[60] * 30, [60]], validation, [0])
    for window in itertools.count():
        if any(microbatch.evaluate for microbatch in planner.plan()):
            return window


def test_a_small_evaluation_waits_for_others_for_one_window_alone():
    assert first_evaluation([5]) == 1 and first_evaluation([40]) == 0


def test_without_training_an_evaluation_comes_at_once():
    planner = WindowPlanner(4, CAPACITY, 20, 1, cost=COST)
    planner.join(1, [], [7], [0])
    assert [microbatch.evaluate for microbatch in planner.plan()] == [True]
    planner.join(0, [[60]], [5], [1])
    assert [microbatch.evaluate for microbatch in planner.plan()] == [False, *[False] * 5, True]
    assert not planner.resident


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_a_lone_evaluation_goes_where_the_makespan_grows_least(num_stages):
    """One of a job whose first step takes the whole window, so that every place is open to it."""
    rng = random.Random(num_stages)
    for _ in range(5):
        jobs = [[[rng.randint(1, CAPACITY) for _ in range(3)] for _ in range(4)] for _ in range(3)]
        planner = WindowPlanner(num_stages, CAPACITY, 500, 0, 0, COST)
        for number, steps in enumerate(jobs):
            planner.join(number, steps)
        planner.join(3, [[20] * 20], [33], [0])
        stream = planner.plan()
        place = next(slot for slot, microbatch in enumerate(stream) if microbatch.evaluate)
        training = stream[:place] + stream[place + 1 :]
        costs = [*slot_times(training, [*jobs, [[20] * 20]], COST), *[0.0] * num_stages]
        cost = COST.slot([33])
        last = max(slot for slot, microbatch in enumerate(training) if any(s.job == 3 for s in microbatch.segments)) + num_stages
        spans = {k: makespan(costs, num_stages, {k: [cost]}) for k in range(min(last, len(training)) + 1)}
        assert spans[place] <= min(spans.values()) + 0.02 * cost


def test_a_served_run_survives_without_jobs():
    """A job is evaluated and leaves; the caller drains; another joins under its number and leaves with an evaluation due."""
    settings = {"num_stages": 2, "capacity": CAPACITY, "delay": 1, "num_slots": 8, "cost": {"fixed": 3.0}}
    quiet = {"join": {}, "leave": {}}
    first, second = {"steps": [[5], [6]], "validation": [7, 9], "evaluate_after": [0, 2]}, {"steps": [[40] * 60] * 2}
    second |= {"validation": [60] * 2, "evaluate_after": [0, 1]}
    requests = [{"join": {0: first}, "leave": {}}, quiet, quiet, quiet | {"noops": 3}, {"join": {0: second}, "leave": {}}]
    requests += [quiet | {"leave": {0: False}}, *[quiet] * 9]
    answers = list(map(json.loads, serve(map(json.dumps, [settings, *requests]))))
    follower, joined = Follower([], 2, CAPACITY, 1), {0: first, 4: second}
    for k, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        follower.follow((NOOP,) * request.get("noops", 0))
        for job in request["join"]:
            follower.join(job, joined[k]["steps"], 0, joined[k]["validation"], joined[k]["evaluate_after"])
        for job, num_steps in answer["left"].items():
            follower.leave(int(job), request["leave"][int(job)])
            assert num_steps == 1
        before = set(follower.jobs)
        follower.follow(stream_from_json(answer["microbatches"], answer["evaluate"]))
        assert answer["last"] == (not follower.jobs) and set(answer["departed"]) == before - follower.jobs.keys()
    assert answers[2]["last"] and answers[3] == {"last": True, "left": {}, "microbatches": [], "evaluate": [], "departed": []}
    assert sum(len(answer["evaluate"]) for answer in answers[4:]) == 2, "what was due after the step that it left in was to be dropped"
    follower.follow((NOOP,) * 3)
    follower.finish()


def test_what_is_gone_is_not_held():
    planner, rng = WindowPlanner(2, CAPACITY, 8, effort=0, cost=COST, lookahead=24), random.Random(0)
    held = []
    for number in range(120):
        planner.join(number, [[rng.randint(1, CAPACITY)] for _ in range(4)], [rng.randint(1, 9)] * 3, [0, 2, 4])
        if number > 4 and number - 4 in planner.resident:
            planner.leave(number - 4, evaluate=False)
        planner.plan()
        state = planner.evaluations
        held.append(len(state.jobs) + len(state.waited) + len(state.listed) + sum(len(job.ends) for job in state.jobs.values()))
    assert max(held[-40:]) <= max(held[:40])


def test_one_ending_a_slot_leaves_no_room_for_evaluations():
    with pytest.raises(PlanError, match="max_endings is at least 2 then"):
        WindowPlanner(2, CAPACITY, max_endings=1).join(0, [[5]], [5], [1])


def test_evaluations_that_are_due_when_training_has_ended_find_places_beside_those_of_earlier_windows():
    """Nine jobs of one step end at once, where two evaluations may be listed in a slot: no window stands still, the last one neither."""
    planner = WindowPlanner(2, 32, num_slots=8, delay=1, max_endings=4)
    for job in range(9):
        planner.join(job, [[3, 4]], [2, 2], [1])
    evaluated = []
    for _ in range(20):
        if planner.resident:
            evaluated += [segment.job for slot in planner.plan() if slot.evaluate for segment in slot.segments]
    assert not planner.resident and sorted(evaluated) == list(range(9))
