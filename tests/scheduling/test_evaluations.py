"""Planned evaluations: in their ranges, listed in time, packed together, and at little cost; training slots are those planned without."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from scheduling.follow import Follower
from scheduling.pipeline import with_drain
from scheduling.slot_cost import SlotCost
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
