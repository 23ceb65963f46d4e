"""LoRAFusion's published schedule, from its description: paired jobs, packed global batches, no-ops where gaps are short.

Jobs are sorted by mean sample length; the longest is paired with the shortest as long as the other jobs together supply at least
P - 1 microbatches per step (the estimate for a step is ceil(mean tokens of a step / capacity)); otherwise it remains
single. Per step and group: fewest bins, the last as small as it can be; then, for each step, for each group, bins by falling load.
The last bins of neighbouring groups are merged, at the earlier one's position, where they fit and gaps remain long enough; no-ops are
put before a group whose gap is too short. Instead of an integer program, bins are filled one by one with the fullest exact subset,
which makes the last one smallest in nearly all cases; a job without further steps drops out of its group.
"""

from __future__ import annotations

from scheduling.backlog import Backlog, Layout
from scheduling.subset_sum import SubsetSums


def grouped_layout(backlog: Backlog, bin_tokens: int) -> Layout:
    """Lay out a complete backlog with bins of at most `bin_tokens` tokens (at least the longest sample)."""
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
