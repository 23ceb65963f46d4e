"""How long the parts of a stage take by themselves, for microbatches of different sizes, sample lengths and jobs.

Passes are queued one behind another without waiting, behind two turns of the same: a GPU at work for long lowers its clock until it keeps
to its power limit, and one that pauses between passes is up to a tenth quicker than in a run. Microbatches take turns, large and small,
as in a run: a small one's kernels are launched while a large one is at work, so that no pass waits for launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_lora.data.microbatch import StageInput
from megatron_lora.model.stage import Stage
from scheduling.types import Lengths, Microbatch, Segment

T = TypeVar("T")


class Stopwatch:
    """Times work on a device by its name, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Return what the work returns; on a GPU it is launched, and timed from when the device begins it."""
        begin = self._now()
        result = work()
        self._spans.append((name, begin, self._now()))
        return result

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, list[float]]:
        """Wait for the device; return the seconds of everything timed so far, {name: [seconds in order]}."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, list[float]] = {}
        for name, begin, end in self._spans:
            found.setdefault(name, []).append(begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin)
        return found


def in_turns(device: torch.device, works: Sequence[Callable[[Stopwatch], object]], repeats: int) -> list[dict[str, float]]:
    """Return the median seconds of what each work times, [{name: seconds}], over `repeats` turns of them all; two before are not counted.

    The first of the two may compile kernels and is waited for; the second lets the host get ahead.
    """
    for work in works:
        work(Stopwatch(device))
    watches = [Stopwatch(device) for _ in works]
    Stopwatch(device).seconds()
    for _ in range(repeats + 1):
        for work, watch in zip(works, watches, strict=True):
            work(watch)
    return [{name: statistics.median(times[1:]) for name, times in watch.seconds().items()} for watch in watches]


def time_parts(stage: Stage, load: Callable[[], StageInput], multiple: int, watch: Stopwatch) -> None:
    """Time "forward" and "backward" of a stage's layers over a microbatch, and on the last stage "loss" and "loss's backward".

    Its input is random; `multiple` is the tensor ranks over which rows are cut (sequence parallelism), else 1. Adapter gradients are added
    to the arena.
    """

    def forward() -> tuple[StageInput, Tensor]:
        data, hidden = load(), None
        if not stage.is_first:
            rows = data.tokens.shape[0] // multiple
            hidden = torch.randn(rows, stage.architecture.hidden_size, dtype=stage.dtype, device=stage.device).requires_grad_()
        return data, stage(data, hidden)

    data, output = watch.time("forward", forward)
    gradient = torch.ones_like(output)
    if stage.is_last:
        top = output.detach().requires_grad_()
        loss = watch.time("loss", lambda: (stage.losses(top, data.labels, data.targets) * data.weights).sum())
        (gradient,) = watch.time("loss's backward", lambda: torch.autograd.grad(loss, top))
    watch.time("backward", lambda: output.backward(gradient))


def probe_slots(lengths: Lengths, capacity: int) -> tuple[Microbatch, ...]:
    """Return microbatches of first steps' samples: full and smaller, of long and of short samples, of all jobs and of one."""
    pool = [(tokens, job, sample) for job, steps in enumerate(lengths) for sample, tokens in enumerate(steps[0]) if tokens <= capacity]
    mixed = sorted(pool, key=lambda item: (item[2], item[1]))
    last = max(job for _, job, _ in pool)
    wanted = [
        (mixed, capacity),
        (sorted(pool), capacity),
        (sorted(pool, reverse=True), capacity),
        (mixed, capacity // 2),
        (mixed, capacity // 4),
        ([item for item in mixed if item[1] == last], capacity),
    ]
    slots = [_fill(items, size) for items, size in wanted]
    return tuple(dict.fromkeys(slot for slot in slots if slot.num_tokens))


def _fill(items: Sequence[tuple[int, int, int]], capacity: int) -> Microbatch:
    """Take samples in order while they fit."""
    taken: dict[int, list[tuple[int, int]]] = {}
    room = capacity
    for tokens, job, sample in items:
        if tokens <= room:
            taken.setdefault(job, []).append((sample, tokens))
            room -= tokens
    return Microbatch(
        tuple(Segment(job, 0, tuple(s for s, _ in chosen), sum(t for _, t in chosen)) for job, chosen in sorted(taken.items()))
    )
