"""Adapters as the operators see them: a table of their settings, and one group of arena views per patched linear.

Layout (rank-major): `a_RK` stacks the A of every adapter and targeted module, adapter by adapter and then module by module;
`b_RN[m]` stacks B transposed of every adapter that targets module m. Each has its rank rounded up to 16 rows, the extra rows zero,
so that one stride and integer row offsets address them all. An adapter's S [T, r] holds its modules in the order of its A rows.

S and dS carry the scales: with c' = c / (1 - p), S = c' (M * X) A^T and dS = c' dY B, so that
Y += S B^T, dB = dY^T S, dA = dS^T (M * X) and dX += M * (dS A) need no further factor.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fused_ops.launch.optional_triton import constants
from fused_ops.lora.dropout import MAX_MODULES, quantised_p, threshold
from fused_ops.lora.route import upload

RANK_ALIGN = 16
MAX_RANK = 256
# Columns of `LoraGroup.adapter_table`, as its kernels read them; A_ROW to S_COLUMN are module 0's, MODULE_FIELDS before the next one's.
LORA_RANK, LEVEL, S_WIDTH, FIRST_A_ROW, A_ROW, B_ROW, S_COLUMN = constants(*range(7))
MODULE_FIELDS, ADAPTER_FIELDS = constants(3, 16)


def padded_rank(r: int) -> int:
    """Return the rows that rank `r` takes in the arena: `r` rounded up to 16."""
    return -(-r // RANK_ALIGN) * RANK_ALIGN


@dataclass(frozen=True, kw_only=True)
class AdapterTable:
    """Rank, scale (alpha / r) and dropout of each resident adapter. Raises ValueError on values outside their range."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]

    def __post_init__(self):
        if not len(self.ranks) == len(self.scales) == len(self.dropouts):
            raise ValueError(f"{len(self.ranks)} ranks, {len(self.scales)} scales and {len(self.dropouts)} dropouts differ in number")
        for adapter, r in enumerate(self.ranks):
            if not 1 <= r <= MAX_RANK:
                raise ValueError(f"adapter {adapter}: rank {r} is not in 1..{MAX_RANK}")
            threshold(self.dropouts[adapter])

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def thresholds(self) -> tuple[int, ...]:
        """Return each adapter's dropout level of 1024 (see fused_ops.lora.dropout)."""
        return tuple(threshold(p) for p in self.dropouts)

    @cached_property
    def effective_scales(self) -> tuple[float, ...]:
        """Return c / (1 - p) of each adapter, with the quantised p: the one factor that S and dS carry."""
        return tuple(c / (1.0 - quantised_p(p)) for c, p in zip(self.scales, self.dropouts, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterGroup:
    """What the adapters of a linear, and those of one of all experts, have in common.

    columns[m] = (start, stop): module m writes Y[:, start:stop]. a_rows, b_rows: [adapter][module] -> first row, -1 = not targeted.
    first_feature is the global index of the input's local column 0 (row-parallel shards), for dropout.
    """

    columns: tuple[tuple[int, int], ...]
    a_rows: tuple[tuple[int, ...], ...]
    b_rows: tuple[tuple[int, ...], ...]
    adapters: AdapterTable
    first_feature: int = 0

    def __post_init__(self):
        if self.first_feature % 2:
            raise ValueError(f"first_feature {self.first_feature} is odd: dropout hashes features in pairs")

    @property
    def num_modules(self) -> int:
        """Return how many modules the merged linear holds."""
        return len(self.columns)

    @cached_property
    def has_dropout(self) -> bool:
        """Return whether any adapter has dropout."""
        return any(self.adapters.thresholds)

    @cached_property
    def without_dropout(self) -> Self:
        """Return the same adapters without dropout, as evaluation uses them."""
        return replace(self, adapters=replace(self.adapters, dropouts=(0.0,) * len(self.adapters))) if self.has_dropout else self


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraGroup(AdapterGroup):
    """The adapters of one linear: arena views (see the header) plus geometry. Raises ValueError where they do not fit together.

    a_RK [R, K] and b_RN[m] [R_m, N_m] in the compute dtype, contiguous; grad_* of the same shapes in float32: backward adds into them.
    """

    a_RK: Tensor
    b_RN: tuple[Tensor, ...]
    grad_a_RK: Tensor
    grad_b_RN: tuple[Tensor, ...]

    def __post_init__(self):
        super().__post_init__()
        _check_tensors(self)
        _check_rows(self)

    def beside(self, **views: Any) -> "LoraGroup":
        """Return the group of another linear, in which the same adapters have the same rows: one table serves both.

        `views` are all fields but a_rows, b_rows and adapters. Of them only the number of rows is checked: this takes no time
        where hundreds of linears change at once.
        """
        _ = self.width, self.max_padded_rank, self.has_dropout, self.adapter_table, self.scale_table  # made here, and copied
        other = object.__new__(LoraGroup)
        other.__dict__.update(self.__dict__, **views)
        if [each.shape[0] for each in (other.a_RK, *other.b_RN)] != [each.shape[0] for each in (self.a_RK, *self.b_RN)]:
            raise ValueError(f"A {list(other.a_RK.shape)} has other rows than A {list(self.a_RK.shape)}")
        return other

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Return the columns of S that each adapter uses: its padded rank times its targeted modules."""
        return tuple(padded_rank(r) * sum(row >= 0 for row in rows) for r, rows in zip(self.adapters.ranks, self.a_rows, strict=True))

    @cached_property
    def width(self) -> int:
        """Return the columns of S: the widest adapter's."""
        return max(self.widths, default=0)

    @cached_property
    def max_padded_rank(self) -> int:
        """Return the largest padded rank among adapters that target a module of this linear."""
        return max((padded_rank(r) for r, width in zip(self.adapters.ranks, self.widths, strict=True) if width), default=0)

    def s_column(self, adapter: int, module: int) -> int:
        """Return the first column of S of an adapter's module, -1 when the adapter does not target it."""
        if self.a_rows[adapter][module] < 0:
            return -1
        return sum(row >= 0 for row in self.a_rows[adapter][:module]) * padded_rank(self.adapters.ranks[adapter])

    @cached_property
    def adapter_table(self) -> Tensor:
        """Return int32 [adapters, 16] on the device: padded rank, dropout level, width, first A row; A row, B row, S column per module."""
        rows = []
        for adapter, r in enumerate(self.adapters.ranks):
            first = min((row for row in self.a_rows[adapter] if row >= 0), default=-1)
            row = [padded_rank(r), self.adapters.thresholds[adapter], self.widths[adapter], first]
            for module in range(self.num_modules):
                row += [self.a_rows[adapter][module], self.b_rows[adapter][module], self.s_column(adapter, module)]
            rows.append(row + [-1] * (16 - len(row)))
        return upload(torch.tensor(rows, dtype=torch.int32).view(-1, 16), self.a_RK.device)

    @cached_property
    def scale_table(self) -> Tensor:
        """Return float32 [adapters] on the arena's device: the factor that S and dS carry."""
        return upload(torch.tensor(self.adapters.effective_scales, dtype=torch.float32), self.a_RK.device)


def _check_tensors(group: LoraGroup) -> None:
    num_modules = len(group.columns)
    if not 1 <= num_modules <= MAX_MODULES or not num_modules == len(group.b_RN) == len(group.grad_b_RN):
        raise ValueError(f"{num_modules} column ranges, {len(group.b_RN)} B and {len(group.grad_b_RN)} gradients: need 1 to 3 of each")
    pairs = [("A", group.a_RK, group.grad_a_RK)]
    pairs += [(f"B[{m}]", b, g) for m, (b, g) in enumerate(zip(group.b_RN, group.grad_b_RN, strict=True))]
    for name, value, grad in pairs:
        if value.dim() != 2 or value.shape != grad.shape or grad.dtype != torch.float32:
            raise ValueError(f"{name} is {list(value.shape)} but its gradient is {grad.dtype} {list(grad.shape)}; need the same in float32")
        if not (value.is_contiguous() and grad.is_contiguous()) or value.device != group.a_RK.device or value.dtype != group.a_RK.dtype:
            raise ValueError(f"{name} and its gradient must be contiguous, of A's dtype and device")
    end = 0
    for m, (start, stop) in enumerate(group.columns):
        if start < end or stop - start != group.b_RN[m].shape[1]:
            raise ValueError(f"columns {group.columns} overlap, descend, or differ from B[{m}] {list(group.b_RN[m].shape)}")
        end = stop


def _check_rows(group: LoraGroup) -> None:
    num_adapters, num_modules = len(group.adapters), len(group.columns)
    if len(group.a_rows) != num_adapters or len(group.b_rows) != num_adapters:
        raise ValueError(f"{len(group.a_rows)} a_rows and {len(group.b_rows)} b_rows for {num_adapters} adapters")
    for adapter, (a_rows, b_rows) in enumerate(zip(group.a_rows, group.b_rows, strict=True)):
        if len(a_rows) != num_modules or [a < 0 for a in a_rows] != [b < 0 for b in b_rows]:
            raise ValueError(f"adapter {adapter}: a_rows {a_rows} and b_rows {b_rows} do not name the same of {num_modules} modules")
        rank, expected = padded_rank(group.adapters.ranks[adapter]), None
        for m, (a, b) in enumerate(zip(a_rows, b_rows, strict=True)):
            if a < 0:
                continue
            if a % RANK_ALIGN or b % RANK_ALIGN or a + rank > group.a_RK.shape[0] or b + rank > group.b_RN[m].shape[0]:
                raise ValueError(f"adapter {adapter} module {m}: rows {a}, {b} of rank {rank} are unaligned or leave the arena")
            if expected is not None and a != expected:
                raise ValueError(f"adapter {adapter}: a_rows {a_rows} are not side by side")
            expected = a + rank
