"""How long one stage's forward and backward take by themselves, for microbatches of different sizes, sample lengths and ranks.

`probe_slots` makes microbatches that tell the cost model's four terms apart; `measure_stage` runs a run's own microbatches through this
rank's stage alone (no pipeline, its input random), `measure_parts` a whole model's layers and head. Both give measurements for
scheduling.cost.refine. Passes are queued one behind another without waiting, behind some seconds of the same: a GPU at work for long lowers
its clock until it keeps to its power limit, and one that pauses between passes is up to a tenth quicker than in a run. Microbatches take
turns, large and small, as in a run: a small one's kernels are launched while a large one is at work, so that no pass waits for launches.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_lora.data.microbatch import StageInput
from megatron_lora.model.stage import Stage
from scheduling.cost import Measurement
from scheduling.types import Lengths, Microbatch, Segment

T = TypeVar("T")


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
        (mixed[::-1], capacity * 3 // 4),
        (mixed, capacity // 4),
        ([item for item in mixed if item[1] == 0], capacity),
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


def features(slot: Microbatch, lengths: Lengths, ranks: Sequence[int]) -> tuple[int, int, int]:
    """Return tokens, sum of squared lengths, and sum of tokens x rank."""
    squares = sum(lengths[s.job][s.step][sample] ** 2 for s in slot.segments for sample in s.samples)
    return slot.num_tokens, squares, sum(segment.num_tokens * ranks[segment.job] for segment in slot.segments)


class Stopwatch:
    """Times work on a device by its name, without waiting for it."""

    def __init__(self, device: torch.device):
        """`device`: where the work runs."""
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
    """Return the median seconds of what each work times, [{name: seconds}], over so many turns of them all; two before are not counted.

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


def stage_passes(stage: Stage, data: StageInput, rows: int, watch: Stopwatch) -> None:
    """Run a microbatch through the stage alone and time "forward" and "backward". `rows` are those of its input on this rank."""
    hidden = None
    if not stage.is_first:
        hidden = torch.randn(rows, stage.architecture.hidden_size, dtype=stage.dtype, device=stage.device).requires_grad_()

    def forward() -> Tensor:
        output = stage(data, hidden)
        return (stage.losses(output, data.labels, data.targets) * data.weights).sum() if stage.is_last else output

    output = watch.time("forward", forward)
    gradient = torch.randn_like(output) if output.dim() else torch.ones_like(output)
    watch.time("backward", lambda: output.backward(gradient))


def measure_stage(
    stage: Stage,
    index: int,
    slots: Sequence[Microbatch],
    load: Callable[[Microbatch], StageInput],
    multiple: int,
    of_slot: Callable[[Microbatch], tuple[int, int, int]],
    repeats: int = 3,
    warm: int = 6,
) -> list[Measurement]:
    """Time every slot on this rank's stage, `repeats` times, after `warm` passes of the last; adapter gradients are left dirty.

    `multiple` is the tensor ranks over which rows are cut (sequence parallelism), else 1; `of_slot` gives a slot's features. Ranks make
    passes in the same number, since those of a tensor group exchange rows.
    """
    loaded, measured = [(slot, load(slot)) for slot in slots], []

    def passes(data: StageInput, watch: Stopwatch) -> None:
        stage_passes(stage, data, data.tokens.shape[0] // multiple, watch)

    for _ in range(warm if stage.device.type == "cuda" and loaded else 0):
        passes(loaded[-1][1], Stopwatch(stage.device))
    turns = in_turns(stage.device, [partial(passes, data) for _, data in loaded], repeats)
    for (slot, _), times in zip(loaded, turns, strict=True):
        measured += [Measurement(index, name == "backward", *of_slot(slot), seconds) for name, seconds in times.items()]
    return measured


def measure_parts(
    stage: Stage,
    slots: Sequence[Microbatch],
    load: Callable[[Microbatch], StageInput],
    of_slot: Callable[[Microbatch], tuple[int, int, int]],
    repeats: int,
    warm: int = 40,
) -> tuple[list[Measurement], list[Measurement], float | None]:
    """Time a whole model's layers and head apart; returns (one layer's measurements, as stage 0; the head's, as stage 1; kept bytes).

    Kept bytes are per token and layer, at the first slot; None on CPU. Every slot is timed `repeats` times, after `warm` passes of the
    first. Adapter gradients are left dirty.
    """
    loaded, body, head = [(slot, load(slot)) for slot in slots], [], []
    kept = None
    if stage.device.type == "cuda":
        slot, data = loaded[0]
        held = [_parts(stage, data, Stopwatch(stage.device)) for _ in range(warm)]
        kept = statistics.median(held) / slot.num_tokens / len(stage.layers)
    turns = in_turns(stage.device, [partial(_parts, stage, data) for _, data in loaded], repeats)
    for (slot, _), times in zip(loaded, turns, strict=True):
        for back, whole, top in ((False, "forward", "loss"), (True, "backward", "loss's backward")):
            body.append(Measurement(0, back, *of_slot(slot), times[whole] / len(stage.layers)))
            head.append(Measurement(1, back, *of_slot(slot), times[top]))
    return body, head, kept


def _parts(stage: Stage, data: StageInput, watch: Stopwatch) -> int:
    """Time the layers' forward, the loss, the loss's backward and the layers' backward; return the bytes held after the first."""
    before = _allocated(stage.device)
    output = watch.time("forward", lambda: stage(data))
    held = _allocated(stage.device) - before
    top = output.detach().requires_grad_()
    loss = watch.time("loss", lambda: (stage.losses(top, data.labels, data.targets) * data.weights).sum())
    (gradient,) = watch.time("loss's backward", lambda: torch.autograd.grad(loss, top))
    watch.time("backward", lambda: output.backward(gradient))
    return held


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
