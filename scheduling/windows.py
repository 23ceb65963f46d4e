"""Rolling windows: plan the next few slots while the current ones run, from the state after the last window.

A plan looks `lookahead` slots ahead, and its first slots are the next window; the rest is planned
again with the window after it. The pipeline never flushes between windows. Jobs join and leave
between windows. A planner holds the lengths and progress of its resident jobs, which have steps
or evaluations left to plan, the times of recent slots, and the rest of the last plan if that
reached the end of the run. All windows together form one correct stream. It depends on lengths,
joins, leaves, priorities and effort alone, not on the jobs' numbers, so every rank can repeat it.

Steps are planned as if there were no evaluations, whose slots are then placed between the others
(evaluations.py). Slots are counted by index, among those that have a backward.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from scheduling.accounting import usage
from scheduling.backlog import Backlog, Layout, OpenJob, Progress, costs_of, last_slots, list_backlog, to_stream
from scheduling.evaluation_slots import TrainingWindow
from scheduling.evaluations import Evaluations
from scheduling.job_lengths import JobLengths, read_lengths
from scheduling.numbers import Numbers
from scheduling.planner import plan_backlog
from scheduling.shares import ahead_after
from scheduling.slot_cost import SlotCost
from scheduling.types import MAX_ENDINGS, Lengths, Stream

WINDOW_SLOTS = 32
LOOKAHEAD_SLOTS = 128


class WindowPlanner:
    """Plans a run window by window."""

    def __init__(
        self,
        num_stages: int,
        capacity: int,
        num_slots: int = WINDOW_SLOTS,
        delay: int = 0,
        effort: int = 1,
        cost: SlotCost | None = None,
        lookahead: int = LOOKAHEAD_SLOTS,
        max_endings: int = MAX_ENDINGS,
        window_time: float | None = None,
    ):
        """Begin a run without jobs; windows have at most `num_slots` slots, in each of which at most `max_endings` steps and
        evaluations end.

        `capacity` is the token budget of a microbatch; `delay` and `effort` are as in
        planner.plan_stream. A window of several slots takes at most `window_time`, in the unit of accounting.py.
        """
        self.num_stages = num_stages
        self.capacity = capacity
        self.num_slots = num_slots
        self.gap = num_stages + delay
        self.effort = effort
        self.cost = cost or SlotCost()
        self.lookahead = max(lookahead, num_slots, self.gap + 2)  # beyond the longest gap some step can always be planned
        self.max_endings = max_endings
        self.window_time = math.inf if window_time is None else window_time
        self.jobs: dict[int, OpenJob] = {}  # with steps to plan
        self.mismatched: set[int] = set()  # numbers of those whose steps begin an index later (mismatched.py)
        self.evaluations = Evaluations(num_stages, self.gap, capacity, max_endings, self.cost)
        self.numbers = Numbers()
        self.first_slot = 0  # of the next window, by index
        self.recent: tuple[float, ...] = ()  # times of the last slots
        self.tail: Stream = ()  # the rest of the last plan, if that reached the end of the run

    @property
    def resident(self) -> set[int]:
        """Numbers of the jobs that have steps or evaluations left to plan."""
        return self.jobs.keys() | self.evaluations.jobs.keys()

    @property
    def lengths(self) -> dict[int, JobLengths]:
        """Lengths of the jobs that have steps left to plan, the only ones that the next window can train."""
        return {number: job.lengths for number, job in self.jobs.items()}

    def join(
        self,
        number: int,
        steps: Sequence[Sequence[int]],
        validation: Sequence[int] = (),
        evaluate_after: Sequence[int] = (),
        priority: float = 1.0,
        mismatched: bool = False,
    ) -> None:
        """Add a job with samples of these lengths, [step][sample], from the next window on; one without steps is over at once.

        Its `validation` samples are evaluated after each of these numbers of steps, ascending; 0: before its first step. Its
        `priority` is its share of device time among the jobs that could use a slot (shares.py). With `mismatched`, slots of its own
        are to stand in front of each step. Raises PlanError where no plan exists, or where the number is another job's until that
        one's last slot has drained.
        """
        self.numbers.check_free(number, self.first_slot, self.resident)
        lengths = read_lengths(number, steps, self.capacity)
        self.evaluations.join(number, len(lengths), validation, evaluate_after)
        self.tail = ()  # it does not hold the new job's samples
        if len(lengths) and mismatched:
            self.mismatched.add(number)
        if len(lengths):
            self.jobs[number] = OpenJob.of(number, lengths, self.cost, priority, late=self.first_slot > 0)

    def leave(self, number: int, evaluate: bool = True) -> int:
        """Remove a resident job from the next window on, after the step that it has begun and the evaluations that are due by then.

        Without `evaluate`, only an evaluation that has begun is completed. Returns the number of steps after which the job ends.
        """
        job = self.jobs.get(number)
        if job is None:
            num_steps = self.evaluations.jobs[number].num_steps
            self.evaluations.leave(number, num_steps, evaluate)
            return num_steps
        num_steps = job.progress.step + bool(job.progress.taken)
        self.evaluations.leave(number, num_steps, evaluate)
        self.jobs[number] = job.cut(num_steps)
        if job.progress.step == num_steps:
            self._remove(number)
        return num_steps

    def idle(self, num_noops: int) -> None:
        """Count the no-op slots that have drained the pipeline after the last window, if there were any."""
        self.first_slot += num_noops
        if num_noops:
            self.recent = ()

    def set_priority(self, number: int, priority: float) -> None:
        """Change a resident job's priority from the next window on."""
        job = self.jobs[number]
        if priority != job.priority:
            self.jobs[number] = replace(job, priority=priority, ahead=job.ahead * job.priority / priority)  # by the same device time
            self.tail = ()  # it was planned for other shares

    def plan(self) -> Stream:
        """Plan the next window and move every job's progress past it; jobs of which nothing remains to be planned are removed."""
        max_endings = self.evaluations.step_endings(self.first_slot)
        empty = Backlog(self.num_stages, self.gap + bool(self.mismatched), self.capacity, max_endings, self.cost, self.recent)
        backlog = list_backlog(self.jobs.values(), empty, self.first_slot, self.lookahead)
        complete = not any(backlog.later_steps)
        known = _known(backlog, self.tail, list(self.jobs)) if complete else None
        layout = plan_backlog(backlog, self.effort, None if complete else self.lookahead, known)
        window = layout[: self._window_slots([2 * cost for cost in costs_of(backlog, layout)[len(self.recent) :]])]
        stream = to_stream(backlog, window)
        if self.evaluations.jobs:
            is_last = complete and len(window) == len(layout)
            training = TrainingWindow(
                stream, costs_of(backlog, layout), len(self.recent), self.first_slot, self._ends(backlog, window), is_last
            )
            stream, listed_at = self.evaluations.insert(training, self.num_slots, len)
            for number, index in listed_at.items():
                self.numbers.release(number, index + self.gap)
            num_indices = sum(not microbatch.evaluate for microbatch in stream)
            window = [*window, *[[]] * num_indices][:num_indices]
        self.recent = tuple(costs_of(backlog, window)[-2 * self.num_stages :])
        self.tail = to_stream(backlog, layout[len(window) :]) if complete else ()
        used = usage(to_stream(backlog, window), self.lengths, self.cost)
        self._advance(backlog, window, {number: each.time / 2 for number, each in used.items()})
        return stream

    def plan_all(self, lengths: Lengths) -> Iterator[Stream]:
        """Yield the windows of a run whose jobs have samples of `lengths` [job][step][sample] and do not change."""
        for job, steps in enumerate(lengths):
            self.join(job, steps)
        while self.resident:
            yield self.plan()

    def _window_slots(self, times: Sequence[float]) -> int:
        """Return how many of the next slots, of these times, forward and backward together, a window has: at least one."""
        ends = list(itertools.accumulate(times[: self.num_slots]))
        return max(1, bisect.bisect_right(ends, self.window_time))

    def _ends(self, backlog: Backlog, window: Layout) -> dict[int, dict[int, int]]:
        """Return [job][step] -> the index at which a step ends, of those that end in a window."""
        ends: dict[int, dict[int, int]] = {}
        for group, slot in zip(backlog.groups, last_slots(backlog, window), strict=True):
            if slot >= 0:
                number, step, _ = backlog.keys[group[0]]
                ends.setdefault(number, {})[step] = self.first_slot + slot
        return ends

    def _advance(self, backlog: Backlog, window: Layout, used: Mapping[int, float]) -> None:
        """Move every job's progress and share past a window in which jobs `used` device time, in SlotCost's unit."""
        slot_of = {item: slot for slot, items in enumerate(window) for item in items}
        for span in backlog.jobs:
            for group in span:
                placed = [item for item in backlog.groups[group] if item in slot_of]
                if not placed:
                    break
                number, step, _ = backlog.keys[placed[0]]
                job = self.jobs[number]
                if len(placed) == len(backlog.groups[group]):
                    progress = Progress(
                        step + 1, (), self.first_slot + max(slot_of[item] for item in placed) + self.gap + (number in self.mismatched)
                    )
                else:
                    taken = {*job.progress.taken, *(backlog.keys[item][2] for item in placed)}
                    progress = Progress(step, tuple(sorted(taken)))
                self.jobs[number] = replace(job, progress=progress)
        self.first_slot += len(window)
        for number, ahead in ahead_after(self.jobs, used, self.first_slot).items():
            self.jobs[number] = replace(self.jobs[number], ahead=ahead)
        self.numbers.forget_before(self.first_slot)
        for number in [number for number, job in self.jobs.items() if job.progress.step == len(job.lengths)]:
            self._remove(number)

    def _remove(self, number: int) -> None:
        ready = self.jobs.pop(number).progress.ready
        if number in self.mismatched:
            self.mismatched.remove(number)
            ready = max(0, ready - 1)
        self.numbers.release(number, ready + 1 if ready else 0)


def _known(backlog: Backlog, tail: Stream, joined: list[int]) -> Layout | None:
    """Return the rest of the last plan as a layout if it holds exactly the remaining samples: no job has joined or left since.

    The items of a slot are in the order in which their jobs have `joined`, so that the jobs'
    numbers decide nothing.
    """
    item_of = {key: item for item, key in enumerate(backlog.keys)}
    order = {number: k for k, number in enumerate(joined)}
    in_order = [sorted(microbatch.segments, key=lambda segment: order.get(segment.job, -1)) for microbatch in tail]
    keys = [[(s.job, s.step, sample) for s in segments for sample in s.samples] for segments in in_order]
    if sum(map(len, keys)) != len(item_of) or any(key not in item_of for slot in keys for key in slot):
        return None
    return [[item_of[key] for key in slot] for slot in keys]
