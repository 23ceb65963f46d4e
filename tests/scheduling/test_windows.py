"""Jobs come and go at the borders of windows: one correct stream, numbers used again, and nothing held of those that are gone."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.backlog import list_backlog
from scheduling.follow import Follower
from scheduling.pipeline import with_drain
from scheduling.plan_json import stream_from_json, stream_to_json
from scheduling.serve import serve
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch, PlanError, Segment
from scheduling.validate import replay
from scheduling.windows import WindowPlanner

CAPACITY, COST = 64, SlotCost(per_square=1e-3, fixed=2.0)
STEPS = st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=4), min_size=1, max_size=3)
STAGES, DELAY = st.integers(1, 4), st.integers(0, 1)


def attempt(joining, *arguments) -> bool:
    """Join, unless the number is refused; returns whether it was taken."""
    try:
        joining(*arguments)
    except PlanError as refused:
        assert "cannot join as number" in str(refused)
        return False
    return True


@given(st.lists(STEPS, min_size=1, max_size=8), STAGES, DELAY, st.integers(1, 6), st.integers(1, 3), st.data())
def test_jobs_come_and_go_under_numbers_that_are_used_again(waiting, num_stages, delay, num_slots, max_endings, data):
    """At every border some jobs leave and others try to join as numbers 0 to 2: the follower agrees, and the whole replays."""
    planner = WindowPlanner(num_stages, CAPACITY, num_slots, delay, 1, COST, max_endings=max_endings)
    follower = Follower([], num_stages, CAPACITY, delay, max_endings=max_endings)
    joins: dict[int, dict[int, list]] = {}
    stream, last_use, new_numbers = (), {}, itertools.count(3)
    while waiting or planner.jobs:
        at = len(stream)
        for number in [*data.draw(st.lists(st.integers(0, 2), unique=True)), *([] if planner.jobs else [next(new_numbers)])]:
            free = number not in planner.jobs and at > last_use.get(number, -99) + num_stages + delay
            if not waiting:
                continue
            assert attempt(planner.join, number, waiting[-1]) == free == attempt(follower.join, number, waiting[-1])
            if free:
                joins.setdefault(at, {})[number] = waiting.pop()
        for number in data.draw(st.lists(st.sampled_from(sorted(planner.jobs)), unique=True, max_size=1)) if planner.jobs else ():
            progress = planner.jobs[number].progress
            joined = max(slot for slot, jobs in joins.items() if number in jobs)
            joins[joined][number] = joins[joined][number][: progress.step + bool(progress.taken)]
            planner.leave(number)
            follower.leave(number)
        window = planner.plan()
        follower.follow(window)
        assert planner.jobs.keys() == follower.jobs.keys()
        last_use |= {segment.job: at + slot for slot, microbatch in enumerate(window) for segment in microbatch.segments}
        stream += window
    follower.finish()
    replay(stream, [], num_stages, CAPACITY, delay, max_endings=max_endings, joins=joins)


@pytest.mark.parametrize(("first", "allowed"), [(3, False), (4, False), (5, True)])
def test_a_number_is_free_when_its_last_slot_has_drained(first, allowed):
    """A job ends in slot 1; with two stages and a delay of one slot its STEP stands before slot 4."""
    old, new = Segment(0, 0, (0,), 5), Segment(0, 0, (0,), 7)
    stream = (Microbatch(), Microbatch((old,)), *[Microbatch()] * (first - 2), Microbatch((new,)))
    follower = Follower([[[5]]], 2, 8, 1)
    follower.follow(stream[:first])
    assert attempt(follower.join, 0, [[7]]) == allowed
    if allowed:
        follower.follow(stream[first:])
        follower.finish()
        replay(stream, [[[5]]], 2, 8, 1, joins={first: {0: [[7]]}})
    else:
        with pytest.raises(PlanError, match="its number is another's already|planned for"):
            replay(stream, [[[5]]], 2, 8, 1, joins={first: {0: [[7]]}})


def test_what_was_planned_of_a_number_is_not_what_another_job_needs():
    """Job 1 leaves before its first slot, which it would have shared; who takes its number does not fit there."""
    planner = WindowPlanner(1, CAPACITY, 1, cost=COST)
    planner.join(0, [[60], [10], [10]])
    planner.join(1, [[40]])
    first = planner.plan()
    assert [segment.job for segment in first[0].segments] == [0] and planner.tail
    planner.leave(1)
    planner.join(1, [[60]])
    stream = first + planner.plan() + planner.plan() + planner.plan()
    replay(stream, [[[60], [10], [10]], [[60]]], 1, CAPACITY)


def test_joins_that_cannot_be_are_named():
    planner = WindowPlanner(2, 8)
    planner.join(0, [[5], [5]])
    for number, message in ((0, "number 0: it is resident"), (-1, "number -1: numbers begin at 0")):
        with pytest.raises(PlanError, match=message):
            planner.join(number, [[5]])
    with pytest.raises(PlanError, match="job 4 step 0 sample 1 has 9 tokens"):
        planner.join(4, [[1, 9]])
    with pytest.raises(PlanError, match="job 3, which is to leave, is not resident"):
        Follower([[[5]]], 2, 8).leave(3)
    with pytest.raises(PlanError, match="job 6 joins after the end of the stream"):
        replay((Microbatch((Segment(0, 0, (0,), 5),)),), [[[5]]], 2, 8, joins={9: {6: [[5]]}})
    with pytest.raises(PlanError, match="slot 0: there is no job 2"):
        replay((Microbatch((Segment(2, 0, (0,), 5),)),), [[[5]]], 2, 8, joins={1: {6: [[5]]}})


@given(st.lists(STEPS, min_size=2, max_size=6), STAGES, DELAY, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_plans_do_not_depend_on_numbers(jobs, num_stages, delay, num_slots, rng):
    """Half of the jobs join later, one leaves; jobs of equal lengths are in it too."""
    jobs = [*jobs, *jobs[:2]]
    joining = [rng.randrange(3) if k % 2 else 0 for k in range(len(jobs))]
    leaver, when = rng.randrange(len(jobs)), rng.randrange(1, 4)

    def planned(numbers: list[int]) -> list:
        planner, named = WindowPlanner(num_stages, CAPACITY, num_slots, delay, 1, COST), []
        content = {number: job for job, number in enumerate(numbers)}
        for window in itertools.count():
            for job in range(len(jobs)):
                if joining[job] == window:
                    planner.join(numbers[job], jobs[job])
            if window == when and numbers[leaver] in planner.jobs:
                planner.leave(numbers[leaver])
            if window >= 4 and not planner.jobs:
                return named
            for microbatch in planner.plan():
                named.append(sorted((jobs[content[s.job]], s.step, s.samples) for s in microbatch.segments))

    numbers = list(range(len(jobs)))
    assert planned(numbers) == planned([7 + 3 * k for k in rng.sample(numbers, len(numbers))])


def test_the_number_of_endings_of_a_slot_is_kept_small_at_little_cost():
    """Forty jobs of one short sample a step, ten of which would fit a slot."""
    jobs = [[[6]] * 6 for _ in range(40)]
    slots = {}
    for max_endings in (2, 5, 32):
        planner, stream = WindowPlanner(2, CAPACITY, 16, cost=COST, max_endings=max_endings), ()
        for number, steps in enumerate(jobs):
            planner.join(number, steps)
        while planner.jobs:
            stream += planner.plan()
        replay(stream, jobs, 2, CAPACITY, max_endings=max_endings)
        with pytest.raises(PlanError, match=f"steps end in it, more than max_endings = {max_endings - 1}" if max_endings < 32 else "= 1"):
            replay(stream, jobs, 2, CAPACITY, max_endings=max_endings - 1 if max_endings < 32 else 1)
        follower = Follower(jobs, 2, CAPACITY, max_endings=1)
        with pytest.raises(PlanError, match="more than max_endings = 1"):
            follower.follow(stream)
        slots[max_endings] = len(stream)
    assert slots[2] == 240 / 2 and slots[5] <= 240 / 5 + 3 and slots[32] < slots[5]


def drawn(rng: random.Random) -> list[list[int]]:
    """A job of four steps of three samples."""
    return [[rng.randint(1, CAPACITY) for _ in range(3)] for _ in range(4)]


def objects(*roots: object) -> int:
    """Count what is reachable from some objects, arrays by their elements, code and modules left out."""
    seen, waiting, total = set(), list(roots), 0
    while waiting:
        held = waiting.pop()
        if id(held) in seen or isinstance(held, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType):
            continue
        seen.add(id(held))
        total += held.size if isinstance(held, np.ndarray) else len(held) if isinstance(held, bytes) else 1
        waiting += gc.get_referents(held)
    return total


@pytest.mark.parametrize("again", [True, False])
def test_a_window_costs_and_holds_what_its_resident_jobs_do_however_many_are_gone(again, monkeypatch):
    """150 jobs, 6 at a time, under new numbers or used ones: the last windows list as much and hold as much as the first."""
    listed = []
    monkeypatch.setattr("scheduling.windows.list_backlog", lambda *a: listed.append(list_backlog(*a)) or listed[-1])
    planner, follower = WindowPlanner(2, CAPACITY, 8, effort=0, cost=COST, lookahead=24), Follower([], 2, CAPACITY)
    rng, joined, work, held, numbers = random.Random(0), 0, [], [], set()
    while joined < 150:
        while len(planner.jobs) < 6:
            number = next(n for n in itertools.count() if planner.numbers.is_free(n, planner.first_slot, planner.jobs)) if again else joined
            steps, joined = drawn(rng), joined + 1
            planner.join(number, steps)
            follower.join(number, steps)
            numbers.add(number)
        follower.follow(planner.plan())
        backlog = listed.pop()
        work.append(len(backlog.tokens) + len(backlog.groups) + len(backlog.jobs))
        held.append(objects(planner, follower))
    third = len(work) // 3
    assert third > 10 and len(numbers) <= (18 if again else 150)
    assert max(work[-third:]) <= 1.1 * max(work[:third]), (work[:third], work[-third:])
    assert max(held[-third:]) <= 1.1 * max(held[:third]), (held[:third], held[-third:])


def test_a_served_run_is_the_planners_in_every_process():
    """Joins, a leave and one that comes too late, under two hash seeds."""
    rng = random.Random(1)
    settings = {"num_stages": 3, "capacity": CAPACITY, "delay": 1, "num_slots": 5, "max_endings": 2, "cost": {"fixed": 3.0}}
    jobs = {number: drawn(rng) for number in range(4)}
    joins = [{0: {"steps": jobs[0]}, 2: {"steps": jobs[2]}}, {3: {"steps": jobs[3]}}, {1: {"steps": jobs[1]}}]
    requests = [{"join": joins[0], "leave": {}}, {"join": joins[1], "leave": {2: True}}]
    requests += [{"join": joins[2], "leave": {}}, *[{"join": {}, "leave": {2: True}}] * 30]
    lines = list(map(json.dumps, [settings, *requests]))
    answers = list(map(json.loads, serve(lines)))
    assert [list(answer["left"]) for answer in answers[:3]] == [[], ["2"], []] and answers[-1]["last"]
    ended_after = answers[1]["left"]["2"]
    planner = WindowPlanner(3, CAPACITY, 5, 1, cost=SlotCost(fixed=3.0), max_endings=2)
    for request, answer in zip(requests, answers, strict=False):
        for number, plan in request["join"].items():
            planner.join(number, **plan)
        for number in answer["left"]:
            planner.leave(int(number))
        lengths = planner.lengths
        assert stream_to_json(planner.plan(), lengths) == answer["microbatches"]
    stream = sum((stream_from_json(answer["microbatches"]) for answer in answers), ())
    steps = {(segment.job, segment.step) for microbatch in stream for segment in microbatch.segments}
    ran = {number: [batch for step, batch in enumerate(job) if (number, step) in steps] for number, job in jobs.items()}
    assert len(ran[2]) == ended_after < len(jobs[2]) and all(ran[number] == jobs[number] for number in (0, 1, 3))
    joins = {0: {0: ran[0], 2: ran[2]}, 5: {3: ran[3]}, 10: {1: ran[1]}}
    replay(with_drain(stream, 3, 1), [], 3, CAPACITY, 1, max_endings=2, joins=joins)
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "scheduling.serve"]
        text = "".join(line + "\n" for line in lines)
        out = subprocess.run(command, input=text, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert list(map(json.loads, out.stdout.splitlines())) == answers
