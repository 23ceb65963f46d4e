"""How long the parts of a stage take by themselves, for microbatches of different sizes, sample lengths and jobs.

Passes are queued one behind another without waiting, behind two turns of the same: a GPU at work for long lowers its clock until it keeps
to its power limit, and one that pauses between passes is up to a tenth quicker than in a run. Microbatches take turns, large and small,
as in a run: a small one's kernels are launched while a large one is at work, so that no pass waits for launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from megatron_lora.data.microbatch import StageInput
from megatron_lora.model.stage import Stage
from megatron_lora.output.timeline import Timeline
from scheduling.plan_json import stream_from_json
from scheduling.types import Lengths, Microbatch

Work = Callable[[Timeline], object]  # times its parts as spans of the timeline


def in_turns(device: torch.device, works: Sequence[Work], choose: Callable[[float], tuple[int, int]]) -> list[dict[str, float]]:
    """Return the median seconds of what each work times, [{name: seconds}], over some turns of the first works.

    `choose` returns how many works and turns these are, given the seconds of the first work alone. One turn before is not counted,
    which may compile kernels and is waited for, and on a GPU a second, which lets the host get ahead.
    """

    def once(work: Work) -> float:
        begin, watch = time.perf_counter(), Timeline(device)
        work(watch)
        watch.wait()
        return time.perf_counter() - begin

    num_works, num_turns = choose(once(works[0]))
    for work in works[1:num_works]:
        once(work)
    ahead = int(device.type == "cuda")
    watches = [Timeline(device) for _ in works[:num_works]]
    for _ in range(ahead + num_turns):
        for work, watch in zip(works, watches, strict=False):
            work(watch)
    return [{name: statistics.median(times[ahead:]) for name, times in watch.seconds().items()} for watch in watches]


def time_parts(stage: Stage, load: Callable[[], StageInput], multiple: int, watch: Timeline) -> None:
    """Time "forward" and "backward" of a stage's layers over a microbatch, and on the last stage "loss" and "loss's backward".

    Its input is random; `multiple` is the tensor ranks over which rows are cut (sequence parallelism), else 1. Adapter gradients are added
    to the arena.
    """
    with watch.span("forward"):
        data, hidden = load(), None
        if not stage.is_first:
            rows = data.tokens.shape[0] // multiple
            hidden = torch.randn(rows, stage.architecture.hidden_size, dtype=stage.dtype, device=stage.device).requires_grad_()
        output = stage(data, hidden)
    gradient = torch.ones_like(output)
    if stage.is_last:
        top = output.detach().requires_grad_()
        with watch.span("loss"):
            loss = (stage.losses(top, data.labels, data.targets) * data.weights).sum()
        with watch.span("loss's backward"):
            (gradient,) = torch.autograd.grad(loss, top)
    with watch.span("backward"):
        output.backward(gradient)


def probe_slots(lengths: Lengths, capacity: int) -> tuple[Microbatch, ...]:
    """Return microbatches of first steps' samples: full and smaller, of long and of short samples, of all jobs and of one."""
    pool = [(tokens, job, sample) for job, steps in enumerate(lengths) for sample, tokens in enumerate(steps[0]) if tokens <= capacity]
    mixed = sorted(pool, key=lambda item: (item[2], item[1]))
    last = max(job for _, job, _ in pool)
    wanted = [  # the most telling first
        (mixed, capacity // 4),
        (sorted(pool, reverse=True), capacity),
        (sorted(pool), capacity),
        (mixed, capacity // 2),
        ([item for item in mixed if item[1] == last], capacity),
        (mixed, capacity),
    ]
    slots = [_fill(items, size) for items, size in wanted]
    return tuple(dict.fromkeys(slot for slot in slots if slot.num_tokens))


def _fill(items: Sequence[tuple[int, int, int]], capacity: int) -> Microbatch:
    """Take samples in order while they fit."""
    taken, room = [], capacity
    for tokens, job, sample in items:
        if tokens <= room:
            taken.append((job, 0, sample, tokens))
            room -= tokens
    return stream_from_json([sorted(taken)])[0]
