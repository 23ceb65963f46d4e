"""The samples that remain to be planned, in flat lists: the form in which packing and search work.

An *item* is one remaining sample; a *group* is the remaining samples of one step of one job; a *layout* is a list of slots, each a
list of items. A layout is correct when consecutive groups of a job are at least `gap` slots apart (last item of one to first of the
next), no first group starts before the job's `ready` slot, no slot is over the budget, and at most `max_endings` groups end in one slot.
Jobs are sorted by their content alone, so that plans do not depend on how jobs are numbered.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from scheduling.job_lengths import JobLengths, read_all
from scheduling.plan_json import stream_from_json
from scheduling.slot_cost import SlotCost
from scheduling.types import MAX_ENDINGS, Lengths, Stream

Layout = list[list[int]]  # [slot] -> items


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is: the samples `taken` of step `step`, and the first slot of the stream that its remaining samples may use."""

    step: int = 0
    taken: tuple[int, ...] = ()
    ready: int = 0


@dataclass(frozen=True, slots=True)
class OpenJob:
    """One job that has steps to plan: its number, its lengths, the time of its steps and its progress."""

    number: int
    lengths: JobLengths
    times: np.ndarray  # float64 [num_steps + 1]: of all steps before each
    progress: Progress = Progress()
    priority: float = 1.0
    ahead: float = 0.0  # of its share, in virtual time (shares.py)

    @classmethod
    def of(cls, number: int, lengths: JobLengths, cost: SlotCost, priority: float = 1.0) -> OpenJob:
        """Sum up a job that starts."""
        return cls(number, lengths, np.concatenate([[0.0], np.cumsum(cost.steps(lengths))]), priority=priority)

    def cut(self, num_steps: int) -> OpenJob:
        """Return the job with its first steps alone."""
        return replace(self, lengths=self.lengths.cut(num_steps), times=self.times[: num_steps + 1].copy())

    def time_from(self, step: int) -> float:
        """Return the time of step `step` and all after it."""
        return float(self.times[-1] - self.times[step])

    def sort_key(self, first_slot: int) -> tuple:
        """Return what decides a job's place in a backlog that begins at `first_slot`; its number does not."""
        progress = self.progress
        return -len(self.lengths), self.lengths.key, progress.step, progress.taken, max(0, progress.ready - first_slot)


