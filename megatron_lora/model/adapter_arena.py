"""Where all adapters of a stage live.

One flat fp32 buffer each for the masters, the gradients and Adam's two moments, and one flat buffer in the compute dtype (the masters
themselves when that is fp32). Each patched linear owns one region of every buffer: A [R, K], then per module B^T [R_m, N_m], with the
rows of a job rounded up to 16 and the surplus rows zero. Kernels see a region through the linear's `LoraGroup`; the optimizer, the
checkpoint and the PEFT files see a job through its `Factor`s, which are contiguous slices of the flat buffers.
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
    """What the arena needs to know of one job: rank, targets and the two numbers that kernels apply."""

    r: int
    scale: float
    dropout: float
    target_modules: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One job's A [r, K] or B^T [r, N] of one module on this rank: `length` numbers from `start` on in every flat buffer."""

    path: str  # the module's Hugging Face path, "model.layers.0.self_attn.q_proj"
    kind: str  # "A" or "B"
    start: int
    r: int
    width: int  # columns on this rank
    sharded: bool  # over tensor ranks along `width`; otherwise replicated on them
    first: int  # global index of this rank's first column

    @property
    def length(self) -> int:
        """Numbers in the slice."""
        return self.r * self.width


class Arena:
    """The adapters of all jobs for the linears of one stage; building it gives each linear its `group`."""

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
        self.factors: tuple[list[Factor], ...] = tuple([] for _ in adapters)
        regions = []
        size = 0
        for linear in linears:
            region = _Region(linear.geometry, adapters, size, tensor_rank)
            size = region.end
            regions.append(region)
            for slot, factors in enumerate(region.factors):
                self.factors[slot].extend(factors)
        self.master = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        slots = AdapterTable(
            ranks=tuple(a.r for a in adapters), scales=tuple(a.scale for a in adapters), dropouts=tuple(a.dropout for a in adapters)
        )
        for linear, region in zip(linears, regions, strict=True):
            linear.group = region.group(self.compute, self.grad, slots)

    def view(self, factor: Factor, buffer: Tensor) -> Tensor:
        """Return the factor's slice of a flat buffer as [r, width]."""
        return buffer[factor.start : factor.start + factor.length].view(factor.r, factor.width)

    def initialise(self, slot: int, seed: int) -> None:
        """Give a job PEFT's initial values: A kaiming-uniform with a = sqrt(5), B zero.

        Each A is drawn from a stream of its own, keyed by the seed and the module's path, for the whole of K, so that the values depend
        neither on the layout nor on neighbours.
        """
        for factor in self.factors[slot]:
            if factor.kind == "A":
                total = factor.width * (self.tensor_ranks if factor.sharded else 1)
                whole = _kaiming_uniform(factor.r, total, seed, factor.path)
                self.view(factor, self.master).copy_(whole[:, factor.first : factor.first + factor.width])
            else:
                self.view(factor, self.master).zero_()
        self.publish(slot)

    def load(self, slot: int, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start a job from PEFT tensors: path -> (A [r, K], B [N, r]), whole; each rank takes its part."""
        self.fill(slot, weights, self.master)
        self.publish(slot)

    def fill(self, slot: int, whole: Mapping[str, tuple[Tensor, Tensor]], buffer: Tensor) -> None:
        """Copy this rank's part of a job's tensors, shaped as PEFT's and whole, into a flat buffer."""
        for factor in self.factors[slot]:
            a_rk, b_nr = whole[factor.path]
            columns = a_rk if factor.kind == "A" else b_nr.t()
            self.view(factor, buffer).copy_(columns[:, factor.first : factor.first + factor.width])

    def publish(self, slot: int) -> None:
        """Copy a job's masters into the compute buffer."""
        if self.compute is not self.master:
            for factor in self.factors[slot]:
                self.view(factor, self.compute).copy_(self.view(factor, self.master))


class _Region:
    """Offsets of one linear's A and B^T in the flat buffers, for all jobs."""

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
        self.factors = [self._job_factors(slot, adapter.r, tensor_rank) for slot, adapter in enumerate(adapters)]

    def _job_factors(self, slot: int, r: int, tensor_rank: int) -> list[Factor]:
        g = self.geometry
        column = g.parallel == "column"
        factors = []
        for i_module, path in enumerate(g.paths):
            a_row, b_row = self.a_rows[slot][i_module], self.b_rows[slot][i_module]
            if a_row < 0:
                continue
            k, n = g.in_features, g.out_features[i_module]
            a_start, b_start = self.a_start + a_row * k, self.b_starts[i_module] + b_row * n
            first_k, first_n = (0, tensor_rank * n) if column else (g.first_feature, 0)
            factors.append(Factor(path=path, kind="A", start=a_start, r=r, width=k, sharded=not column, first=first_k))
            factors.append(Factor(path=path, kind="B", start=b_start, r=r, width=n, sharded=column, first=first_n))
        return factors

    def group(self, compute: Tensor, grad: Tensor, slots: AdapterTable) -> LoraGroup:
        """Return the linear's views on the flat buffers."""

        def cut(buffer: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
            return buffer[start : start + math.prod(shape)].view(shape)

        return LoraGroup(
            a_RK=cut(compute, self.a_start, self.a_shape),
            b_RN=tuple(cut(compute, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            grad_a_RK=cut(grad, self.a_start, self.a_shape),
            grad_b_RN=tuple(cut(grad, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            columns=self.geometry.columns,
            a_rows=self.a_rows,
            b_rows=self.b_rows,
            adapters=slots,
            first_feature=self.geometry.first_feature,
        )


def _kaiming_uniform(r: int, num_features: int, seed: int, path: str) -> Tensor:
    """Draw A [r, K] from U(-1/sqrt(K), 1/sqrt(K)): kaiming-uniform with a = sqrt(5) (He et al. 2015, as PEFT uses it)."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(num_features)
    return torch.empty(r, num_features).uniform_(-bound, bound, generator=generator)
