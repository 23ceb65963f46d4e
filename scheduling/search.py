"""Local search on a layout: annealing by sweeps that move or swap samples between nearby slots and time each change exactly.

A sweep visits the slots from left to right with the head of the recursion of timing.py; for each slot p it proposes a few
changes between p and a slot up to 2 P to its right, times them in the rounds that they change (head, changed rounds, tail), and accepts
by Metropolis' rule. Changes to the right of p leave the head valid, those to the left of a round leave its tail valid, so only a few
tails are recomputed after an accepted change. Work is counted in proposals, never in seconds, and random numbers come from a
fixed seed: the same input gives the same plan everywhere.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from scheduling.backlog import Backlog, Layout, costs_of
from scheduling.timing import Clock, makespan

_COOLING = 0.05  # last temperature / first
_PROPOSALS_PER_SLOT = 10


def anneal(backlog: Backlog, layout: Layout, proposals: int, heat: float = 0.2, seed: int = 0) -> Layout:
    """Return the best layout found in about `proposals` proposals, never a slower one than the given.

    Where the pipeline fills or drains, P - 1 no-op slots are added, so that changes can form ramps; unused ones are dropped.
    The first temperature is `heat` times the time per slot that the pipeline loses to unevenness, fill and drain.
    """
    longer = _with_ends(backlog, layout)
    search = _Search(backlog, longer)
    sweeps = proposals // (max(1, len(longer)) * _PROPOSALS_PER_SLOT)
    start = makespan(costs_of(backlog, layout), backlog.num_stages)
    hot = heat * max(0.0, start - 2 * sum(search.costs)) / max(1, len(layout))
    rng = random.Random(seed)
    for sweep in range(sweeps):
        search.sweep(rng, hot * _COOLING ** (sweep / sweeps))
    found = without_gaps(backlog, search.layout())
    return found if makespan(costs_of(backlog, found), backlog.num_stages) < start else layout


def _with_ends(backlog: Backlog, layout: Layout) -> Layout:
    """Put no-op slots at the ends of a layout where they are the ends of a run."""
    ends: Layout = [[] for _ in range(backlog.num_stages - 1)]
    return [*([] if backlog.recent else ends), *layout, *([] if any(backlog.later_steps) else ends)]


def without_gaps(backlog: Backlog, layout: Layout) -> Layout:
    """Drop every no-op slot that no gap before a step of a job needs."""
    layout = [list(slot) for slot in layout]
    first, last = [-1] * len(backlog.groups), [-1] * len(backlog.groups)
    for k, slot in enumerate(layout):
        for item in slot:
            group = backlog.group_of[item]
            first[group], last[group] = (k if first[group] < 0 else first[group]), k
    for k in range(len(layout) - 1, -1, -1):
        if layout[k] or any(_needs(backlog, job, k, first, last) for job in range(len(backlog.jobs))):
            continue
        del layout[k]
        first = [slot - (slot > k) for slot in first]
        last = [slot - (slot > k) for slot in last]
    return layout


def _needs(backlog: Backlog, job: int, k: int, first: list[int], last: list[int]) -> bool:
    """Whether slot k is part of a gap of a job that must not shrink (first and last: the extent of each group, -1 where not laid out)."""
    earliest = backlog.ready[job]
    for group in backlog.jobs[job]:
        if k < first[group]:
            return first[group] <= earliest
        earliest = last[group] + backlog.gap
        if k <= last[group]:
            return False
    return False


class _Search:
    """A layout under change: the items and times of slots, the first and last slot of each group; slot numbers include the recent slots."""

    def __init__(self, backlog: Backlog, layout: Layout):
        self.backlog = backlog
        self.clock = Clock(backlog.num_stages)
        self.offset = len(backlog.recent)
        self.slots = [[] for _ in backlog.recent] + [list(slot) for slot in layout]
        self.costs = costs_of(backlog, layout)
        self.tokens = [sum([backlog.tokens[item] for item in slot]) for slot in self.slots]
        self.times = [sum([backlog.times[item] for item in slot]) for slot in self.slots]
        self.held = [Counter(backlog.group_of[item] for item in slot) for slot in self.slots]  # items of each group in a slot
        self.slot_of = {item: k for k, slot in enumerate(self.slots) for item in slot}
        num_groups = len(backlog.groups)
        self.members = [[item for item in group if item in self.slot_of] for group in backlog.groups]
        self.earliest = [0] * num_groups  # first slot that a group's items may use
        self.latest = [len(self.slots) - 1] * num_groups  # last one
        self.before = [-1] * num_groups
        self.after = [-1] * num_groups
        for span, ready in zip(backlog.jobs, backlog.ready, strict=True):
            for group in span:
                self.before[group] = group - 1 if group > span.start else -1
                self.after[group] = group + 1 if group + 1 < span.stop else -1
                self.earliest[group] = self.offset + ready
        for group in range(num_groups):
            self._bound(group)

    def layout(self) -> Layout:
        return self.slots[self.offset :]

    def _bound(self, group: int) -> None:
        """Update the slots that the groups before and after a group may use, after a change in its first or last slot."""
        slots = [self.slot_of[item] for item in self.members[group]]
        if not slots:
            return
        if self.before[group] >= 0:
            self.latest[self.before[group]] = min(slots) - self.backlog.gap
        if self.after[group] >= 0:
            self.earliest[self.after[group]] = max(slots) + self.backlog.gap

    def sweep(self, rng: random.Random, temperature: float) -> None:
        """Propose changes between each slot and those to its right, from left to right."""
        clock, costs, reach = self.clock, self.costs, 2 * self.backlog.num_stages
        num_slots, draw = len(self.slots), rng.random
        tails = clock.tails(costs)
        head = clock.advance((0.0,) * clock.num_stages, costs, 0, self.offset)
        now = max(map(float.__add__, head, tails[self.offset]))
        last_round = len(tails) - 1
        for p in range(self.offset, num_slots - 1):
            for _ in range(_PROPOSALS_PER_SLOT):
                q = p + 1 + int(draw() * reach)
                if q >= num_slots:
                    continue
                change = self._propose(p, q, draw(), draw())
                if change is None:
                    continue
                kept = costs[p], costs[q]
                costs[p], costs[q] = change[2:]
                end = min(q + clock.num_stages, last_round)
                value = max(map(float.__add__, clock.advance(head, costs, p, end), tails[end]))
                if value <= now or (temperature > 0 and draw() < math.exp((now - value) / temperature)):
                    now = value
                    self._apply(p, q, change[0], change[1])
                    clock.retreat(tails, costs, end, min(end, p + clock.num_stages))  # earlier ones are not needed any more
                else:
                    costs[p], costs[q] = kept
            head = clock.advance(head, costs, p, p + 1)

    def _propose(self, p: int, q: int, draw_p: float, draw_q: float) -> tuple[int, int, float, float] | None:
        """Draw an item of slot p and one of slot q (-1: none) to swap; return them and the new costs, None unless every rule allows it."""
        backlog, items_p, items_q = self.backlog, self.slots[p], self.slots[q]
        index_p, index_q = int(draw_p * (len(items_p) + 1)), int(draw_q * (len(items_q) + 1))
        item_p = items_p[index_p] if index_p < len(items_p) else -1
        item_q = items_q[index_q] if index_q < len(items_q) else -1
        time, tokens, group_p, group_q = 0.0, 0, -1, -1
        if item_p >= 0:
            group_p = backlog.group_of[item_p]
            if q > self.latest[group_p]:
                return None
            time, tokens = backlog.times[item_p], backlog.tokens[item_p]
        if item_q >= 0:
            group_q = backlog.group_of[item_q]
            if p < self.earliest[group_q]:
                return None
            time, tokens = time - backlog.times[item_q], tokens - backlog.tokens[item_q]
        elif item_p < 0:
            return None
        tokens_p, tokens_q = self.tokens[p] - tokens, self.tokens[q] + tokens
        if tokens_q > backlog.capacity or tokens_p > backlog.capacity:
            return None
        overhead = backlog.cost.overhead
        cost_p = self.times[p] - time + overhead(tokens_p, _segments(self.held[p], group_p, group_q)) if tokens_p else 0.0
        cost_q = self.times[q] + time + overhead(tokens_q, _segments(self.held[q], group_q, group_p)) if tokens_q else 0.0
        return item_p, item_q, cost_p, cost_q

    def _apply(self, p: int, q: int, item_p: int, item_q: int) -> None:
        """Carry out an accepted change: `item_p` goes from p to q, `item_q` from q to p."""
        for item, source, target in ((item_p, p, q), (item_q, q, p)):
            if item >= 0:
                self.slots[source].remove(item)
                self.slots[target].append(item)
                self.tokens[source] -= self.backlog.tokens[item]
                self.tokens[target] += self.backlog.tokens[item]
                self.times[source] -= self.backlog.times[item]
                self.times[target] += self.backlog.times[item]
                self.slot_of[item] = target
                group = self.backlog.group_of[item]
                self.held[source][group] -= 1
                if not self.held[source][group]:
                    del self.held[source][group]
                self.held[target][group] += 1
                self._bound(group)


def _segments(held: Counter[int], removed: int, added: int) -> int:
    """Return how many groups a slot holds after an item of one group is removed and one of another added (-1: none)."""
    if removed == added:
        return len(held)
    return len(held) - (removed >= 0 and held[removed] == 1) + (added >= 0 and added not in held)
