"""Rolling windows: plan the next few slots while the current ones run, from the state after the last window.

A window is planned together with everything up to `lookahead` slots ahead, but only its own slots are committed; the pipeline never
flushes between windows. A Carry holds what a window must know of the past: the progress of each job, the recent slot times, and the
tail of the plan that it was cut from. To add a job, append it to `lengths`; to remove one, cut its steps after the one that it has
begun. The next window uses the new lengths. A plan depends on lengths, carry and effort alone: every rank can repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scheduling.backlog import Backlog, Layout, Progress, check_workload, costs_of, open_backlog, to_stream
from scheduling.planner import plan_backlog
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, PlanError, Stream

WINDOW_SLOTS = 32
LOOKAHEAD_SLOTS = 128


@dataclass(frozen=True, slots=True)
class Carry:
    """The state from one window to the next; Carry() is the start of a run."""

    progress: tuple[Progress, ...] = ()
    recent: tuple[float, ...] = ()  # times of the last slots
    tail: Stream = ()  # the rest of the last plan, where it reached the end of the run

    def is_done(self, lengths: Lengths) -> bool:
        """Whether every step of every job is planned."""
        return len(self.progress) == len(lengths) and all(
            progress.step >= len(steps) for progress, steps in zip(self.progress, lengths, strict=True)
        )


def plan_window(
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    carry: Carry | None = None,
    num_slots: int = WINDOW_SLOTS,
    delay: int = 0,
    effort: int = 1,
    cost: SlotCost | None = None,
    lookahead: int = LOOKAHEAD_SLOTS,
) -> tuple[Stream, Carry]:
    """Plan the next window of at most `num_slots` slots; returns it with what the next one needs.

    `lengths` holds all jobs that were ever admitted, so that their numbers do not change; all windows together form one correct stream.
    Raises PlanError where no plan exists or a job was cut inside its begun step.
    """
    carry, cost = carry or Carry(), cost or SlotCost()
    check_workload(lengths, capacity)
    _check_progress(lengths, carry)
    lookahead = max(lookahead, num_slots, num_stages + delay + 1)  # beyond the longest gap some step can always be planned
    backlog = open_backlog(lengths, num_stages, capacity, delay, cost, carry.progress, carry.recent, lookahead)
    complete = not any(backlog.later_steps)
    layout = plan_backlog(backlog, effort, None if complete else lookahead, _known(backlog, carry.tail) if complete else None)
    window = layout[:num_slots]
    recent = tuple(costs_of(backlog, window)[-2 * num_stages :])
    tail = to_stream(backlog, layout[num_slots:]) if complete else ()
    return to_stream(backlog, window), Carry(_advance(backlog, carry, len(lengths), window), recent, tail)


def plan_windows(
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    num_slots: int = WINDOW_SLOTS,
    delay: int = 0,
    effort: int = 1,
    cost: SlotCost | None = None,
) -> Iterator[Stream]:
    """Yield the windows of a run whose jobs do not change."""
    carry = Carry()
    while not carry.is_done(lengths):
        window, carry = plan_window(lengths, num_stages, capacity, carry, num_slots, delay, effort, cost)
        yield window


def _check_progress(lengths: Lengths, carry: Carry) -> None:
    if len(carry.progress) > len(lengths):
        raise PlanError(f"lengths has {len(lengths)} jobs, earlier windows had {len(carry.progress)}: keep the positions of departed jobs")
    for job, (progress, steps) in enumerate(zip(carry.progress, lengths, strict=False)):
        if len(steps) < progress.step + bool(progress.taken):
            raise PlanError(f"job {job} has {len(steps)} steps in lengths, but step {progress.step} is already begun")


def _known(backlog: Backlog, tail: Stream) -> Layout | None:
    """Return the last plan's tail as a layout if it holds exactly the remaining samples (no job was added or removed)."""
    item_of = {key: item for item, key in enumerate(backlog.keys)}
    keys = [[(s.job, s.step, sample) for s in microbatch.segments for sample in s.samples] for microbatch in tail]
    if sum(map(len, keys)) != len(item_of) or any(key not in item_of for slot in keys for key in slot):
        return None
    return [[item_of[key] for key in slot] for slot in keys]


def _advance(backlog: Backlog, carry: Carry, num_jobs: int, window: Layout) -> tuple[Progress, ...]:
    """Move every job's progress past a window."""
    before = [*carry.progress, *[Progress()] * (num_jobs - len(carry.progress))]
    progress = [Progress(job.step, job.taken, max(0, job.ready - len(window))) for job in before]
    slot_of = {item: slot for slot, items in enumerate(window) for item in items}
    for span in backlog.jobs:
        for group in span:
            placed = [item for item in backlog.groups[group] if item in slot_of]
            if not placed:
                break
            job, step, _ = backlog.keys[placed[0]]
            if len(placed) == len(backlog.groups[group]):
                progress[job] = Progress(step + 1, (), max(0, max(slot_of[item] for item in placed) + backlog.gap - len(window)))
            else:
                taken = progress[job].taken if progress[job].step == step else ()
                progress[job] = Progress(step, tuple(sorted({*taken, *(backlog.keys[item][2] for item in placed)})), 0)
    return tuple(progress)
