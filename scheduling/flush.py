"""Jobs one after another, as other trainers run them (Megatron-LM): what co-training is measured against.

Every global batch is a stream of its own, over its best number of microbatches, with a flush of the pipeline between two.
"""

from __future__ import annotations

from scheduling.backlog import Backlog, Layout, open_backlog, to_stream
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import Lengths, Stream

Runs = tuple[Stream, ...]  # one after another, each into an empty pipeline


def flush(lengths: Lengths, num_stages: int, capacity: int, cost: SlotCost) -> Runs:
    """Run every step of every job alone, with the number of microbatches that makes it shortest."""
    backlog = open_backlog(lengths, num_stages, capacity, 0, cost)
    runs = []
    for group in sorted(range(len(backlog.groups)), key=lambda group: backlog.keys[backlog.groups[group][0]]):
        layouts = (balanced(backlog, backlog.groups[group], bins) for bins in range(1, len(backlog.groups[group]) + 1))
        ordered = (_small_ends(backlog, layout) for layout in layouts if layout is not None)
        streams = [to_stream(backlog, layout) for layout in ordered]
        runs.append(min(streams, key=lambda stream: makespan(slot_times(stream, lengths, cost), num_stages)))
    return tuple(runs)


def balanced(backlog: Backlog, items: list[int], num_bins: int) -> Layout | None:
    """Deal items, longest first, each to the emptiest of `num_bins` bins; None when one goes over the budget."""
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
