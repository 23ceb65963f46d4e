"""A planned microbatch as tensors: what a stage needs to run one microbatch, and nothing else.

The T rows of a microbatch are the tokens of its samples, one sample after the other. `Packing` says
where samples begin, and the position of each row in its sample; `StageInput` adds tokens, labels,
loss weights and the route to the adapters; `Part` is a segment, to the objective of its job. Of a
pair each sequence is a sample here. Under sequence parallelism T is a multiple of the
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
class Pairs:
    """The n pairs of a segment, as its rows lie: chosen, rejected, chosen, ...; or n labelled answers, of one sequence each.

    With s sequences to each, `edges` int64 [s n + 1]: the rows of the segment where sequences begin, and their end; `longest` of these has
    the most rows. `num_targets` fp32 [n, s]. `places` int64 [n]: of each pair among the job's, those of validation behind those of
    training. A pair weighs `pair_weight` = 1 / pairs of its batch, a chosen target `token_weight` = 1 / chosen targets of its batch, or
    with orpo all tokens of a chosen sequence but the first likewise; a batch is the global one, or the validation set. `weights` fp32
    [n]: those of the records, of which each loss is a multiple. `is_desirable` bool [n]: the labels, true for all pairs, of which there
    are `num_desirable` in the batch.
    """

    edges: Tensor
    longest: int
    num_targets: Tensor
    places: Tensor
    pair_weight: float
    token_weight: float
    weights: Tensor
    is_desirable: Tensor
    num_desirable: int

    @property
    def num_undesirable(self) -> int:
        """Labels of the batch that are false."""
        return round(1 / self.pair_weight) - self.num_desirable


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows first .. end - 1, the segment of a job at a step; `pairs` for preference objectives alone.

    `batch` is the step, or of a validation set VALIDATION - the steps that its weights have taken.
    """

    job: int
    step: int
    first: int
    end: int
    batch: int
    pairs: Pairs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """One microbatch for one stage: `tokens`, `labels` (-100: none) int64 [T], `weights` fp32 [T], packing and route.

    `targets` int64 lists the rows that have a label, in order, so that the loss computes no others;
    None where they are not listed. `parts` are the segments that have rows, in order; the route has those
    with an adapter.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    packing: Packing
    route: Route | None
    targets: Tensor | None = None
    parts: tuple[Part, ...] = ()
