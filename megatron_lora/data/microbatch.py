"""A planned microbatch as tensors: what a stage needs to run one microbatch, and nothing else.

The T rows of a microbatch are the tokens of its samples, one sample after the other. `Packing` says
where samples begin, and the position of each row in its sample; `StageInput` adds tokens, labels,
loss weights and the route to the adapters. Under sequence parallelism T is a multiple of the
tensor-parallel size: the rows that pad it are one more sample with label -100 and weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fused_ops.lora.route import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where each sample lies among the T rows of a microbatch.

    `cu_seqlens` int32 [samples + 1] and `positions` int64 [T] are on the device; `lengths` (tokens
    per sample, summing to T) and `max_length` are on the host, so that no kernel launch has to wait
    for the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    max_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """One microbatch for one stage: `tokens`, `labels` (-100: none) int64 [T], `weights` fp32 [T], packing and route.

    `targets` int64 lists the rows that have a label, in order, so that the loss computes no others;
    None where they are not listed. `jobs` are the numbers of the route's segments, whose own third
    entry is the job's adapter row.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    packing: Packing
    route: Route | None
    targets: Tensor | None = None
    jobs: tuple[int, ...] = ()
