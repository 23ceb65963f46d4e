"""Priorities: shares of device time that break no rule of a plan; windows bounded in time; what each job used."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.accounting import Usage, usage
from scheduling.backlog import Backlog, OpenJob, costs_of, list_backlog
from scheduling.data_parallel import deal
from scheduling.follow import Follower
from scheduling.job_lengths import read_all
from scheduling.planner import plan_backlog
from scheduling.serve import serve
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import NOOP, Microbatch, Segment
from scheduling.validate import replay
from scheduling.windows import WindowPlanner
from scripts.bench import plan_shares

CAPACITY, COST = 64, SlotCost(per_square=1e-3, fixed=2.0)
STEPS = st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=4), min_size=1, max_size=3)
STAGES, DELAY = st.integers(1, 4), st.integers(0, 1)
PRIORITY = st.sampled_from([0.1, 0.5, 1.0, 3.0, 40.0])


def run_of(planner: WindowPlanner, jobs: list, priorities: list[float], num_windows: int = 10**6) -> list[dict[int, float]]:
    """Join jobs and plan windows, each checked; returns the device time of each job in each."""
    follower, times = Follower(jobs, planner.num_stages, CAPACITY, planner.gap - planner.num_stages), []
    for number, steps in enumerate(jobs):
        planner.join(number, steps, priority=priorities[number])
    while planner.jobs and len(times) < num_windows:
        window = planner.plan()
        follower.follow(window)
        times.append({number: of.time for number, of in usage(window, jobs, COST).items()})
    return times


@given(st.lists(STEPS, min_size=1, max_size=8), STAGES, DELAY, st.integers(1, 6), st.data())
@settings(max_examples=25)
def test_jobs_of_any_priorities_come_and_go_and_change_them(waiting, num_stages, delay, num_slots, data):
    """One correct stream, and no job far from its share: at most its longest step behind and two ahead."""
    planner, follower = WindowPlanner(num_stages, CAPACITY, num_slots, delay, 1, COST), Follower([], num_stages, CAPACITY, delay)
    number = itertools.count()
    while waiting or planner.jobs:
        for _ in range(max(not planner.jobs, data.draw(st.integers(0, 3)))):
            if waiting:
                joining, steps = next(number), waiting.pop()
                planner.join(joining, steps, priority=data.draw(PRIORITY))
                follower.join(joining, steps)
        for changed in data.draw(st.lists(st.sampled_from(sorted(planner.jobs)), max_size=2)):
            planner.set_priority(changed, data.draw(PRIORITY))
        if data.draw(st.booleans()) and len(planner.jobs) > 1:
            leaver = data.draw(st.sampled_from(sorted(planner.jobs)))
            planner.leave(leaver)
            follower.leave(leaver)
        follower.follow(planner.plan())
        assert planner.jobs.keys() == follower.jobs.keys()
        for job in planner.jobs.values():
            step = float(max(job.times[1:] - job.times[:-1])) * (1 + 1e-9)
            assert -step <= job.ahead * job.priority <= 2 * step
    follower.finish()


@given(st.lists(STEPS, min_size=1, max_size=8), STAGES, DELAY, st.data())
def test_shares_add_no_noops_and_hardly_any_time(workload, num_stages, delay, data):
    """Against the same samples under equal priorities, before the search."""
    priorities = data.draw(st.lists(PRIORITY, min_size=len(workload), max_size=len(workload)))
    found = []
    for priority in (priorities, [1.0] * len(workload)):
        jobs = [OpenJob.of(k, steps, COST, priority[k]) for k, steps in enumerate(read_all(workload, CAPACITY))]
        backlog = list_backlog(jobs, Backlog(num_stages, num_stages + delay, CAPACITY, 32, COST))
        layout = plan_backlog(backlog, effort=0)
        found.append((layout.count([]), makespan(costs_of(backlog, layout), num_stages)))
    assert found[0][0] <= found[1][0] and found[0][1] <= found[1][1] * 1.0101


@given(st.lists(STEPS, min_size=1, max_size=6), STAGES, st.integers(1, 6), PRIORITY)
@settings(max_examples=20)
def test_equal_priorities_are_none(workload, num_stages, num_slots, priority):
    plans = []
    for each in (1.0, priority):
        planner = WindowPlanner(num_stages, CAPACITY, num_slots, 0, 1, COST, lookahead=10)
        for number, steps in enumerate(workload):
            planner.join(number, steps, priority=each)
        plans.append([])
        while planner.jobs:
            plans[-1].append(planner.plan())
            assert not any(job.ahead for job in planner.jobs.values())
    assert plans[0] == plans[1]


@given(st.lists(STEPS, min_size=2, max_size=6), STAGES, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_shares_do_not_depend_on_numbers(workload, num_stages, num_slots, rng):
    """Two jobs of equal lengths have different priorities."""
    workload = [*workload, workload[0]]
    priorities = [1.0 + k for k in range(len(workload))]

    def planned(numbers: list[int]) -> list:
        planner, named = WindowPlanner(num_stages, CAPACITY, num_slots, 0, 1, COST, lookahead=10), []
        for number, steps, priority in zip(numbers, workload, priorities, strict=True):
            planner.join(number, steps, priority=priority)
        while planner.jobs:
            named += [sorted((numbers.index(s.job), s.step, s.samples) for s in microbatch.segments) for microbatch in planner.plan()]
        return named

    numbers = list(range(len(workload)))
    assert planned(numbers) == planned(rng.sample(numbers, len(numbers)))


@pytest.mark.parametrize(("num_stages", "delay", "distribution"), [(1, 1, "lognormal"), (2, 0, "two lengths"), (4, 0, "normal")])
def test_two_groups_get_two_to_one_at_no_cost(monkeypatch, num_stages, delay, distribution):
    """A sample of scripts/bench/plan_shares.py."""
    for name, value in {"SLOTS": 16, "SAMPLES": 8, "CAPACITY": 4096}.items():
        monkeypatch.setattr(plan_shares, name, value)
    figures = plan_shares.measure(num_stages, delay, distribution, num_windows=50, span=45, effort=0)
    assert 1.95 <= figures["ratio"]["least"] <= figures["ratio"]["most"] <= 2.05, figures
    assert figures["tokens_per_s"] >= 0.98 and figures["noops"]["shared"] <= figures["noops"]["equal"], figures


def backlogged(num_jobs: int, num_steps: int = 200) -> list[list[list[int]]]:
    """Draw jobs of steps that take about two slots."""
    rng = random.Random(num_jobs)
    return [[[rng.randint(4, 30) for _ in range(8)] for _ in range(num_steps)] for _ in range(num_jobs)]


def test_a_changed_priority_takes_effect_in_the_next_window():
    jobs = backlogged(8)
    planner = WindowPlanner(2, CAPACITY, 32, effort=0, cost=COST)
    for number, steps in enumerate(jobs):
        planner.join(number, steps, priority=3.0 if number < 4 else 1.0)

    def ratio() -> float:
        used = usage(planner.plan(), jobs, COST)
        return sum(used[k].time for k in range(4) if k in used) / sum(used[k].time for k in range(4, 8) if k in used)

    before = [ratio() for _ in range(4)]
    for number in range(8):
        planner.set_priority(number, 1.0 if number < 4 else 3.0)
    after = [ratio() for _ in range(4)]
    assert min(before) > 1.8 and max(after) < 1 / 1.8, (before, after)


def test_what_a_job_could_not_use_is_not_owed_to_it():
    """A job that its gaps hold below its share for long is soon where its new priority puts it."""
    jobs = backlogged(12)
    planner = WindowPlanner(4, CAPACITY, 16, effort=0, cost=COST)
    held = run_of(planner, jobs, [100.0] + [1.0] * 11, num_windows=12)
    assert sum(each[0] for each in held) < 0.6 * sum(sum(each.values()) for each in held)  # it is always first, and 0.9 is its share
    planner.set_priority(0, 0.01)
    later = [usage(planner.plan(), jobs, COST).get(0, Usage()).time for _ in range(6)]
    assert sum(later[1:]) < 0.2 * sum(each[0] for each in held[:5])


def test_no_job_starves_or_floods():
    """One of little priority has its share, of 0.2 in 8.2, and one that joins late has its own from then on, not more."""
    jobs = backlogged(10)
    planner = WindowPlanner(2, CAPACITY, 32, effort=0, cost=COST)
    times = run_of(planner, jobs[:9], [0.2] + [1.0] * 8, num_windows=12)
    step = 2 * sum(map(COST.sample, jobs[0][0]))
    total = sum(sum(each.values()) for each in times)
    assert sum(each.get(0, 0.0) for each in times) == pytest.approx(0.2 / 8.2 * total, abs=2 * step)
    planner.join(9, jobs[9], priority=2.0)
    used = [usage(planner.plan(), jobs, COST) for _ in range(4)]
    total = sum(of.time for each in used for of in each.values())
    assert used[0][9].time > 0 and sum(each[9].time for each in used) == pytest.approx(2.0 / 10.2 * total, abs=2 * step)


@given(st.lists(STEPS, min_size=1, max_size=6), STAGES, st.sampled_from([1.0, 150.0, 400.0, 1e9]))
@settings(max_examples=20)
def test_windows_are_bounded_in_time(workload, num_stages, window_time):
    planner, stream = WindowPlanner(num_stages, CAPACITY, 8, 0, 1, COST, window_time=window_time), ()
    for number, steps in enumerate(workload):
        planner.join(number, steps)
    while planner.jobs:
        window = planner.plan()
        assert 1 <= len(window) <= 8 and (len(window) == 1 or 2 * sum(slot_times(window, workload, COST)) <= window_time)
        stream += window
    replay(stream, workload, num_stages, CAPACITY)
    if window_time == 1e9:
        assert stream == sum(WindowPlanner(num_stages, CAPACITY, 8, cost=COST).plan_all(workload), ())


def test_a_slots_time_is_divided_by_its_samples_time():
    cost = SlotCost(per_square=0.01, fixed=30.0, per_segment=6.0)
    lengths, validation = [[[10, 20]], [[20]]], {1: [40, 10]}
    mixed = Microbatch((Segment(0, 0, (0, 1), 30), Segment(1, 0, (0,), 20)))
    checked = Microbatch((Segment(1, 1, (0,), 40),), evaluate=True)
    first, second, whole = 10 + 1 + 20 + 4, 20 + 4, (31 + 4) + (20 + 4) + 36
    found = usage((mixed, NOOP, checked), lengths, cost, validation)
    assert found[0] == Usage(30, 1, pytest.approx(2 * whole * first / (first + second)))
    assert found[1] == Usage(60, 2, pytest.approx(2 * whole * second / (first + second) + 40 + 16 + 30))
    assert found[0].time + found[1].time == pytest.approx(2 * sum(slot_times((mixed,), lengths, cost)) + 86)


def test_replicas_may_hold_none_of_a_jobs_samples():
    dealt = deal([[[8, 5, 3]], [[4]]], 2, COST)
    slot = Microbatch((Segment(0, 0, (0, 1), 11), Segment(1, 0, (0,), 4)))
    lengths = {number: job.lengths for number, job in dealt.jobs.items()}
    parts = [usage((dealt.part(slot, replica),), lengths, COST) for replica in (0, 1)]
    assert sum(part.get(1, Usage()).tokens for part in parts) == 4 and sum(part[0].tokens for part in parts) == 16
    assert sorted(map(len, parts)) == [1, 2]


def test_served_priorities_are_the_planners():
    jobs = backlogged(6, 12)
    run = {"num_stages": 2, "capacity": CAPACITY, "num_slots": 8, "effort": 0, "window_time": 900.0, "cost": {"fixed": 2.0}}
    joining = {number: {"steps": steps} for number, steps in enumerate(jobs)}
    requests = [{"join": {} if window else joining, "leave": {}} for window in range(40)]
    requests[2]["priorities"] = {3: 5.0, 99: 2.0}
    answers = list(map(json.loads, serve(map(json.dumps, [run, *requests]))))
    planner, windows = WindowPlanner(2, CAPACITY, 8, effort=0, cost=SlotCost(fixed=2.0), window_time=900.0), []
    for number, steps in enumerate(jobs):
        planner.join(number, steps)
    while planner.jobs:
        if len(windows) == 2:
            planner.set_priority(3, 5.0)
        windows.append(planner.plan())
    slots = [[[s.job for s in microbatch.segments for _ in s.samples] for microbatch in window] for window in windows]
    served = [[[entry[0] for entry in slot] for slot in answer["microbatches"]] for answer in answers]
    assert served[: len(slots)] == slots and not any(served[len(slots) :])
    ends = [max(k for k, window in enumerate(windows) for slot in window for s in slot.segments if s.job == job) for job in range(6)]
    assert ends[3] == min(ends)
