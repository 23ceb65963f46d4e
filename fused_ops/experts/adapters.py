"""The adapters of many jobs on one linear of all experts of a layer, as the operators see them.

Each expert has an A and a B of its own for each module: `a_ERK` stacks, expert by expert, the A of every adapter and targeted module;
`b_ERN[m]` stacks B transposed. Ranks are not rounded up. S [R, width] has the same columns for module m of every adapter,
m * max_rank and the following; with c' = c / (1 - p) it carries the scales as in lora/adapters.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.experts.rows_by_job import RowsByJob
from fused_ops.launch.optional_triton import constants
from fused_ops.lora.adapters import AdapterGroup
from fused_ops.lora.route import upload

# Columns of `ExpertGroup.adapter_table`; A_ROW and B_ROW are module 0's, MODULE_FIELDS before the next one's. A row is -1 without a target.
RANK, LEVEL, A_ROW, B_ROW = constants(*range(4))
MODULE_FIELDS, ADAPTER_FIELDS = constants(2, 8)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertGroup(AdapterGroup):
    """Views of the arena, contiguous; `adapters` has the ranks and scales of experts, and rows are those of each expert."""

    a_ERK: Tensor
    b_ERN: tuple[Tensor, ...]
    grad_a_ERK: Tensor
    grad_b_ERN: tuple[Tensor, ...]

    def beside(self, **views: Any) -> ExpertGroup:
        """Return the group of another layer, in which the same adapters have the same rows: one table serves both."""
        _ = self.max_rank, self.adapter_table, self.scale_table  # made here, and copied
        other = object.__new__(ExpertGroup)
        other.__dict__.update(self.__dict__, **views)
        return other

    @cached_property
    def max_rank(self) -> int:
        """The largest rank of those that target a module; 0: none does."""
        targeting = (r for r, rows in zip(self.adapters.ranks, self.a_rows, strict=True) if max(rows) >= 0)
        return max(targeting, default=0)

    @property
    def width(self) -> int:
        """Columns of S."""
        return self.num_modules * self.max_rank

    @cached_property
    def adapter_table(self) -> Tensor:
        """Return int32 [adapters, 8] on the device: rank, dropout level; A row and B row of each module."""
        rows = []
        for adapter, r in enumerate(self.adapters.ranks):
            row = [r, self.adapters.thresholds[adapter]]
            for pair in zip(self.a_rows[adapter], self.b_rows[adapter], strict=True):
                row += pair
            rows.append(row + [-1] * (8 - len(row)))
        return upload(torch.tensor(rows, dtype=torch.int32).view(-1, 8), self.a_ERK.device)

    @cached_property
    def scale_table(self) -> Tensor:
        """Return float32 [adapters] on the device: the factor that S and dS carry."""
        return upload(torch.tensor(self.adapters.effective_scales, dtype=torch.float32), self.a_ERK.device)


class Lora(NamedTuple):
    """What a grouped product adds to its own: S B^T, or in backward M * (dS A)."""

    s_RW: Tensor  # S, or dS
    group: ExpertGroup
    rows: RowsByJob
