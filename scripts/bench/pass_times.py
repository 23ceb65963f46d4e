"""How long one stage's forward and backward take by themselves, for microbatches of different sizes, sample lengths and ranks.

`probe_slots` makes microbatches that tell the cost model's four terms apart; `measure_stage` runs a run's own microbatches through this
rank's stage alone (no pipeline, its input random), `measure_parts` a whole model's layers and head. Both give measurements for
scheduling.cost.refine.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_lora.base_model import Stage
from megatron_lora.microbatch import StageInput
from scheduling.cost import Measurement
from scheduling.types import Lengths, Microbatch, Segment

T = TypeVar("T")
AHEAD, MOST_CYCLES_PER_S = 1.2, 2e9  # of the host's time, and of a GPU
LONGEST_SLEEP_S = 1.0  # the first time a kernel is compiled, the host takes far longer


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
    """Times work on a device, by its name; on a GPU without the launches of it, which in a run the host makes ahead.

    The device sleeps while the host launches: for as long as the work of that name took the host when it was quickest. The first time
    counts launches too, where they take longer than the work.
    """

    def __init__(self, device: torch.device):
        """`device`: where the work runs."""
        self.device, self.host_s = device, {}

    def time(self, name: str, work: Callable[[], T]) -> tuple[T, float]:
        """Return what the work returns and the seconds that it takes on the device."""
        start = time.perf_counter()
        if self.device.type != "cuda":
            return work(), time.perf_counter() - start
        torch.cuda._sleep(int(min(LONGEST_SLEEP_S, AHEAD * self.host_s.get(name, 0.0)) * MOST_CYCLES_PER_S))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        begin.record()
        result = work()
        end.record()
        self.host_s[name] = min(time.perf_counter() - start, self.host_s.get(name, LONGEST_SLEEP_S))
        end.synchronize()
        return result, begin.elapsed_time(end) / 1e3


def stage_passes(stage: Stage, data: StageInput, rows: int, watch: Stopwatch) -> tuple[float, float]:
    """Run a microbatch through the stage alone; return seconds of forward and backward. `rows` are those of its input on this rank."""
    hidden = None
    if not stage.is_first:
        hidden = torch.randn(rows, stage.architecture.hidden_size, dtype=stage.dtype, device=stage.device).requires_grad_()

    def forward() -> Tensor:
        output = stage(data, hidden)
        return (stage.losses(output, data.labels, data.targets) * data.weights).sum() if stage.is_last else output

    output, forward_s = watch.time("forward", forward)
    gradient = torch.randn_like(output) if output.dim() else torch.ones_like(output)
    _, backward_s = watch.time("backward", lambda: output.backward(gradient))
    return forward_s, backward_s


def measure_stage(
    stage: Stage,
    index: int,
    slots: Sequence[Microbatch],
    load: Callable[[Microbatch], StageInput],
    multiple: int,
    of_slot: Callable[[Microbatch], tuple[int, int, int]],
    repeats: int = 3,
) -> list[Measurement]:
    """Time every slot on this rank's stage, `repeats` times after one that is not counted; adapter gradients are left dirty.

    `multiple` is the tensor ranks over which rows are cut (sequence parallelism), else 1; `of_slot` gives a slot's features.
    """
    measured = []
    for slot in slots:
        data, watch = load(slot), Stopwatch(stage.device)
        rows = data.tokens.shape[0] // multiple
        passes = [stage_passes(stage, data, rows, watch) for _ in range(repeats + 1)][1:]
        tokens, squares, rank_tokens = of_slot(slot)
        for backward in (False, True):
            seconds = statistics.median(each[backward] for each in passes)
            measured.append(Measurement(index, backward, tokens, squares, rank_tokens, seconds))
    return measured


def measure_parts(
    stage: Stage,
    slots: Sequence[Microbatch],
    load: Callable[[Microbatch], StageInput],
    of_slot: Callable[[Microbatch], tuple[int, int, int]],
    repeats: int,
) -> tuple[list[Measurement], list[Measurement], float | None]:
    """Time a whole model's layers and head apart; returns (one layer's measurements, as stage 0; the head's, as stage 1; kept bytes).

    Kept bytes are per token and layer, at the first slot; None on CPU. Adapter gradients are left dirty.
    """
    body, head, kept = [], [], None
    for slot in slots:
        data, watch = load(slot), Stopwatch(stage.device)
        passes = [_parts(stage, data, watch) for _ in range(repeats + 1)][1:]
        forward, loss, loss_back, backward, held = (statistics.median(each[k] for each in passes) for k in range(5))
        if kept is None and stage.device.type == "cuda":
            kept = held / slot.num_tokens / len(stage.layers)
        for back, whole, top in ((False, forward, loss), (True, backward, loss_back)):
            body.append(Measurement(0, back, *of_slot(slot), whole / len(stage.layers)))
            head.append(Measurement(1, back, *of_slot(slot), top))
    return body, head, kept


def _parts(stage: Stage, data: StageInput, watch: Stopwatch) -> tuple[float, float, float, float, int]:
    """Return seconds of the layers' forward, the loss, the loss's backward and the layers' backward; bytes held after the first."""
    before = _allocated(stage.device)
    output, forward_s = watch.time("forward", lambda: stage(data))
    held = _allocated(stage.device) - before
    top = output.detach().requires_grad_()
    loss, loss_s = watch.time("loss", lambda: (stage.losses(top, data.labels, data.targets) * data.weights).sum())
    (gradient,), loss_back_s = watch.time("loss's backward", lambda: torch.autograd.grad(loss, top))
    _, backward_s = watch.time("backward", lambda: output.backward(gradient))
    return forward_s, loss_s, loss_back_s, backward_s, held


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
