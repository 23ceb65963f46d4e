"""Other ways to order the same work, behind one interface, for honest comparison: each at its best parameters.

A policy turns a workload into *runs*: streams that follow one another with a flush of the pipeline between. Its efficiency is the
ideal time of the tokens / the summed makespans.

* `flush`: jobs one after another, each global batch one run, balanced over its best number of microbatches (Megatron-LM).
* `round_robin`: one job per microbatch, jobs take turns, at most one step of a job in flight (mLoRA).
* `grouped`: jobs paired long with short, each pair's global batches packed together, no-ops where gaps are short (LoRAFusion's
  published schedule, from its description).
* `greedy`: slot after slot up to one target size, started steps first; the planner must never be slower.
* `ours`: scheduling.planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduling.backlog import Backlog, Layout, open_backlog, to_stream
from scheduling.flush import Runs, balanced, flush
from scheduling.packing import first_fit
from scheduling.planner import best_stretch, plan_stream
from scheduling.slot_cost import SlotCost, slot_times, work_time
from scheduling.subset_sum import SubsetSums
from scheduling.timing import makespan
from scheduling.types import Lengths, Stream

Policy = Callable[[Lengths, int, int, SlotCost], Runs]  # (lengths, stages, capacity, cost)
_SHARES = tuple(k / 32 for k in range(8, 33))  # target sizes tried, as shares of the capacity


def runs_time(runs: Runs, lengths: Lengths, num_stages: int, cost: SlotCost) -> float:
    """Return the summed makespans of the runs."""
    return sum(makespan(slot_times(stream, lengths, cost), num_stages) for stream in runs)


def runs_efficiency(runs: Runs, lengths: Lengths, num_stages: int, cost: SlotCost | None = None) -> float:
    """Return ideal time of the tokens / summed makespans."""
    cost = cost or SlotCost()
    return 2 * work_time(lengths, cost) / runs_time(runs, lengths, num_stages, cost)


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


def _turns(backlog: Backlog, target: float) -> Layout:
    """Cut every step into even microbatches of at most about `target` tokens, and let the jobs take turns with them."""
    waiting: list[list[list[list[int]]]] = []  # [job][step] -> microbatches
    for span in backlog.jobs:
        waiting.append([_cut(backlog, backlog.groups[group], target) for group in span])
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
        bins = balanced(backlog, items, min(num_bins, len(items)))
        if bins is not None:
            return [chosen for chosen in bins if chosen]
        num_bins += 1


def grouped_layout(backlog: Backlog, bin_tokens: int) -> Layout:
    """Lay out a complete backlog with bins of at most `bin_tokens` tokens (at least the longest sample).

    Jobs are sorted by mean sample length; the longest is paired with the shortest as long as the other jobs together supply at least
    P - 1 microbatches per step (the estimate for a step is ceil(mean tokens of a step / capacity)); otherwise it remains
    single. Per step and group: fewest bins, the last as small as it can be; then, for each step, for each group, bins by falling load.
    The last bins of neighbouring groups are merged, at the earlier one's position, where they fit and gaps remain long enough; no-ops are
    put before a group whose gap is too short. Instead of an integer program, bins are filled one by one with the fullest exact subset,
    which makes the last one smallest in nearly all cases; a job without further steps drops out of its group.
    """
    pairs = _pair_jobs(backlog, bin_tokens)
    blocks = []  # (jobs with a step here, bins by falling load), in execution order
    for step in range(max(len(span) for span in backlog.jobs)):
        for pair in pairs:
            jobs = [job for job in pair if step < len(backlog.jobs[job])]
            items = [item for job in jobs for item in backlog.groups[backlog.jobs[job][step]]]
            if items:
                blocks.append((jobs, sorted(_pack(backlog, items, bin_tokens), key=lambda held: -_load(backlog, held))))
    return _join_blocks(backlog, blocks, bin_tokens)


def _load(backlog: Backlog, items: list[int]) -> int:
    return sum([backlog.tokens[item] for item in items])


def _pair_jobs(backlog: Backlog, bin_tokens: int) -> list[list[int]]:
    """Pair the longest job with the shortest while the others still fill the gap."""
    mean_length, supply = {}, {}
    for job, span in enumerate(backlog.jobs):
        loads = [_load(backlog, backlog.groups[group]) for group in span]
        samples = sum(len(backlog.groups[group]) for group in span)
        if samples:
            mean_length[job] = sum(loads) / samples
            supply[job] = -(-int(sum(loads) / len(loads)) // bin_tokens)
    order = sorted(mean_length, key=lambda job: mean_length[job])
    pairs = []
    while order:
        longest = order.pop()
        others = sum(supply.values()) - supply[longest]
        if order and others - supply[order[0]] >= backlog.num_stages - 1:
            pairs.append([longest, order.pop(0)])
        else:
            pairs.append([longest])
    return pairs


def _pack(backlog: Backlog, items: list[int], bin_tokens: int) -> Layout:
    """Fill bin after bin with the fullest subset of the remaining samples that holds the longest one."""
    rest, bins = sorted(items, key=lambda item: (-backlog.tokens[item], item)), []
    while rest:
        first, others = rest[0], rest[1:]
        room = bin_tokens - backlog.tokens[first]
        sums = SubsetSums(room)
        sums.extend([backlog.tokens[item] for item in others])
        held = [first, *(others[index] for index in sums.pick(sums.below(room)))]
        bins.append(held)
        rest = [item for item in rest if item not in held]
    return bins


def _join_blocks(backlog: Backlog, blocks: list[tuple[list[int], Layout]], bin_tokens: int) -> Layout:
    """Put the blocks one after another: the next block's last bin is merged into this one's where it fits, no-ops extend short gaps."""
    layout: Layout = []
    free_at = [0] * len(backlog.jobs)  # first slot where a job's next step may start
    for position, (jobs, bins) in enumerate(blocks):
        if not bins:  # its only bin was merged into the block before
            continue
        layout += [[] for _ in range(max(free_at[job] for job in jobs) - len(layout))]
        layout += [list(held) for held in bins]
        free_at = [len(layout) - 1 + backlog.gap if job in jobs else free for job, free in enumerate(free_at)]
        if position + 1 == len(blocks):
            break
        next_jobs, next_bins = blocks[position + 1]
        in_time = all(free_at[job] < len(layout) and job not in jobs for job in next_jobs)
        if in_time and _load(backlog, layout[-1]) + _load(backlog, next_bins[-1]) <= bin_tokens:
            layout[-1] += next_bins.pop()
            if not next_bins:
                free_at = [len(layout) - 1 + backlog.gap if job in next_jobs else free for job, free in enumerate(free_at)]
    return layout
