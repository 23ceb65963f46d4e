"""Ways to lay out a backlog, each for a wanted number of slots; the planner tries several numbers and keeps the best.

* `fill` goes slot by slot: ready jobs in order (started steps first, then the longest remaining critical path), complete remainders
  while they fit, then the subset of the next jobs' samples that meets the slot's target time exactly. Best where the budget binds.
* `spread` goes step by step: every step gets an equal, staggered share of the slots, and its samples, longest first, go to the
  emptiest slot of that share. Best where few jobs make gaps bind: smaller, even slots replace no-ops.
* `first_fit` is the plain greedy that the two must beat.

Targets ramp from one half to one over the first and last P - 1 slots: in a pipeline that fills or drains, a slow ramp is almost
free, and the fill then costs half as much (the linear program over slot times has the same solution).
"""

from __future__ import annotations

import math
from collections import Counter

from scheduling.backlog import Backlog, Layout, last_slots
from scheduling.shares import Turns
from scheduling.subset_sum import SubsetSums

_RESOLUTION = 512  # parts of a slot in subset sums
_CLOSE = 0.01  # a slot this near its target (relative) is full
_NEAR = 0.05  # and this near, where what is missing would be of jobs that are not due


def ramp(num_slots: int, num_stages: int, starts_empty: bool) -> list[float]:
    """Return each slot's share of the full target: 1/2 .. 1 at the end of a run and, into an empty pipeline, at its start."""
    shares = [1.0] * num_slots
    for k in range(min(num_stages - 1, num_slots // 2)):
        share = 0.5 + 0.5 * k / (num_stages - 1)
        shares[num_slots - 1 - k] = share
        if starts_empty:
            shares[k] = share
    return shares


class _Job:
    """A job while slots are being filled: its current group, the group's remaining items, and the critical path from there."""

    __slots__ = ("group", "end", "rest", "started", "free_at", "paths", "times", "first")

    def __init__(self, backlog: Backlog, index: int, slot_time: float):
        span = backlog.jobs[index]
        self.group = span.start
        self.first = span.start
        self.end = span.stop
        self.rest = list(backlog.groups[span.start]) if span else []
        self.started = backlog.started[index]
        self.free_at = backlog.ready[index]
        path = backlog.later_time[index] / slot_time + backlog.later_steps[index] * (backlog.gap - 1)
        self.paths, self.times = [], []  # from each group on the critical path, in slots; the groups' times
        for group in reversed(span):
            self.times.append(sum([backlog.times[item] for item in backlog.groups[group]]))
            path += max(1.0, self.times[-1] / slot_time) + backlog.gap - 1
            self.paths.append(path)
        self.paths.reverse()
        self.times.reverse()

    def take(self, backlog: Backlog, items: set[int], slot: int) -> float:
        """Remove placed items; move to the next group when none remains. Returns their time."""
        time = sum([backlog.times[item] for item in self.rest if item in items])
        self.rest = [item for item in self.rest if item not in items]
        self.started = True
        if not self.rest:
            self.group, self.started, self.free_at = self.group + 1, False, slot + backlog.gap
            if self.group < self.end:
                self.rest = list(backlog.groups[self.group])
        return time


def fill(backlog: Backlog, num_slots: int, horizon: int | None = None, by_priority: bool = False) -> Layout:
    """Lay out slot by slot towards `num_slots` even ones; stops at the horizon, continues beyond `num_slots` when gaps force it to.

    With `by_priority`, the jobs' shares decide which of those that are ready comes first (shares.py), not their critical paths.
    """
    slot_time, fixed = max(1.0, backlog.total_time / num_slots), backlog.cost.fixed
    jobs = [_Job(backlog, index, slot_time) for index in range(len(backlog.jobs))]
    shares = ramp(num_slots, backlog.num_stages, not backlog.recent)
    remaining_time, remaining_shares = backlog.total_time, math.fsum(shares)
    turns = Turns(*(dict(enumerate(of)) for of in (backlog.priorities, backlog.ahead, backlog.taken_time))) if by_priority else None
    layout: Layout = []
    open_jobs = [index for index, job in enumerate(jobs) if job.rest]
    while open_jobs and (horizon is None or len(layout) < horizon):
        slot = len(layout)
        target = slot_time
        if slot < num_slots:
            target = (remaining_time + fixed * (num_slots - slot)) * shares[slot] / max(remaining_shares, 0.5) - fixed
            remaining_shares -= shares[slot]
        ready = [index for index in open_jobs if jobs[index].free_at <= slot]
        ready.sort(key=lambda index: _turn(jobs[index], index, turns))
        num_due = len(ready) if turns is None else sum(map(turns.due, ready))
        chosen = _fill_slot(backlog, [jobs[index] for index in ready], num_due, max(1.0, target))
        placed = set(chosen)
        used = {index: jobs[index].take(backlog, placed, slot) for index in ready if not placed.isdisjoint(jobs[index].rest)}
        if turns is not None:
            ended = [index for index in used if not jobs[index].started]
            turns.count(used, ended, [index for index in ready if index not in used])
        remaining_time -= sum([backlog.times[item] for item in chosen])
        layout.append(chosen)
        open_jobs = [index for index in open_jobs if jobs[index].rest]
    return layout


def fill_by_priority(backlog: Backlog, num_slots: int, horizon: int | None = None) -> Layout:
    """Lay out as `fill` does, in the order of shares."""
    return fill(backlog, num_slots, horizon, by_priority=True)


def _turn(job: _Job, index: int, turns: Turns | None) -> tuple[float, ...]:
    """Return what orders ready jobs: whose turn it is by shares, or the longest critical path."""
    path = -job.paths[job.group - job.first]
    if turns is None:
        return (not job.started, path, index)
    return (not turns.due(index), not job.started, turns.finish(index, job.times[job.group - job.first]), path, index)


def _fill_slot(backlog: Backlog, ready: list[_Job], num_due: int, target: float) -> list[int]:
    """Choose the items of one slot: complete remainders in order while they fit, then the best subset of the jobs that follow.

    Where the `num_due` first jobs nearly fill it, it holds nothing of those that follow.
    """
    times, tokens = backlog.times, backlog.tokens
    chosen: list[int] = []
    room, token_room, num_complete = target, backlog.capacity, 0
    for job in ready:
        needed, needed_tokens = sum([times[item] for item in job.rest]), sum([tokens[item] for item in job.rest])
        if needed > room or needed_tokens > token_room or num_complete == backlog.max_endings:
            break
        chosen += job.rest
        room, token_room, num_complete = room - needed, token_room - needed_tokens, num_complete + 1
    if num_complete < len(ready) and room > _CLOSE * target:
        chosen += _fit_due(backlog, ready[num_complete:], num_due - num_complete, room, token_room, target)
    if not chosen and ready:  # even the shortest sample is over the target
        chosen = [ready[0].rest[-1]]
    return _limit_endings(ready, chosen, backlog.max_endings) if len(ready) > backlog.max_endings else chosen


def _limit_endings(ready: list[_Job], chosen: list[int], max_endings: int) -> list[int]:
    """Leave out the shortest sample of every step that would be one too many to end in the slot."""
    placed, num_endings = set(chosen), 0
    for job in ready:
        if placed.issuperset(job.rest):
            num_endings += 1
            if num_endings > max_endings:
                placed.remove(job.rest[-1])
    return [item for item in chosen if item in placed]


def _fit_due(backlog: Backlog, ready: list[_Job], num_due: int, room: float, token_room: int, target: float) -> list[int]:
    """Return a subset that fits: of the `num_due` first jobs if it nearly fills the room, else of all that are ready."""
    if 0 < num_due < len(ready):
        due = _fit(backlog, ready[:num_due], room, token_room, target)
        missing, missing_tokens = (
            room - sum([backlog.times[item] for item in due]),
            token_room - sum([backlog.tokens[item] for item in due]),
        )
        if missing <= _NEAR * target or missing_tokens <= _NEAR * backlog.capacity:
            return due
    return _fit(backlog, ready, room, token_room, target)


def _fit(backlog: Backlog, ready: list[_Job], room: float, token_room: int, target: float) -> list[int]:
    """Return the subset of the ready jobs' items whose time is nearest to `room`, from as few jobs as possible."""
    times, tokens, unit = backlog.times, backlog.tokens, target / _RESOLUTION
    goal, slack = int(room / unit), int(2 * _CLOSE * _RESOLUTION)
    sums, pool = SubsetSums(goal + slack), []
    best: list[int] = []
    missed = float("inf")
    for job in ready:
        pool += job.rest
        sums.extend([max(1, round(times[item] / unit)) for item in job.rest])
        below, above = sums.below(goal), sums.above(goal)
        for total in sorted({below, below if above is None else above}, key=lambda total: abs(total - goal)):
            if abs(total - goal) >= missed:
                continue
            subset = [pool[index] for index in sums.pick(total)]
            if sum([tokens[item] for item in subset]) <= token_room:
                best, missed = subset, abs(total - goal)
                break
        if missed <= _CLOSE * _RESOLUTION:
            return best
    full = _fit_tokens(backlog, ready, token_room)
    return full if abs(sum([times[item] for item in full]) - room) < missed * unit else best


def _fit_tokens(backlog: Backlog, ready: list[_Job], token_room: int) -> list[int]:
    """Where the token budget binds before the time does: the fullest subset, from as few jobs as possible."""
    sums, pool = SubsetSums(token_room), []
    for job in ready:
        pool += job.rest
        sums.extend([backlog.tokens[item] for item in job.rest])
        if token_room - sums.below(token_room) <= _CLOSE * backlog.capacity:
            break
    return [pool[index] for index in sums.pick(sums.below(token_room))]


def first_fit(backlog: Backlog, num_slots: int, horizon: int | None = None) -> Layout:
    """Lay out slot by slot up to one target size, longest samples first; the plain greedy that the planner starts from.

    Jobs with a started step come first, then those with the longest remaining path; without a ready job the slot is a no-op.
    """
    target = min(float(backlog.capacity), backlog.total_time / num_slots)
    jobs = [_Job(backlog, index, backlog.capacity) for index in range(len(backlog.jobs))]
    layout: Layout = []
    while any(job.rest for job in jobs) and (horizon is None or len(layout) < horizon):
        ready = [job for job in jobs if job.rest and job.free_at <= len(layout)]
        ready.sort(key=lambda job: (not job.started, -job.paths[job.group - job.first]))
        slot: list[int] = []
        room, num_endings = target, 0
        for job in ready:
            taken = []
            for item in job.rest:
                if backlog.tokens[item] <= room or not (slot or taken):  # an empty slot takes a sample that is over the target
                    taken.append(item)
                    room -= backlog.tokens[item]
            if len(taken) == len(job.rest):
                num_endings += 1
                if num_endings > backlog.max_endings:
                    room += backlog.tokens[taken.pop()]
            if taken:
                job.take(backlog, set(taken), len(layout))
                slot += taken
        layout.append(slot)
    return layout


def spread(backlog: Backlog, num_slots: int, horizon: int | None = None) -> Layout | None:
    """Lay out step by step over equal, staggered shares of the slots; None where a share cannot hold its samples or too many end."""
    allowed = _shares_of_steps(backlog, num_slots)
    if allowed is None:
        return None
    num_slots = max(end for _, end in allowed) + 1
    shares = ramp(num_slots, backlog.num_stages, not backlog.recent)
    loads, room, layout = [backlog.cost.fixed] * num_slots, [backlog.capacity] * num_slots, [[] for _ in range(num_slots)]
    for item in sorted(range(len(backlog.tokens)), key=lambda item: (-backlog.tokens[item], item)):
        first, end = allowed[backlog.group_of[item]]
        if horizon is not None and first >= horizon:
            continue
        time, tokens = backlog.times[item], backlog.tokens[item]
        slots = [slot for slot in range(first, end + 1) if room[slot] >= tokens]
        if not slots:
            return None
        slot = min(slots, key=lambda slot: (loads[slot] + time) / shares[slot])
        loads[slot] += time
        room[slot] -= tokens
        layout[slot].append(item)
    while not layout[-1]:
        layout.pop()
    return layout if _few_end(backlog, layout) else None


def _few_end(backlog: Backlog, layout: Layout) -> bool:
    """Whether at most `max_endings` groups end in every slot."""
    if len(backlog.jobs) <= backlog.max_endings:
        return True
    return max(Counter(slot for slot in last_slots(backlog, layout) if slot >= 0).values(), default=0) <= backlog.max_endings


def _shares_of_steps(backlog: Backlog, num_slots: int) -> list[tuple[int, int]] | None:
    """Return the first and last slot that each group may use, or None where the shares are shorter than the gap."""
    num_jobs, gap = len(backlog.jobs), backlog.gap
    steps = [len(span) + later for span, later in zip(backlog.jobs, backlog.later_steps, strict=True)]
    period = (num_slots + gap - 1) / (max(steps) + (num_jobs - 1) / num_jobs)
    allowed: list[tuple[int, int]] = [(0, 0)] * len(backlog.groups)
    for index, span in enumerate(backlog.jobs):
        if backlog.recent:
            start, late = float(backlog.ready[index]), 0.0
        else:
            start = period * index / num_jobs
            late = period * (num_jobs - 1) / num_jobs - start  # slots that the last job to start still needs after this one ends
        share = (num_slots + gap - 1 - start - late) / max(1, steps[index])
        for position, group in enumerate(span):
            first, end = int(start + share * position), int(start + share * (position + 1)) - gap
            if end < first and steps[index] > 1:
                return None
            allowed[group] = (first, max(first, end))
    return allowed
