"""Rolling windows: plan the next few slots while the current ones run, from the state after the last window.

A plan looks `lookahead` slots ahead, and its first slots are the next window; the rest is planned
again with the window after it. The pipeline never flushes between windows. Jobs join and leave
between windows. A planner holds the lengths and progress of its resident jobs, which have steps
left to plan, the times of recent slots, and the rest of the last plan if that reached the end of
the run. All windows together form one correct stream. It depends on lengths, joins, leaves and
effort alone, not on the jobs' numbers, so every rank can repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scheduling.backlog import Backlog, Layout, OpenJob, Progress, costs_of, list_backlog, to_stream
from scheduling.job_lengths import JobLengths, read_lengths
from scheduling.numbers import Numbers
from scheduling.planner import plan_backlog
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
    ):
        """Begin a run without jobs; windows have at most `num_slots` slots, in each of which at most `max_endings` steps end.

        `capacity` is the token budget of a microbatch; `delay` and `effort` are as in
        planner.plan_stream.
        """
        self.num_stages = num_stages
        self.capacity = capacity
        self.num_slots = num_slots
        self.gap = num_stages + delay
        self.effort = effort
        self.cost = cost or SlotCost()
        self.lookahead = max(lookahead, num_slots, self.gap + 1)  # beyond the longest gap some step can always be planned
        self.max_endings = max_endings
        self.jobs: dict[int, OpenJob] = {}  # resident: with steps to plan
        self.numbers = Numbers()
        self.first_slot = 0  # of the next window
        self.recent: tuple[float, ...] = ()  # times of the last slots
        self.tail: Stream = ()  # the rest of the last plan, if that reached the end of the run

    @property
    def lengths(self) -> dict[int, JobLengths]:
        """Lengths of the resident jobs, the only ones that the next window can hold."""
        return {number: job.lengths for number, job in self.jobs.items()}

    def join(self, number: int, steps: Sequence[Sequence[int]]) -> None:
        """Add a job with samples of these lengths, [step][sample], from the next window on; one without steps is over at once.

        Raises PlanError where no plan exists, or where the number is another job's until that one's
        last slot has drained.
        """
        self.numbers.check_free(number, self.first_slot, self.jobs)
        lengths = read_lengths(number, steps, self.capacity)
        self.tail = ()  # it does not hold the new job's samples
        if len(lengths):
            self.jobs[number] = OpenJob.of(number, lengths, self.cost)

    def leave(self, number: int) -> None:
        """Remove a resident job from the next window on, after the step that it has begun."""
        job = self.jobs[number]
        num_steps = job.progress.step + bool(job.progress.taken)
        self.jobs[number] = job.cut(num_steps)
        if job.progress.step == num_steps:
            self._remove(number)

    def plan(self) -> Stream:
        """Plan the next window and move every job's progress past it; jobs of which nothing remains to be planned are removed."""
        empty = Backlog(self.num_stages, self.gap, self.capacity, self.max_endings, self.cost, self.recent)
        backlog = list_backlog(self.jobs.values(), empty, self.first_slot, self.lookahead)
        complete = not any(backlog.later_steps)
        known = _known(backlog, self.tail, list(self.jobs)) if complete else None
        layout = plan_backlog(backlog, self.effort, None if complete else self.lookahead, known)
        window = layout[: self.num_slots]
        self.recent = tuple(costs_of(backlog, window)[-2 * self.num_stages :])
        self.tail = to_stream(backlog, layout[self.num_slots :]) if complete else ()
        self._advance(backlog, window)
        return to_stream(backlog, window)

    def plan_all(self, lengths: Lengths) -> Iterator[Stream]:
        """Yield the windows of a run whose jobs have samples of `lengths` [job][step][sample] and do not change."""
        for job, steps in enumerate(lengths):
            self.join(job, steps)
        while self.jobs:
            yield self.plan()

    def _advance(self, backlog: Backlog, window: Layout) -> None:
        """Move every job's progress past a window."""
        slot_of = {item: slot for slot, items in enumerate(window) for item in items}
        for span in backlog.jobs:
            for group in span:
                placed = [item for item in backlog.groups[group] if item in slot_of]
                if not placed:
                    break
                number, step, _ = backlog.keys[placed[0]]
                job = self.jobs[number]
                if len(placed) == len(backlog.groups[group]):
                    progress = Progress(step + 1, (), self.first_slot + max(slot_of[item] for item in placed) + self.gap)
                else:
                    taken = {*job.progress.taken, *(backlog.keys[item][2] for item in placed)}
                    progress = Progress(step, tuple(sorted(taken)))
                self.jobs[number] = replace(job, progress=progress)
        self.first_slot += len(window)
        self.numbers.forget_before(self.first_slot)
        for number in [number for number, job in self.jobs.items() if job.progress.step == len(job.lengths)]:
            self._remove(number)

    def _remove(self, number: int) -> None:
        self.numbers.release(number, self.jobs.pop(number).progress.ready)


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
