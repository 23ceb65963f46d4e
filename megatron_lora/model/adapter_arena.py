"""The arena: the memory of all adapters of a stage.

It has five flat buffers of equal length: master weights, gradients and Adam's two moments in fp32, and a
copy of the weights in the compute dtype (the master weights themselves if that is fp32). Each linear
has one region, the same in every buffer: A [R, K], and for each of its modules B^T [R_m, N_m]. The A of
all adapters are stacked along R, and each takes its rank rounded up to 16 rows; the extra rows stay zero.

Kernels see a region through the linear's `LoraGroup`. Optimizer, checkpoint and PEFT files see an adapter
through its `Factor`s, one for each A and B, which are contiguous slices of the buffers.

An *adapter row* is an adapter's number in the arena (its index in `factors` and in `AdapterTable`), not to
be confused with the rank rows above. Today job j's adapter lies in adapter row j.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.adapters import AdapterTable, LoraGroup, padded_rank
from megatron_lora.model.linears import LinearGeometry, MultiLoraLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The settings of one adapter; `scale` is alpha / r (alpha / sqrt(r) for rsLoRA)."""

    r: int
    scale: float
    dropout: float
    target_modules: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One adapter's A [r, K] or B^T [r, N] of one module, as much as this rank has: `length` numbers from `start` in every buffer."""

    path: str  # the module's Hugging Face path, "model.layers.0.self_attn.q_proj"
    kind: str  # "A" or "B"
    start: int
    r: int
    width: int  # columns on this rank
    sharded: bool  # columns are sharded over the tensor ranks; otherwise every tensor rank has them all
    first: int  # global index of this rank's first column

    @property
    def length(self) -> int:
        """Numbers in the slice of a buffer."""
        return self.r * self.width