@dataclass(slots=True)
class Backlog:
    """Items, groups and jobs that remain to be planned, with the constants of the problem; not changed once built."""

    num_stages: int
    gap: int
    capacity: int
    max_endings: int  # groups that may end in one slot
    cost: SlotCost
    recent: tuple[float, ...] = ()  # slot times just before this backlog: the pipeline is not empty
    tokens: list[int] = field(default_factory=list)  # of an item
    times: list[float] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)  # (job, step, sample)
    group_of: list[int] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)  # items of a group, longest first
    jobs: list[range] = field(default_factory=list)  # groups of a job, in order
    ready: list[int] = field(default_factory=list)  # first slot of a job's first group
    started: list[bool] = field(default_factory=list)  # whether the first group had samples in earlier windows
    later_time: list[float] = field(default_factory=list)  # of a job, beyond the groups that are listed
    later_steps: list[int] = field(default_factory=list)
    priorities: list[float] = field(default_factory=list)  # of the jobs
    ahead: list[float] = field(default_factory=list)  # of their shares, in virtual time
    taken_time: list[float] = field(default_factory=list)  # of what a started first group had in earlier windows

    @property
    def has_shares(self) -> bool:
        """Whether the jobs' priorities differ, so that they decide whose step is next."""
        return len(set(self.priorities)) > 1

    @property
    def total_time(self) -> float:
        """Time of all remaining samples, listed or later, without the slots' fixed part."""
        return sum(self.times) + sum(self.later_time)

    def least_slots(self) -> int:
        """Fewest slots that the work and the longest chain of steps need (an estimate, when some steps are not listed)."""
        return max(-(-int(self.total_time) // self.capacity), self._chain_slots())

    def fewest_slots(self) -> int:
        """Fewest slots that the budget allows, which counts tokens and not time; at most least_slots()."""
        tokens = self.total_time * sum(self.tokens) / max(1.0, sum(self.times))  # later steps: as many per unit of time as the listed ones
        return max(-(-int(tokens) // self.capacity), self._chain_slots())

    def _chain_slots(self) -> int:
        """Slots of the longest chain of steps, each a gap after the last."""
        chains = [0]
        for job, span in enumerate(self.jobs):
            times = [sum(self.times[item] for item in self.groups[group]) for group in span]
            steps = len(span) + self.later_steps[job]
            if steps:
                slots = math.fsum(max(1.0, time / self.capacity) for time in times) + max(
                    self.later_steps[job], self.later_time[job] / self.capacity
                )
                chains.append(int(slots) + (steps - 1) * (self.gap - 1) + self.ready[job])
        return max(chains)


def open_backlog(
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int,
    cost: SlotCost,
    horizon: int | None = None,
    max_endings: int = MAX_ENDINGS,
) -> Backlog:
    """Flatten a workload at the start of a run; PlanError, as read_lengths, where no plan can exist."""
    jobs = [OpenJob.of(job, steps, cost) for job, steps in enumerate(read_all(lengths, capacity))]
    return list_backlog(jobs, Backlog(num_stages, num_stages + delay, capacity, max_endings, cost), horizon=horizon)


def list_backlog(jobs: Collection[OpenJob], backlog: Backlog, first_slot: int = 0, horizon: int | None = None) -> Backlog:
    """Flatten the remaining samples of `jobs` into an empty backlog that begins at `first_slot` of the stream; returns it.

    With a horizon, list only the steps of each job that are likely to start within `horizon` slots.
    """
    fair_time = float("inf") if horizon is None else 8 * horizon * backlog.capacity / max(1, len(jobs))
    mean = math.fsum(job.priority for job in jobs) / max(1, len(jobs))
    shared = len({job.priority for job in jobs}) > 1
    for job in sorted(jobs, key=lambda job: (job.sort_key(first_slot), (-job.priority, job.ahead) if shared else ())):
        share = max(1.0, job.priority / mean) if shared else 1.0
        _append_job(backlog, job, max(0, job.progress.ready - first_slot), horizon, fair_time * share)
    return backlog


def _append_job(backlog: Backlog, job: OpenJob, ready: int, horizon: int | None, fair_time: float) -> None:
    """Append one job's groups: the rest of its current step, then complete steps, up to the horizon or many times its fair share."""
    first_group, slot, used, taken, step = len(backlog.groups), float(ready), 0.0, set(job.progress.taken), job.progress.step
    while step < len(job.lengths) and (horizon is None or (slot < horizon and used < fair_time)):
        batch = job.lengths[step]
        members = [sample for sample in range(len(batch)) if sample not in taken]
        members.sort(key=lambda sample: (-batch[sample], sample))
        first_item = len(backlog.tokens)
        backlog.tokens += [batch[sample] for sample in members]
        backlog.times += [backlog.cost.sample(batch[sample]) for sample in members]
        backlog.keys += [(job.number, step, sample) for sample in members]
        backlog.group_of += [len(backlog.groups)] * len(members)
        backlog.groups.append(list(range(first_item, len(backlog.tokens))))
        time = sum(backlog.times[first_item:])
        slot += max(1.0, time / backlog.capacity) + backlog.gap - 1
        used += time
        taken, step = set(), step + 1
    backlog.jobs.append(range(first_group, len(backlog.groups)))
    backlog.ready.append(ready)
    backlog.started.append(bool(job.progress.taken))
    backlog.later_time.append(job.time_from(step))
    backlog.later_steps.append(len(job.lengths) - step)
    backlog.priorities.append(job.priority)
    backlog.ahead.append(job.ahead)
    batch = job.lengths[job.progress.step] if job.progress.taken else []
    backlog.taken_time.append(sum(backlog.cost.sample(batch[sample]) for sample in job.progress.taken))


def last_slots(backlog: Backlog, layout: Layout) -> list[int]:
    """Return the slot in which each group ends; -1 for a group that is not laid out completely."""
    last, placed = [-1] * len(backlog.groups), [0] * len(backlog.groups)
    for slot, items in enumerate(layout):
        for item in items:
            last[backlog.group_of[item]] = slot
            placed[backlog.group_of[item]] += 1
    return [slot if count == len(group) else -1 for slot, count, group in zip(last, placed, backlog.groups, strict=True)]


def to_stream(backlog: Backlog, layout: Layout) -> Stream:
    """Turn a layout into a stream: segments by job, samples ascending."""
    return stream_from_json([sorted((*backlog.keys[item], backlog.tokens[item]) for item in slot) for slot in layout])


def costs_of(backlog: Backlog, layout: Layout) -> list[float]:
    """Slot times of a layout, after those of the recent slots."""
    times, tokens, group_of, overhead = backlog.times, backlog.tokens, backlog.group_of, backlog.cost.overhead
    costs = list(backlog.recent)
    for slot in layout:
        segments = len({group_of[item] for item in slot})
        costs.append(sum([times[item] for item in slot]) + overhead(sum([tokens[item] for item in slot]), segments))
    return costs
