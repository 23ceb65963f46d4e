"""Ways to order the same work, behind one interface, for honest comparison: each at its best parameters.

A policy turns a workload into *runs*: streams that follow one another with a flush of the pipeline between.

* `flush`: jobs one after another, each global batch one run, balanced over its best number of microbatches (Megatron-LM).
* `round_robin`: one job per microbatch, jobs take turns, at most one step of a job in flight (mLoRA).
* `grouped`: jobs paired long with short, each pair's global batches packed together, no-ops where gaps are short (LoRAFusion).
* `greedy`: slot after slot up to one target size, started steps first; the planner must never be slower.
* `ours`: scheduling.planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduling.backlog import Backlog, Layout, open_backlog, to_stream
from scheduling.grouped import grouped_layout
from scheduling.packing import first_fit
from scheduling.planner import best_stretch, plan_stream
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import Lengths, Stream

Runs = tuple[Stream, ...]
Policy = Callable[[Lengths, int, int, SlotCost], Runs]  # (lengths, stages, capacity, cost)
_SHARES = tuple(k / 32 for k in range(8, 33))  # target sizes tried, as shares of the capacity


def flush(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Run every step of every job alone, with the number of microbatches that makes it shortest."""
    backlog = open_backlog(lengths, num_stages, capacity, 0, cost)
    runs = []
    for group in sorted(range(len(backlog.groups)), key=lambda group: backlog.keys[backlog.groups[group][0]]):
        layouts = (_balanced(backlog, backlog.groups[group], bins) for bins in range(1, len(backlog.groups[group]) + 1))
        ordered = (_small_ends(backlog, layout) for layout in layouts if layout is not None)
        runs.append(_fastest(lengths, num_stages, cost, (to_stream(backlog, layout) for layout in ordered)))
    return tuple(runs)


def round_robin(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Let jobs take turns with microbatches of their own, at the microbatch size that is best for the workload."""
    backlog = open_backlog(lengths, num_stages, capacity, 0, cost)
    streams = (to_stream(backlog, _turns(backlog, capacity * share)) for share in _SHARES)
    return (_fastest(lengths, num_stages, cost, streams),)


def grouped(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Pair jobs and pack each pair's global batches, at the bin size that is best for the workload."""
    backlog = open_backlog(lengths, num_stages, capacity, 0, cost)
    longest = max(backlog.tokens)
    sizes = sorted({int(capacity * share) for share in _SHARES if capacity * share >= longest} | {capacity})
    return (_fastest(lengths, num_stages, cost, (to_stream(backlog, grouped_layout(backlog, size)) for size in sizes)),)


def greedy(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Fill slot after slot, started steps first, then the longest remaining path; the best of several target sizes."""
    backlog = open_backlog(lengths, num_stages, capacity, 0, cost)
    best = best_stretch(backlog, first_fit)
    assert best is not None, "first_fit always finds a layout"
    return (to_stream(backlog, best.layout),)


def ours(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Plan with scheduling.planner at effort 1."""
    return (plan_stream(lengths, num_stages, capacity, cost=cost),)


POLICIES: dict[str, Policy] = {"flush": flush, "round-robin": round_robin, "grouped": grouped, "greedy": greedy, "ours": ours}


def _fastest(lengths: Lengths, num_stages: int, cost: SlotCost, streams: Iterable[Stream]) -> Stream:
    return min(streams, key=lambda stream: makespan(slot_times(stream, lengths, cost), num_stages))


def _balanced(backlog: Backlog, items: list[int], num_bins: int) -> Layout | None:
    """Longest first, each to the emptiest of `num_bins` bins; None when one goes over the budget."""
    bins, loads, room = [[] for _ in range(num_bins)], [0.0] * num_bins, [backlog.capacity] * num_bins
    for item in items:
        index = min((k for k in range(num_bins) if room[k] >= backlog.tokens[item]), key=lambda k: loads[k], default=-1)
        if index < 0:
            return None
        bins[index].append(item)
        loads[index] += backlog.times[item]
        room[index] -= backlog.tokens[item]
    return bins


def _small_ends(backlog: Backlog, layout: Layout) -> Layout:
    """Order microbatches so that the smallest are at both ends, where the pipeline fills and drains."""
    rising = sorted(layout, key=lambda items: sum([backlog.times[item] for item in items]))
    return rising[::2] + rising[1::2][::-1]


def _turns(backlog: Backlog, target: float) -> Layout:
    """Cut every step into even microbatches of at most about `target` tokens, and let the jobs take turns with them."""
    waiting = [[_cut(backlog, backlog.groups[group], target) for group in span] for span in backlog.jobs]  # [job][step] -> microbatches
    layout: Layout = []
    free_at, turn = [0] * len(waiting), 0
    while any(waiting):
        order = [(turn + k) % len(waiting) for k in range(len(waiting))]
        job = next((job for job in order if waiting[job] and free_at[job] <= len(layout)), None)
        if job is None:
            layout.append([])
            continue
        layout.append(waiting[job][0].pop(0))
        turn = job + 1
        if not waiting[job][0]:
            waiting[job].pop(0)
            free_at[job] = len(layout) - 1 + backlog.gap
    return layout


def _cut(backlog: Backlog, items: list[int], target: float) -> Layout:
    num_bins = max(1, -(-int(sum([backlog.tokens[item] for item in items])) // int(target)))
    while True:
        bins = _balanced(backlog, items, min(num_bins, len(items)))
        if bins is not None:
            return [chosen for chosen in bins if chosen]
        num_bins += 1
