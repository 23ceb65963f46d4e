"""The samples that remain to be planned, in flat lists: the form in which packing and search work.

An *item* is one remaining sample; a *group* is the remaining samples of one step of one job; a *layout* is a list of slots, each a
list of items. A layout is correct when consecutive groups of a job are at least `gap` slots apart (last item of one to first of the
next), no first group starts before the job's `ready` slot, and no slot is over the budget. Jobs are sorted by their
content alone, so that plans do not depend on how jobs are numbered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from scheduling.slot_cost import SlotCost, in_grains
from scheduling.types import Lengths, Microbatch, PlanError, Segment, Stream

Layout = list[list[int]]  # [slot] -> items


@dataclass(frozen=True, slots=True)
class Progress:
    """One job at a window border: the samples `taken` of step `step`, and the first slot after the border for its remaining samples."""

    step: int = 0
    taken: tuple[int, ...] = ()
    ready: int = 0


@dataclass(slots=True)
class Backlog:
    """Items, groups and jobs that remain to be planned, with the constants of the problem; not changed once built."""

    num_stages: int
    gap: int
    capacity: int
    cost: SlotCost
    tokens: list[int]  # of an item
    times: list[float]
    keys: list[tuple[int, int, int]]  # (job, step, sample)
    group_of: list[int]
    groups: list[list[int]]  # items of a group, longest first
    jobs: list[range]  # groups of a job, in order
    ready: list[int]  # first slot of a job's first group
    started: list[bool]  # whether the first group had samples in earlier windows
    later_time: list[float]  # of a job, beyond the groups that are listed
    later_steps: list[int]
    recent: tuple[float, ...]  # slot times just before this backlog: the pipeline is not empty

    @property
    def fixed(self) -> float:
        """Time of every slot in addition to its samples' time."""
        return self.cost.fixed

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


def check_workload(lengths: Lengths, capacity: int) -> None:
    """Raise PlanError, naming the sample, where no plan can exist: empty steps, empty samples, samples over the budget."""
    for job, steps in enumerate(lengths):
        for step, batch in enumerate(steps):
            if not batch:
                raise PlanError(f"job {job} step {step} has no samples")
            if min(batch) <= 0 or max(batch) > capacity:
                sample, tokens = next((k, tokens) for k, tokens in enumerate(batch) if not 0 < tokens <= capacity)
                raise PlanError(f"job {job} step {step} sample {sample} has {tokens} tokens; the budget is 1 to {capacity}")


def open_backlog(
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int,
    cost: SlotCost,
    progress: Sequence[Progress] = (),
    recent: tuple[float, ...] = (),
    horizon: int | None = None,
) -> Backlog:
    """Flatten the remaining samples; with a horizon, list only the steps of each job that are likely to start within `horizon` slots."""
    gap = num_stages + delay
    progress = [*progress, *[Progress()] * (len(lengths) - len(progress))]
    order = sorted(range(len(lengths)), key=lambda job: (-len(lengths[job]), lengths[job], progress[job].step, progress[job].taken))
    backlog = Backlog(num_stages, gap, capacity, cost, [], [], [], [], [], [], [], [], [], [], recent)
    fair_time = float("inf") if horizon is None else 8 * horizon * capacity / max(1, len(lengths))
    for job in order:
        _append_job(backlog, job, lengths[job], progress[job], cost, horizon, fair_time)
    return backlog


def _append_job(
    backlog: Backlog, job: int, steps: Sequence[Sequence[int]], progress: Progress, cost: SlotCost, horizon: int | None, fair_time: float
) -> None:
    """Append one job's groups: the rest of its current step, then complete steps, up to the horizon or many times its fair share."""
    first_group, slot, used, taken, step = len(backlog.groups), float(progress.ready), 0.0, set(progress.taken), progress.step
    while step < len(steps) and (horizon is None or (slot < horizon and used < fair_time)):
        batch = steps[step]
        members = [sample for sample in range(len(batch)) if sample not in taken]
        members.sort(key=lambda sample: (-batch[sample], sample))
        first_item = len(backlog.tokens)
        backlog.tokens += [batch[sample] for sample in members]
        backlog.times += [cost.sample(batch[sample]) for sample in members]
        backlog.keys += [(job, step, sample) for sample in members]
        backlog.group_of += [len(backlog.groups)] * len(members)
        backlog.groups.append(list(range(first_item, len(backlog.tokens))))
        time = sum(backlog.times[first_item:])
        slot += max(1.0, time / backlog.capacity) + backlog.gap - 1
        used += time
        taken, step = set(), step + 1
    backlog.jobs.append(range(first_group, len(backlog.groups)))
    backlog.ready.append(progress.ready)
    backlog.started.append(bool(progress.taken))
    backlog.later_time.append(sum([in_grains(sum(batch) + cost.per_square * sum(map(mul, batch, batch))) for batch in steps[step:]]))
    backlog.later_steps.append(len(steps) - step)


def to_stream(backlog: Backlog, layout: Layout) -> Stream:
    """Turn a layout into a stream: segments by job, samples ascending."""
    stream = []
    for slot in layout:
        by_step: dict[tuple[int, int], list[int]] = {}
        for item in sorted(slot, key=lambda item: backlog.keys[item]):
            by_step.setdefault(backlog.keys[item][:2], []).append(item)
        segments = [
            Segment(job, step, tuple(backlog.keys[item][2] for item in items), sum(backlog.tokens[item] for item in items))
            for (job, step), items in by_step.items()
        ]
        stream.append(Microbatch(tuple(segments)))
    return tuple(stream)


def costs_of(backlog: Backlog, layout: Layout) -> list[float]:
    """Slot times of a layout, after those of the recent slots."""
    times, tokens, group_of, overhead = backlog.times, backlog.tokens, backlog.group_of, backlog.cost.overhead
    costs = list(backlog.recent)
    for slot in layout:
        segments = len({group_of[item] for item in slot})
        costs.append(sum([times[item] for item in slot]) + overhead(sum([tokens[item] for item in slot]), segments))
    return costs
