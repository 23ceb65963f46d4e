"""Warm-up: passes over dummy microbatches of several sizes, which compile all kernels and allocate their memory.

A stage compiles its kernels when it first runs them. In a pipeline the first microbatch would wait for
each stage to compile in turn, in its forward and again in its backward. Here all stages compile at the
same time, and the first step is as fast as the others. A microbatch that is too large for the device
fails here, before any training. No message is in flight during the warm-up, so loading a kernel cannot
deadlock with a kernel that waits for a message (executor.py).

    warm_up(stage, arena, num_rows=4096, adapters=specs)        # before the executor runs; the same on every rank of a stage

Kernels are compiled for the largest rank among the resident adapters, in classes (16, 32, 64, ...), for the
modules that these target, and with or without dropout. As residents come and go, any adapter may be the
largest, and one with dropout beside it or not. Hence a round for each such variant besides the one with
those that are resident. Evaluation has kernels of its own: without dropout, and without a graph. Hence
each microbatch is evaluated too.

No state changes. Adapter gradients are zero before and are zeroed after; dropout uses no random
generator; the optimizer's kernel runs over no elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_ops.elementwise.adamw import adamw_
from fused_ops.launch.shapes import rank_class
from fused_ops.lora.route import make_route
from megatron_lora.data.microbatch import Packing, StageInput
from megatron_lora.errors import UserError
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import FREE_ROW, AdapterSpec, room_of
from megatron_lora.model.stage import Stage

SMALLEST_ROWS = 1024  # smaller microbatches use the same kernels
_SAMPLE_TOKENS = 1024


def warm_up(stage: Stage, arena: Arena, num_rows: int, multiple: int = 1, adapters: Sequence[AdapterSpec] = ()) -> None:
    """Run a stage over dummy microbatches of `num_rows`, `num_rows` / 2, ... rows; parameters, adapters and generators stay as they are.

    `adapters` are those that will or may come, besides those that are resident. Those that can never fit are left out.
    `num_rows` is the largest microbatch of the run. Rows are rounded up to a multiple of `multiple`, the
    number of tensor ranks under sequence parallelism. Raises UserError if one does not fit in memory.
    """
    stage.reserve_host_memory(-(-num_rows // multiple))
    resident = [spec for spec in arena.specs if spec is not FREE_ROW]
    rounds = [resident, *([variant] for variant in variants([*resident, *adapters]) if variants(resident) != [variant])]
    for shown in rounds:
        if not shown or any(rows > arena.room.get(module, 0) for module, rows in room_of(shown).items()):
            continue
        with arena.showing(shown):
            for rows in _sizes(num_rows):
                _try(stage, -(-rows // multiple) * multiple, multiple, len(shown))
    arena.grad.zero_()
    nothing = torch.zeros(1, 3, dtype=torch.int64, device=stage.device)
    settings = torch.zeros(1, 10, dtype=torch.float32, device=stage.device)
    adamw_(arena.master, arena.grad, arena.exp_avg, arena.exp_avg_sq, arena.compute, nothing, settings)


def variants(adapters: Sequence[AdapterSpec]) -> list[AdapterSpec]:
    """Return an adapter for each kind of kernels that any of these need, alone or as the largest beside others."""
    dropout = max((spec.dropout for spec in adapters), default=0.0)
    found: dict[tuple[int, int, frozenset[str], bool], AdapterSpec] = {}
    for spec in adapters:
        for p in (spec.dropout, dropout):
            classes = rank_class(spec.r), rank_class(spec.expert_rank) if spec.expert_rank else 0
            found.setdefault((*classes, spec.target_modules, p > 0), replace(spec, dropout=p))
    return list(found.values())


def _try(stage: Stage, rows: int, multiple: int, num_jobs: int) -> None:
    try:
        for dropout in (True, False):
            _pass(stage, dummy(rows, num_jobs, stage.device, dropout), rows // multiple)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"microbatch_tokens: {rows} tokens do not fit ({reason}); use fewer, or recompute: auto, or more ranks") from None


def _sizes(num_rows: int) -> Sequence[int]:
    """Return `num_rows`, its half, the half of that, ... down to at most SMALLEST_ROWS."""
    sizes = [num_rows]
    while sizes[-1] > SMALLEST_ROWS:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _pass(stage: Stage, data: StageInput, local_rows: int) -> None:
    """Train a microbatch forward and backward; evaluate it if its route has no dropout."""
    assert data.route is not None
    trains, hidden = data.route.dropout, None
    if not stage.is_first:
        hidden = torch.zeros(local_rows, stage.architecture.hidden_size, dtype=stage.dtype, device=stage.device).requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        output = stage(data, hidden)
        if not stage.is_last:
            ends = output
        elif trains:
            ends = (stage.losses(output, data.labels, data.targets) * data.weights).sum()
        else:
            ends, _ = stage.evaluate(output, data.labels, data.targets)
    if trains:
        ends.backward(torch.ones_like(ends))


def dummy(num_rows: int, num_jobs: int, device: torch.device, dropout: bool = True) -> StageInput:
    """Return a microbatch whose rows are divided evenly among all jobs; without `dropout`, one to evaluate."""
    lengths = [min(_SAMPLE_TOKENS, num_rows - first) for first in range(0, num_rows, _SAMPLE_TOKENS)]
    edges = [num_rows * job // num_jobs for job in range(num_jobs + 1)]
    segments = [(first, end, job) for job, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)) if end > first]

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_rows, dtype=dtype, device=device)

    return StageInput(
        tokens=zeros(torch.int64),
        labels=zeros(torch.int64),
        targets=torch.arange(num_rows, device=device),
        weights=zeros(torch.float32) + 1.0,
        packing=Packing(
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
            lengths=tuple(lengths),
            positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
            max_length=max(lengths),
        ),
        route=make_route(num_rows, segments, zeros(torch.int32), device, dropout),
    )