class Arena:
    """The adapters of all jobs for the linears of one stage. Making it sets each linear's `adapters`."""

    def __init__(
        self,
        linears: Sequence[MultiLoraLinear],
        adapters: Sequence[AdapterSpec],
        *,
        tensor_rank: int,
        tensor_ranks: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.tensor_ranks = tensor_ranks
        self.factors: tuple[list[Factor], ...] = tuple([] for _ in adapters)  # [adapter row]
        regions = []
        size = 0
        for linear in linears:
            region = _Region(linear.geometry, adapters, size, tensor_rank)
            size = region.end
            regions.append(region)
            for row, factors in enumerate(region.factors):
                self.factors[row].extend(factors)
        self.master = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        table = AdapterTable(
            ranks=tuple(a.r for a in adapters), scales=tuple(a.scale for a in adapters), dropouts=tuple(a.dropout for a in adapters)
        )
        for linear, region in zip(linears, regions, strict=True):
            linear.adapters = region.group(self.compute, self.grad, table)

    def view(self, factor: Factor, buffer: Tensor) -> Tensor:
        """Return the factor's slice of a flat buffer as [r, width]."""
        return buffer[factor.start : factor.start + factor.length].view(factor.r, factor.width)

    def initialise(self, adapter_row: int, seed: int) -> None:
        """Set an adapter to PEFT's initial values: A kaiming-uniform with a = sqrt(5), B zero.

        Each A is drawn with a generator of its own, seeded by `seed` and the module's path, and for all K
        columns. The values therefore depend neither on the parallel layout nor on other jobs.
        """
        for factor in self.factors[adapter_row]:
            if factor.kind == "A":
                num_columns = factor.width * (self.tensor_ranks if factor.sharded else 1)
                full = _kaiming_uniform(factor.r, num_columns, seed, factor.path)
                self.view(factor, self.master).copy_(full[:, factor.first : factor.first + factor.width])
            else:
                self.view(factor, self.master).zero_()
        self.publish(adapter_row)

    def load(self, adapter_row: int, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set an adapter's weights from PEFT's tensors, path -> (A [r, K], B [N, r]).

        Each rank copies its shard.
        """
        self.fill(adapter_row, weights, self.master)
        self.publish(adapter_row)

    def fill(self, adapter_row: int, tensors: Mapping[str, tuple[Tensor, Tensor]], buffer: Tensor) -> None:
        """Copy this rank's shards of full tensors, path -> (A [r, K], B [N, r]), into a flat buffer."""
        for factor in self.factors[adapter_row]:
            a_rk, b_nr = tensors[factor.path]
            columns = a_rk if factor.kind == "A" else b_nr.t()
            self.view(factor, buffer).copy_(columns[:, factor.first : factor.first + factor.width])

    def publish(self, adapter_row: int) -> None:
        """Copy an adapter's master weights into the compute buffer, rounding them to its dtype."""
        if self.compute is not self.master:
            for factor in self.factors[adapter_row]:
                self.view(factor, self.compute).copy_(self.view(factor, self.master))


class _Region:
    """Offsets of one linear's A and B^T in the flat buffers, for all adapters."""

    def __init__(self, geometry: LinearGeometry, adapters: Sequence[AdapterSpec], start: int, tensor_rank: int):
        self.geometry = geometry
        num_modules = len(geometry.modules)
        rows_a, rows_b = 0, [0] * num_modules
        a_rows, b_rows = [], []
        for adapter in adapters:
            a_row, b_row = [-1] * num_modules, [-1] * num_modules
            height = padded_rank(adapter.r)
            for i_module, module in enumerate(geometry.modules):
                if module in adapter.target_modules:
                    a_row[i_module], b_row[i_module] = rows_a, rows_b[i_module]
                    rows_a += height
                    rows_b[i_module] += height
            a_rows.append(tuple(a_row))
            b_rows.append(tuple(b_row))
        # [adapter row][module] -> first rank row of the adapter's A, and of its B^T; -1 where it does not target the module
        self.a_rows, self.b_rows = tuple(a_rows), tuple(b_rows)
        self.a_shape = (rows_a, geometry.in_features)
        self.b_shapes = tuple(zip(rows_b, geometry.out_features, strict=True))
        self.a_start = start
        self.b_starts = []
        end = start + math.prod(self.a_shape)
        for shape in self.b_shapes:
            self.b_starts.append(end)
            end += math.prod(shape)
        self.end = -(-end // 64) * 64  # every region starts on a multiple of 128 bytes
        self.factors = [self._factors_of(row, adapter.r, tensor_rank) for row, adapter in enumerate(adapters)]

    def _factors_of(self, adapter_row: int, r: int, tensor_rank: int) -> list[Factor]:
        g = self.geometry
        column = g.parallel == "column"
        factors = []
        for i_module, path in enumerate(g.paths):
            a_row, b_row = self.a_rows[adapter_row][i_module], self.b_rows[adapter_row][i_module]
            if a_row < 0:
                continue
            k, n = g.in_features, g.out_features[i_module]
            a_start, b_start = self.a_start + a_row * k, self.b_starts[i_module] + b_row * n
            first_k, first_n = (0, tensor_rank * n) if column else (g.first_feature, 0)
            factors.append(Factor(path=path, kind="A", start=a_start, r=r, width=k, sharded=not column, first=first_k))
            factors.append(Factor(path=path, kind="B", start=b_start, r=r, width=n, sharded=column, first=first_n))
        return factors

    def group(self, compute: Tensor, grad: Tensor, table: AdapterTable) -> LoraGroup:
        """Return the linear's views of the compute and gradient buffers."""

        def view(buffer: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
            return buffer[start : start + math.prod(shape)].view(shape)

        return LoraGroup(
            a_RK=view(compute, self.a_start, self.a_shape),
            b_RN=tuple(view(compute, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            grad_a_RK=view(grad, self.a_start, self.a_shape),
            grad_b_RN=tuple(view(grad, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            columns=self.geometry.columns,
            a_rows=self.a_rows,
            b_rows=self.b_rows,
            adapters=table,
            first_feature=self.geometry.first_feature,
        )


def _kaiming_uniform(r: int, num_features: int, seed: int, path: str) -> Tensor:
    """Draw A [r, K] from U(-1/sqrt(K), 1/sqrt(K)): kaiming-uniform with a = sqrt(5) (He et al. 2015, as PEFT uses it)."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(num_features)
    return torch.empty(r, num_features).uniform_(-bound, bound, generator=generator)
