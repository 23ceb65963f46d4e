"""Which of the experts' rows belong to which job: tensors on the device, made without a host sync.

Rows lie by expert, then by token; a job's tokens are one segment, so that of each expert the rows of a job lie together. With
o(r) = expert(r) * (T + 1) + token(r), which ascends, those of expert e and segment [first, end) are where
e * (T + 1) + first <= o(r) < e * (T + 1) + end. A stretch is the rows of an expert and a segment; stretches are in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fused_ops.experts.route import ExpertRoute
from fused_ops.lora.dropout import FEATURE
from fused_ops.lora.route import Route

BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RowsByJob:
    """The stretches of a microbatch at one layer."""

    bounds: Tensor  # int32 [experts, segments, 2]: the first row of each stretch, and its end
    keys_R: Tensor  # int32: the dropout key of each row, another one for each expert of a token
    segments: Tensor  # int32 [segments, 4] (Route.segment_table)
    adapters: tuple[int, ...]  # of the segments

    @cached_property
    def blocks(self) -> Tensor:
        """Return int32 [n, 3] of blocks of at most BLOCK_ROWS rows of one stretch: the stretch, first row, end; the last ones are empty."""
        size, num_stretches, num_rows = BLOCK_ROWS, self.bounds[..., 0].numel(), len(self.keys_R)
        first, end = self.bounds.view(-1, 2).unbind(1)
        counts = (end - first + (size - 1)) // size
        after = counts.cumsum(0)
        index = torch.arange(num_rows // size + num_stretches, device=first.device)  # no more are full, or the last of their stretch
        stretch = torch.searchsorted(after, index, right=True).clamp_(max=num_stretches - 1)
        row = (first[stretch] + (index - (after - counts)[stretch]) * size).minimum(end[stretch])
        return torch.stack([stretch, row, (row + size).minimum(end[stretch])], 1).to(torch.int32)


def rows_by_job(route: ExpertRoute, expert_Tk: Tensor, segments: Route, first_expert: int = 0) -> RowsByJob:
    """Find the rows of each of this rank's experts, of which `first_expert` is the first, and each segment."""
    (num_tokens, top_k), device = expert_Tk.shape, expert_Tk.device
    num_experts, place = len(route.first_E) - 1, route.place_Tk.flatten().long()
    place = torch.where(place < 0, len(place), place)  # rows of other ranks go behind all
    token, expert = (torch.full((len(place) + 1,), last, dtype=torch.int64, device=device) for last in (0, num_experts))
    token.scatter_(0, place, torch.arange(num_tokens, device=device).repeat_interleave(top_k))
    expert.scatter_(0, place, expert_Tk.flatten().long() - first_expert)
    token, expert = token[:-1], expert[:-1]
    wanted = torch.arange(num_experts, device=device)[:, None, None] * (num_tokens + 1) + segments.segment_table[None, :, :2]
    return RowsByJob(
        bounds=torch.searchsorted(expert * (num_tokens + 1) + token, wanted).to(torch.int32),
        keys_R=segments.row_keys[token] ^ ((expert + first_expert).to(torch.int32) * FEATURE),
        segments=segments.segment_table,
        adapters=tuple(adapter for _, _, adapter in segments.segments),
    )
