"""From sample lengths to a stream: a dependency-aware greedy, tried at several target sizes.

A slot is filled up to a target size from the *ready* jobs (those whose previous step ended at least P + delay slots ago): jobs with
a started step first, so that a step sits in few slots and its gap starts early; then those with the longest remaining critical path.
The candidate with the smallest predicted makespan wins. Deterministic: no clock, no randomness, ties broken by index.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.types import Lengths, Microbatch, PlanError, Segment, Stream


def check_workload(lengths: Lengths, capacity: int) -> None:
    """Raise PlanError, naming the sample, where no plan can exist: empty steps, empty samples, samples over the budget."""
    for job, steps in enumerate(lengths):
        for step, batch in enumerate(steps):
            if not batch:
                raise PlanError(f"job {job} step {step} has no samples")
            for sample, tokens in enumerate(batch):
                if not 0 < tokens <= capacity:
                    raise PlanError(f"job {job} step {step} sample {sample} has {tokens} tokens; the budget is 1 to {capacity}")


def plan_stream(lengths: Lengths, num_stages: int, capacity: int, delay: int = 0) -> Stream:
    """Plan a whole workload as one stream (without drain slots); steps of a job are at least num_stages + delay slots apart."""
    check_workload(lengths, capacity)
    longest = max((tokens for steps in lengths for batch in steps for tokens in batch), default=0)
    candidates = [greedy(lengths, num_stages + delay, capacity, target) for target in _targets(longest, capacity)]
    return min(candidates, key=lambda stream: _rough_makespan(stream, num_stages))


def _targets(longest: int, capacity: int) -> list[int]:
    """Target sizes from a quarter of the budget to all of it."""
    return sorted({max(1, min(capacity, capacity * k // 16)) for k in range(4, 17)}, reverse=True)


def _rough_makespan(stream: Stream, num_stages: int) -> float:
    """Largest-slot pace of fill and drain plus the slots' own time, in tokens (128 per slot for launches)."""
    costs = [microbatch.num_tokens + 128 if microbatch.segments else 0 for microbatch in stream]
    windows = [max(costs[i : i + num_stages]) for i in range(len(costs))]
    return sum(windows) + (num_stages - 1) * max(costs, default=0)


def greedy(lengths: Lengths, gap: int, capacity: int, target: int) -> Stream:
    """Fill slot after slot up to `target` tokens from the ready jobs; a slot for which no job is ready becomes a no-op."""
    num_jobs = len(lengths)
    step, free_at = [0] * num_jobs, [0] * num_jobs
    rest = [_by_length(steps[0]) if steps else [] for steps in lengths]  # samples of the current step, longest first
    path = [sum(max(1.0, sum(batch) / capacity) + gap - 1 for batch in steps) for steps in lengths]
    stream: list[Microbatch] = []
    while any(rest):
        ready = [job for job in range(num_jobs) if rest[job] and free_at[job] <= len(stream)]
        ready.sort(key=lambda job: (len(rest[job]) == len(lengths[job][step[job]]), -path[job], job))
        room, segments = max(target, 1), []
        for job in ready:
            batch, taken = lengths[job][step[job]], []
            for sample in list(rest[job]):
                if batch[sample] <= room or not (segments or taken):  # an empty slot takes a sample that is over the target
                    taken.append(sample)
                    rest[job].remove(sample)
                    room -= batch[sample]
            if taken:
                tokens = sum(batch[sample] for sample in taken)
                segments.append(Segment(job, step[job], tuple(taken), tokens))
                path[job] -= tokens / capacity
            if not rest[job]:
                path[job] -= gap - 1
                step[job] += 1
                free_at[job] = len(stream) + gap
                if step[job] < len(lengths[job]):
                    rest[job] = _by_length(lengths[job][step[job]])
        stream.append(Microbatch(tuple(segments)))
    return tuple(stream)


def _by_length(batch: Sequence[int]) -> list[int]:
    return sorted(range(len(batch)), key=lambda sample: (-batch[sample], sample))
