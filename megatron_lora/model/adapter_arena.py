"""The arena: the memory of all adapters of a stage.

There are five flat buffers: fp32 ones for the master weights, the gradients and Adam's two moments,
and one in the compute dtype (the masters themselves when that is fp32). Each linear of the stage
owns one region of every buffer (arena_region.py). There each adapter's rank is rounded up to a
multiple of 16 rows, and the surplus rows are zero; experts' ranks are not. Kernels see a region through the linear's
`LoraGroup`, or `ExpertGroup`. The optimizer, the checkpoint and the PEFT files see a job through its `Factor`s, which
are contiguous slices of the flat buffers, one for each expert.

An adapter has an *adapter row*, its index in the tables of all linears, which it keeps, and *places*:
the rank rows that it takes in linears of each kind. They are chosen elsewhere. `add` takes the places
and the lowest free adapter row, `remove` gives them back and leaves zeros behind, and `move` takes
weights and moments elsewhere:

    arena = Arena(stage.linears, [first, second], tensor_rank=0, tensor_ranks=1, dtype=dtype, device=device)     # rows 0 and 1
    arena.remove(0)
    row = arena.add(third, places)        # 0 again
    arena.move(row, others)               # directly after the job's own step: none of its microbatches is in flight

Values come from host memory. `draw` and `shard` make them there, in any thread, and `put` copies them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.huggingface.architecture import MAGNITUDES
from megatron_lora.model.arena_region import (
    FREE_ROW,
    KINDS,
    AdapterSpec,
    Factor,
    Places,
    Region,
    Room,
    Stripes,
    check_apart,
    room_of,
    shards,
    side_by_side,
)
from megatron_lora.model.experts import ExpertLinear
from megatron_lora.model.linears import MultiLoraLinear
from megatron_lora.model.magnitudes import MagnitudeRows

DRAWING_THREADS = 4  # that draw an adapter's values, each A with a generator of its own
SMALL = 2**20  # elements: fewer are drawn by the caller alone


class Arena:
    """The adapters of all resident jobs for the linears of one stage; each change gives every linear new `adapters`."""

    def __init__(
        self,
        linears: Sequence[MultiLoraLinear | ExpertLinear],
        adapters: Sequence[AdapterSpec],
        *,
        tensor_rank: int,
        tensor_ranks: int,
        dtype: torch.dtype,
        device: torch.device,
        room: Room | None = None,
    ):
        """Allocate `room` (default: what `adapters` take), and add `adapters` side by side as rows 0, 1, ..."""
        self.tensor_rank, self.tensor_ranks = tensor_rank, tensor_ranks
        self.linears = linears
        self._is_changing = False
        self.room = dict(room_of(adapters) if room is None else room)
        self.regions: list[Region] = []
        size = 0
        for linear in linears:
            self.regions.append(Region(linear.geometry, self.room, size, tensor_rank))
            size = self.regions[-1].end
        self.master = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self._views = [region.views(self.compute, self.grad) for region in self.regions]
        self.magnitudes = [
            MagnitudeRows(linear, region, self.master, self.grad)
            for linear, region in zip(linears, self.regions, strict=True)
            if isinstance(linear, MultiLoraLinear) and region.magnitudes_shape[0]
        ]
        self.specs: list[AdapterSpec] = []  # [adapter row]; FREE_ROW where it is free
        self.places: list[Places] = []  # [adapter row]; empty where it is free
        self.factors: list[list[Factor]] = []  # [adapter row]; empty where it is free
        self._num_layers = max(1, sum(linear.geometry.modules == linears[0].geometry.modules for linear in linears))
        self._stripes: dict[int, _Stripes] = {}  # by adapter row
        for spec, places in zip(adapters, side_by_side(adapters), strict=True):
            self._take(spec, places)
        self._set_tables(self.specs, self.places)

    def add(self, spec: AdapterSpec, places: Places) -> int:
        """Take the lowest free adapter row and the places, which must be free, for an adapter, all zero; return the row."""
        row = self._take(spec, places)
        self._refresh()
        return row

    def remove(self, row: int) -> None:
        """Give an adapter's row and rank rows back, with zeros in every buffer. No microbatch of the job may be in flight."""
        assert self.specs[row] is not FREE_ROW, f"adapter row {row} is free already"
        rows = self._stripes.pop(row).rows
        for buffer in self._states(self.grad):
            _zero(rows.views(buffer))
        self.specs[row], self.places[row], self.factors[row] = FREE_ROW, {}, []
        self._refresh()

    def move(self, row: int, places: Places) -> None:
        """Move an adapter's weights and moments to other places, free or its own, and leave zeros behind.

        Its gradients must be zero, and no microbatch of the job may be in flight.
        """
        before, lay = self._stripes[row].rows, self.places[row]
        self._place(row, self.specs[row], places)
        for buffer in self._states() if places != lay else ():
            left = before.views(buffer)
            values = [part.clone() for part in left]
            _zero(left)
            _copy(self._stripes[row].rows.views(buffer), values)
        if self.specs[row].has_magnitudes:
            for magnitudes in self.magnitudes:
                magnitudes.move(lay[MAGNITUDES][0], places[MAGNITUDES][0])
        self._refresh()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Give the linears their new tables once, after all that is added, removed and moved inside; no forward may run there."""
        self._is_changing = True
        try:
            yield
        finally:
            self._is_changing = False
        self._refresh()

    def _refresh(self) -> None:
        if not self._is_changing:
            self._set_tables(self.specs, self.places)

    @contextmanager
    def showing(self, specs: Sequence[AdapterSpec]) -> Iterator[None]:
        """Give the linears tables of other adapters for a while, side by side in the same memory: to warm up, before anybody trains."""
        self._set_tables(specs, side_by_side(specs))
        yield
        self._set_tables(self.specs, self.places)

    def _take(self, spec: AdapterSpec, places: Places) -> int:
        row = next((row for row, taken_by in enumerate(self.specs) if taken_by is FREE_ROW), len(self.specs))
        if row == len(self.specs):
            self.specs.append(FREE_ROW)
            self.places.append({})
            self.factors.append([])
        self._place(row, spec, places)
        return row

    def _place(self, row: int, spec: AdapterSpec, places: Places) -> None:
        """Write down where an adapter lies."""
        assert places.keys() == spec.target_modules, f"adapter row {row}: places {places}, targets {sorted(spec.target_modules)}"
        others = [each for other, each in enumerate(zip(self.specs, self.places, strict=True)) if other != row]
        check_apart(self.room, [*others, (spec, places)])
        self.specs[row], self.places[row] = spec, dict(places)
        factors = [factor for region in self.regions for factor in region.factors(spec, region.place(spec, places))]
        every, alike = factors, replace(spec, linears=())
        if spec.linears:  # linears that are not adapted take rows, too
            every = [factor for region in self.regions for factor in region.factors(alike, region.place(alike, places))]
        lengths = [f.r * f.width for f in factors for _ in f.starts]
        parts = (
            [(start, f.rows * f.width) for f in every for start in f.starts],
            [(start, f.r * f.width) for f in factors for start in f.starts],
            list(zip(accumulate(lengths, initial=0), lengths, strict=False)),
        )
        self.factors[row], self._stripes[row] = factors, _Stripes(*(Stripes.of(each, self._num_layers) for each in parts))

    def _states(self, *others: Tensor) -> list[Tensor]:
        """Return the buffers that hold an adapter's state, and `others`."""
        return [self.master, self.exp_avg, self.exp_avg_sq, *([] if self.compute is self.master else [self.compute]), *others]

    def _set_tables(self, specs: Sequence[AdapterSpec], places: Sequence[Places]) -> None:
        """Give every linear new tables, one for all that merge the same modules; a microbatch in flight keeps those of its forward."""
        groups: dict[tuple[str, ...], Any] = {}
        for linear, region, views in zip(self.linears, self.regions, self._views, strict=True):
            modules = region.geometry.modules
            if modules in groups:
                groups[modules] = groups[modules].beside(**views)
            else:
                here = [region.place(spec, of_row) if of_row else None for spec, of_row in zip(specs, places, strict=True)]
                groups[modules] = region.group(views, here, specs)
            linear.adapters = groups[modules]
        for magnitudes in self.magnitudes:
            magnitudes.set_rows(places)

    def set_norms(self, row: int, group: dist.ProcessGroup | None, restart: bool = False) -> None:
        """Measure the magnitudes of a DoRA adapter by its weights as they are now: once it has them, and after each step.

        With `restart` the magnitudes become the norms. Collective over `group`, the tensor ranks, where there are several.
        """
        spec, found = self.specs[row], []
        if not spec.has_magnitudes:
            return
        own = self.places[row][MAGNITUDES][0]
        at = {(factor.path, factor.kind): self.view(factor, self.master) for factor in self.factors[row]}
        for magnitudes in self.magnitudes:
            terms = [(i, at[path, "A"], at[path, "B"]) for i, path in enumerate(magnitudes.geometry.paths) if (path, "m") in at]
            if terms:
                found.append((magnitudes, terms, magnitudes.square_norms(terms, spec.scale)))
            else:
                magnitudes.reset(own)
        partial = [squares for magnitudes, _, squares in found if magnitudes.is_partial]
        if partial:
            summed = torch.cat(partial)
            dist.all_reduce(summed, group=group)
            _copy(partial, summed.split([len(squares) for squares in partial]))
        for magnitudes, terms, squares in found:
            magnitudes.set(own, [module for module, *_ in terms], squares, restart)

    def view(self, factor: Factor, buffer: Tensor) -> Tensor:
        """Return the factor's slice of a flat buffer as [r, width], or [experts, r, width]."""
        sizes, strides = (factor.r, factor.width), (factor.width, 1)
        if factor.experts:
            sizes, strides = (factor.count, *sizes), (factor.stride, *strides)
        return buffer.as_strided(sizes, strides, buffer.storage_offset() + factor.start)

    def draw(self, spec: AdapterSpec, seed: int, gaussian: bool = False) -> Tensor:
        """Return an adapter's initial values on this rank, factor after factor, fp32 in host memory: PEFT's, B zero.

        A is kaiming-uniform, or normal with standard deviation 1 / r.

        Magnitudes are left to `set_norms`.

        Each A is drawn with a generator of its own, seeded by `seed` and the module's path, and for
        all K columns. The values therefore depend neither on the parallel layout nor on other jobs.
        Any thread may draw.
        """
        flat, parts = self._host_memory(spec)

        def fill(item: tuple[Factor, str, Tensor]) -> None:
            factor, path, part = item
            if factor.kind == "A":
                num_columns = factor.width * (factor.tensor_ranks if factor.sharded else 1)
                full = _first_a(factor.r, num_columns, seed, path, gaussian)
                part.copy_(factor.of(full))
            else:
                part.zero_()

        if flat.numel() < SMALL:
            for item in parts:
                fill(item)
        else:
            with ThreadPoolExecutor(DRAWING_THREADS) as threads:
                list(threads.map(fill, parts))
        return flat

    def shard(self, spec: AdapterSpec, tensors: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        """Return this rank's shards of full tensors, as `draw` returns values. Any thread may call it.

        `tensors`: path -> (A [r, K], B [N, r]), and the magnitudes [N] of a DoRA adapter, which may be missing.
        """
        flat, parts = self._host_memory(spec)
        for factor, path, part in parts:
            given = tensors[path][KINDS.index(factor.kind) :]
            if given:
                part.copy_(factor.of(given[0] if factor.kind == "A" else given[0].reshape(len(given[0]), -1).t()))
            else:
                part.zero_()
        return flat

    def put(self, adapter_row: int, values: Tensor, buffer: Tensor) -> None:
        """Copy what `draw` or `shard` returned into an adapter's part of a flat buffer; masters into the compute buffer too."""
        stripes = self._stripes[adapter_row]
        values = values.to(buffer.device, non_blocking=values.is_pinned())  # in one piece
        _copy(stripes.factors.views(buffer), stripes.values.views(values))
        if buffer is self.master:
            self.publish(adapter_row)

    def values(self, adapter_row: int, buffer: Tensor) -> Tensor:
        """Return an adapter's part of a flat buffer as `put` takes it, on the device."""
        stripes, factors = self._stripes[adapter_row], self.factors[adapter_row]
        values = buffer.new_empty(sum(factor.length for factor in factors))
        _copy(stripes.values.views(values), stripes.factors.views(buffer))
        return values

    def b_moved(self, adapter_row: int, buffer: Tensor) -> Tensor:
        """Return for each B^T of an adapter, in the order of its factors, whether a flat buffer has a value there that is not 0: bool.

        Of experts it is one that says so of any, since a job's tokens need not reach all; True where other ranks have some of them.
        """
        views, found = iter(self._stripes[adapter_row].factors.views(buffer)), []
        for factor in self.factors[adapter_row]:
            parts = [part.any(1) for part in islice(views, len(factor.starts))]
            elsewhere = len(factor.experts) > 0 and factor.tensor_ranks < self.tensor_ranks
            found += [torch.stack(parts).any(0) | elsewhere] if factor.kind == "B" and parts else []
        return torch.stack(found, 1).flatten() if found else buffer.new_zeros(0, dtype=torch.bool)

    def load(self, adapter_row: int, weights: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Set an adapter's weights from PEFT's tensors, as `shard` takes them."""
        self.put(adapter_row, self.shard(self.specs[adapter_row], weights), self.master)

    def publish(self, adapter_row: int) -> None:
        """Copy an adapter's master weights into the compute buffer, rounding them to its dtype."""
        if self.compute is not self.master:
            factors = self._stripes[adapter_row].factors
            _copy(factors.views(self.compute), factors.views(self.master))

    def shards_of(self, spec: AdapterSpec) -> list[Factor]:
        """Return an adapter's factors on this rank; where they begin is not said."""
        return [factor for region in self.regions for factor in shards(region.geometry, self.tensor_rank, spec)]

    def _host_memory(self, spec: AdapterSpec) -> tuple[Tensor, list[tuple[Factor, str, Tensor]]]:
        """Return memory on the host for an adapter's factors, and of each factor each path with its part [r, width] of it."""
        factors = self.shards_of(spec)
        lengths = [factor.length for factor in factors]
        flat = torch.empty(sum(lengths), pin_memory=self.master.is_cuda)
        return flat, [(f, *part) for f, values in zip(factors, flat.split(lengths), strict=True) for part in f.parts(values)]


class _Stripes(NamedTuple):
    """Where an adapter lies in every flat buffer, and its values as `put` takes them."""

    rows: Stripes  # in buffers, the surplus rows of its padded rank included
    factors: Stripes  # in buffers
    values: Stripes


def _zero(tensors: list[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]  torch has no public name for it


def _copy(targets: list[Tensor], sources: list[Tensor] | tuple[Tensor, ...]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  likewise


def generator_of(seed: int, path: str) -> torch.Generator:
    """Return the generator that a linear's first values are drawn from."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _first_a(r: int, num_features: int, seed: int, path: str, gaussian: bool) -> Tensor:
    """Draw A [r, K] as PEFT does: from U(-1/sqrt(K), 1/sqrt(K)), kaiming-uniform with a = sqrt(5) (He et al. 2015), or N(0, 1/r^2)."""
    generator, values, bound = generator_of(seed, path), torch.empty(r, num_features), 1.0 / math.sqrt(num_features)
    return values.normal_(0.0, 1.0 / r, generator=generator) if gaussian else values.uniform_(-bound, bound, generator=generator)
