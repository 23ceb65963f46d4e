"""Pack evaluations into slots, and place these between the slots of a training window.

Evaluations whose ranges of places meet share slots. A slot takes about the time of the window's training slots: one that is longer than
the forwards around it delays stage after stage. Where training slots are short, it is longer: n slots of a block of work W cost n times
their fixed time, and their length P - 1 times, least together for a length of sqrt(W fixed / (P - 1)).

Slots go, one after another, to the place where the makespan grows least (timing.py), and the earliest of several that are as good.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scheduling.slot_cost import SlotCost
from scheduling.timing import Clock
from scheduling.types import Microbatch, Segment, Stream

_ENOUGH = 0.5  # of a slot: an evaluation that fills less may wait for others
_NEAR = 0.02  # of a slot: so much more may an earlier place cost
_CLOSED = 0.03  # of a slot: room that is not worth another segment


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """Planned training slots, between which evaluations are placed."""

    stream: Stream
    costs: Sequence[float]  # one way, of recent slots, of these, and of those that are likely to follow
    num_recent: int
    first: int  # index of the first slot
    ends: Mapping[int, Mapping[int, int]]  # [job][step] -> the index at which it ends
    is_last: bool  # no training remains after it

    @property
    def end(self) -> int:
        """The index after the last slot."""
        return self.first + len(self.stream)

    def cost_at(self, index: int) -> float:
        """Return the time of a slot, 0 beyond those that are known."""
        at = index - self.first + self.num_recent
        return self.costs[at] if at < len(self.costs) else 0.0


@dataclass(slots=True, eq=False)
class OpenEvaluation:
    """An evaluation that may be placed before indices first .. last; what is packed is removed from its samples."""

    number: int
    version: int
    first: int
    deadline: int | None  # None while the end of the job's next step is not known
    urgent: bool  # it does not wait for the next window
    samples: list[int]  # shortest first
    tokens: list[int]
    times: list[float]
    last: int = 0

    @classmethod
    def of(
        cls,
        number: int,
        version: int,
        first: int,
        deadline: int | None,
        urgent: bool,
        samples: list[int],
        of: Sequence[int],
        cost: SlotCost,
    ) -> OpenEvaluation:
        """Make one of `samples` of a validation set with `of` tokens each."""
        tokens = [of[sample] for sample in samples]
        return cls(number, version, first, deadline, urgent, samples, tokens, [cost.sample(each) for each in tokens])

    def take(self, time: float, tokens: int, at_least_one: bool) -> tuple[list[int], int, float]:
        """Remove the longest samples that fit into a room; returns them, their tokens and their time."""
        taken, used, spent = [], 0, 0.0
        while self.samples:
            k = min(bisect_right(self.tokens, tokens - used), bisect_right(self.times, time - spent)) - 1
            if k < 0 and (taken or not at_least_one):
                break
            taken.append(self.samples.pop(k))
            used, spent = used + self.tokens.pop(k), spent + self.times.pop(k)
        return taken, used, spent


@dataclass(slots=True)
class PackedSlot:
    """An evaluation slot: of each evaluation the samples and their tokens."""

    segments: list[tuple[OpenEvaluation, list[int], int]] = field(default_factory=list)
    completed: list[OpenEvaluation] = field(default_factory=list)  # those that end with it
    time: float = 0.0  # of its forward

    def microbatch(self) -> Microbatch:
        """Return the slot of a stream."""
        parts = sorted((one.number, one.version, tuple(sorted(samples)), tokens) for one, samples, tokens in self.segments)
        return Microbatch(tuple(Segment(*part) for part in parts), evaluate=True)


class Room:
    """How many more evaluations may be listed at an index; what is open with a known deadline has its room there reserved."""

    def __init__(self, limit: int, listed: Mapping[int, int], opened: Sequence[OpenEvaluation]):
        """Begin with what is listed already; at most `limit` are listed at an index."""
        self.limit = limit
        self.taken = Counter(listed)
        self.taken.update(one.deadline for one in opened if one.deadline is not None)

    def fits(self, completed: Sequence[OpenEvaluation], n: int) -> bool:
        """Whether these may all be listed at index n."""
        own = sum(one.deadline == n for one in completed)
        return self.taken[n] - own + len(completed) <= self.limit

    def take(self, completed: Sequence[OpenEvaluation], n: int) -> None:
        """List these at index n."""
        self.taken.subtract(one.deadline for one in completed if one.deadline is not None)
        self.taken[n] += len(completed)


class _Places:
    """The makespan of a window as evaluation slots are placed in it."""

    def __init__(self, training: TrainingWindow, end: int, num_stages: int):
        self.clock = Clock(num_stages)
        self.costs = [*training.costs, *[0.0] * (end - training.end + num_stages)]  # no-ops, and those that drain
        self.offset = training.num_recent - training.first  # from an index to its round
        self.tails = self.clock.tails(self.costs)
        self.before: dict[int, list[float]] = {}  # round -> costs of the evaluation slots before it
        self.heads = [(0.0,) * num_stages]
        self._extend(len(training.costs))

    def makespan(self, n: int, cost: float) -> float:
        """Return the makespan with one more slot before index n, without those that are placed later."""
        k = n + self.offset
        self._extend(k)
        head = self.clock.border(self.heads[k], self.costs, k, k + 1, [*self.before.get(k, ()), cost])
        return max(map(float.__add__, head, self.tails[k + 1]))

    def put(self, n: int, cost: float) -> None:
        """Place a slot before index n."""
        k = n + self.offset
        self.before.setdefault(k, []).append(cost)
        del self.heads[k + 1 :]

    def _extend(self, k: int) -> None:
        """Compute heads as far as that before round k."""
        for at in range(len(self.heads) - 1, k):
            if at in self.before:
                self.heads.append(self.clock.border(self.heads[at], self.costs, at, at + 1, self.before[at]))
            else:
                self.heads.append(self.clock.advance(self.heads[at], self.costs, at, at + 1))


def place(
    training: TrainingWindow,
    opened: Sequence[OpenEvaluation],
    end: int,
    num_slots: int,
    room: Room,
    num_stages: int,
    capacity: int,
    cost: SlotCost,
) -> tuple[dict[int, list[PackedSlot]], list[tuple[int, int]]]:
    """Pack and place as many evaluation slots as a window of `num_slots` can need, at places up to index `end`.

    Returns them by the index that they precede, and the (job, version) that are to wait for the next window.
    """
    busy = [each for each in training.costs[training.num_recent :] if each]
    usual = sum(busy) / len(busy) if busy else 0.0
    places, placed, waiting = _Places(training, end, num_stages), {}, []
    rest = sorted(opened, key=lambda one: (one.last, one.first))  # stable: of equals, the job that has joined first
    while rest and num_slots > 0:
        group = sorted((one for one in rest if one.first <= rest[0].last), key=lambda one: (one.first, one.last))
        rest = [one for one in rest if one.first > rest[0].last]
        slots = _pack(group, usual, num_slots, num_stages, capacity, cost)
        if not any(one.urgent for one, _, _ in slots[-1].segments) and slots[-1].time < _ENOUGH * (usual or cost.sample(capacity)):
            waiting += [(one.number, one.version) for one, _, _ in slots.pop().segments]
        num_slots -= len(slots)
        for slot in slots:
            for part, n in _assign(slot, places, room, cost):
                placed.setdefault(n, []).append(part)
    return placed, waiting


def _pack(
    group: Sequence[OpenEvaluation], usual: float, num_slots: int, num_stages: int, capacity: int, cost: SlotCost
) -> list[PackedSlot]:
    """Pack at most `num_slots` slots of evaluations, in order, each with its longest samples that fit first."""
    work = sum(sum(one.times) for one in group)
    worth = math.sqrt(work * cost.fixed / (num_stages - 1)) if num_stages > 1 else math.inf
    target = max(usual - cost.fixed, worth)
    slots: list[PackedSlot] = []
    while (group := [one for one in group if one.samples]) and len(slots) < num_slots:
        slot, used, spent = PackedSlot(), 0, 0.0
        for one in group:
            samples, tokens, time = one.take(target - spent, capacity - used, not slot.segments)
            if samples:
                slot.segments.append((one, samples, tokens))
                used, spent = used + tokens, spent + time
            if not one.samples:
                slot.completed.append(one)
            if target - spent < _CLOSED * target or capacity - used < _CLOSED * capacity:
                break
        slot.time = spent + cost.overhead(used, len(slot.segments))
        slots.append(slot)
    return slots


def _assign(slot: PackedSlot, places: _Places, room: Room, cost: SlotCost) -> list[tuple[PackedSlot, int]]:
    """Place a slot; where no index can list all that end with it, each of its segments as a slot of its own, or not in this window."""
    first, last = max(one.first for one, _, _ in slot.segments), min(one.last for one, _, _ in slot.segments)
    allowed = [n for n in range(first, last + 1) if room.fits(slot.completed, n)]
    if not allowed:
        if len(slot.segments) == 1:
            assert slot.segments[0][0].deadline is None or slot.segments[0][0].deadline > last
            return []
        parts = []
        for one, samples, tokens in slot.segments:
            time = slot.time * tokens / sum(each for _, _, each in slot.segments)
            parts.append(PackedSlot([(one, samples, tokens)], [one] if one in slot.completed else [], time))
        return [each for part in parts for each in _assign(part, places, room, cost)]
    spans = [places.makespan(n, slot.time) for n in allowed]
    near = min(spans) + _NEAR * slot.time
    n = next(n for n, span in zip(allowed, spans, strict=True) if span <= near)
    places.put(n, slot.time)
    room.take(slot.completed, n)
    for one, _, _ in slot.segments:
        one.first = n
    return [(slot, n)]
