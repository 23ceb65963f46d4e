"""The arena: the memory of all adapters of a stage.

There are five flat buffers: fp32 ones for the master weights, the gradients and Adam's two moments,
and one in the compute dtype (the masters themselves when that is fp32). Each linear of the stage
owns one region of every buffer (arena_region.py). There each adapter's rank is rounded up to a
multiple of 16 rows, and the surplus rows are zero. Kernels see a region through the linear's
`LoraGroup`. The optimizer, the checkpoint and the PEFT files see a job through its `Factor`s, which
are contiguous slices of the flat buffers.

An adapter has an *adapter row*, its index in the tables of all linears. `add` takes it and the rank
rows, `remove` gives them back and leaves zeros behind:

    arena = Arena(stage.linears, [first, second], tensor_rank=0, tensor_ranks=1, dtype=dtype, device=device)     # rows 0 and 1
    arena.remove(0)
    row = arena.add(third)                # 0 again; NoRoom, and nothing taken, where a linear has too few rank rows free
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_ops.lora.adapters import AdapterTable
from megatron_lora.model.arena_region import FREE_ROW, AdapterSpec, Factor, NoRoom, Place, Region
from megatron_lora.model.linears import MultiLoraLinear


class Arena:
    """The adapters of all resident jobs for the linears of one stage; each change gives every linear new `adapters`."""

    def __init__(
        self,
        linears: Sequence[MultiLoraLinear],
        adapters: Sequence[AdapterSpec],
        *,
        tensor_rank: int,
        tensor_ranks: int,
        dtype: torch.dtype,
        device: torch.device,
        room_for: Sequence[AdapterSpec] | None = None,
    ):
        """Allocate room for the adapters of `room_for` at once (default: `adapters`), and add `adapters` as rows 0, 1, ..."""
        self.tensor_ranks = tensor_ranks
        self.linears = linears
        self.regions: list[Region] = []
        size = 0
        for linear in linears:
            self.regions.append(Region(linear.geometry, adapters if room_for is None else room_for, size, tensor_rank))
            size = self.regions[-1].end
        self.master = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self.specs: list[AdapterSpec] = []  # [adapter row]; FREE_ROW where it is free
        self.places: list[list[Place | None]] = [[] for _ in linears]  # [linear][adapter row]
        self.factors: list[list[Factor]] = []  # [adapter row]; empty where it is free
        for spec in adapters:
            self._take(spec)
        self._set_tables()

    def add(self, spec: AdapterSpec) -> int:
        """Take a row for an adapter, all zero, and return it. Raises NoRoom, and takes nothing, where it does not fit."""
        row = self._take(spec)
        self._set_tables()
        return row

    def remove(self, row: int) -> None:
        """Give an adapter's row and rank rows back, with zeros in every buffer. No microbatch of the job may be in flight."""
        for region, places in zip(self.regions, self.places, strict=True):
            place = places[row]
            assert place is not None, f"adapter row {row} is free already"
            for part in region.slices(place):
                for buffer in (self.master, self.grad, self.exp_avg, self.exp_avg_sq, self.compute):
                    buffer[part].zero_()
            region.give_back(place)
            places[row] = None
        self.specs[row] = FREE_ROW
        self.factors[row] = []
        self._set_tables()

    def _take(self, spec: AdapterSpec) -> int:
        taken: list[tuple[Region, Place]] = []
        try:
            for region in self.regions:
                taken.append((region, region.take(spec)))
        except NoRoom:
            for region, place in taken:
                region.give_back(place)
            raise
        row = next((row for row, taken_by in enumerate(self.specs) if taken_by is FREE_ROW), len(self.specs))
        if row == len(self.specs):
            self.specs.append(FREE_ROW)
            self.factors.append([])
            for places in self.places:
                places.append(None)
        self.specs[row] = spec
        self.factors[row] = [factor for region, place in taken for factor in region.factors(spec, place)]
        for places, (_, place) in zip(self.places, taken, strict=True):
            places[row] = place
        return row

    def _set_tables(self) -> None:
        """Give every linear new tables, of the adapters that are resident now; a microbatch in flight keeps those of its forward."""
        adapters = AdapterTable(
            ranks=tuple(spec.r for spec in self.specs),
            scales=tuple(spec.scale for spec in self.specs),
            dropouts=tuple(spec.dropout for spec in self.specs),
        )
        for linear, region, places in zip(self.linears, self.regions, self.places, strict=True):
            linear.adapters = region.group(self.compute, self.grad, places, adapters)

    def view(self, factor: Factor, buffer: Tensor) -> Tensor:
        """Return the factor's slice of a flat buffer as [r, width]."""
        return buffer[factor.start : factor.start + factor.length].view(factor.r, factor.width)

    def initialise(self, adapter_row: int, seed: int) -> None:
        """Set an adapter to PEFT's initial values: A kaiming-uniform with a = sqrt(5), B zero.

        Each A is drawn with a generator of its own, seeded by `seed` and the module's path, and for
        all K columns. The values therefore depend neither on the parallel layout nor on other jobs.
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


def _kaiming_uniform(r: int, num_features: int, seed: int, path: str) -> Tensor:
    """Draw A [r, K] from U(-1/sqrt(K), 1/sqrt(K)): kaiming-uniform with a = sqrt(5) (He et al. 2015, as PEFT uses it)."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(num_features)
    return torch.empty(r, num_features).uniform_(-bound, bound, generator=generator)
