"""One linear's region of the arena's flat buffers: how many rank rows it has, and which of them an adapter takes.

A region is A [R, K], then per module m its B^T [R_m, N_m]; R is the sum of all R_m. R_m is the same in
all linears that merge the same modules, on all stages: the arena's `room`. An adapter takes, for each
module that it targets, as many rows of A and of that B^T as its padded rank; its rows of A are
contiguous. Which rows is its `Places`, plain data that serve every linear: the first rank chooses them
(planning/adapter_rows.py), and all ranks follow.

    room = room_of(specs)                                                 # as many rows as these adapters take together
    region = Region(linear.geometry, room, start=0, tensor_rank=0)
    for spec, places in zip(specs, side_by_side(specs), strict=True):
        region.factors(spec, region.place(spec, places))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.lora.adapters import AdapterTable, LoraGroup, padded_rank
from megatron_lora.huggingface.architecture import MERGED_LINEARS
from megatron_lora.model.linears import LinearGeometry

ALIGN = 64  # elements; every region starts on a multiple of it: 128 bytes in 16 bits

Room = Mapping[str, int]  # module -> rank rows; none of a module that is not there
Places = Mapping[str, Sequence[int]]  # targeted module -> its first row of A, and of its B^T


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What the arena needs to know of one job's adapter: its rank and targets, and the scale and dropout that kernels apply."""

    r: int
    scale: float
    dropout: float
    target_modules: frozenset[str]


FREE_ROW = AdapterSpec(r=1, scale=0.0, dropout=0.0, target_modules=frozenset())  # what the tables hold where an adapter row is free


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One job's A [r, K] or B^T [r, N] of one module on this rank: `length` elements from `start` on in every flat buffer."""

    path: str  # the module's Hugging Face path, "model.layers.0.self_attn.q_proj"
    kind: str  # "A" or "B"
    start: int
    r: int
    width: int  # columns on this rank
    sharded: bool  # over tensor ranks along `width`; otherwise replicated on them
    pieces: tuple[tuple[int, int], ...]  # global (first, number) of this rank's columns, in its order

    @property
    def length(self) -> int:
        """Elements of the slice."""
        return self.r * self.width

    def of(self, full: Tensor) -> Tensor:
        """Return this rank's columns of the factor of all tensor ranks."""
        return torch.cat([full[:, first : first + number] for first, number in self.pieces], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one adapter lies in one region: per module its first row of A and of B^T, -1 where the module is not targeted."""

    height: int  # rows of each of its factors: the padded rank
    a_rows: tuple[int, ...]
    b_rows: tuple[int, ...]


def room_of(specs: Sequence[AdapterSpec]) -> dict[str, int]:
    """Return the rank rows of each module that these adapters take together."""
    modules = {module for spec in specs for module in spec.target_modules}
    return {module: sum(padded_rank(spec.r) for spec in specs if module in spec.target_modules) for module in modules}


def side_by_side(specs: Sequence[AdapterSpec]) -> list[Places]:
    """Return places of these adapters one after another, without holes."""
    found: list[Places] = []
    ends: dict[str, int] = {}  # of a merged linear's A, and of a module's B^T
    for spec in specs:
        places = {}
        for kind, modules in MERGED_LINEARS.items():
            for module in modules:
                if module in spec.target_modules:
                    places[module] = (ends.get(kind, 0), ends.get(module, 0))
                    ends[kind], ends[module] = (end + padded_rank(spec.r) for end in places[module])
        found.append(places)
    return found


def check_apart(room: Room, held: Sequence[tuple[int, Places]]) -> None:
    """Assert that adapters, each its rows and its places, lie inside the room and overlap nowhere."""
    for modules in MERGED_LINEARS.values():
        spaces = [(0, modules), *((1, (module,)) for module in modules)]  # A, whose rows the modules share; each B^T
        for which, shared in spaces:
            spans = sorted((lies[m][which], lies[m][which] + rows) for rows, lies in held for m in shared if m in lies)
            ends, firsts = [0, *(end for _, end in spans)], [*(first for first, _ in spans), sum(room.get(m, 0) for m in shared)]
            apart = all(end <= first for end, first in zip(ends, firsts, strict=True))
            assert apart, f"{'AB'[which]} of {', '.join(shared)}: adapters at {spans} overlap, or leave {firsts[-1]} rows"


class Stripes(NamedTuple):
    """Parts of flat memory that repeat: `count` times, `stride` elements apart. Layers are alike, so one view serves all of them."""

    count: int
    stride: int
    parts: list[tuple[int, int]]  # the first repetition's starts and lengths

    @staticmethod
    def of(parts: Sequence[tuple[int, int]], count: int) -> Stripes:
        """Find how `parts` repeat; those that do not repeat `count` times are all kept."""
        period, rest = divmod(len(parts), count)
        if count > 1 and parts and not rest:
            stride = parts[period][0] - parts[0][0]
            if all((start + stride, length) == after for (start, length), after in zip(parts, parts[period:], strict=False)):
                return Stripes(count, stride, list(parts[:period]))
        return Stripes(1, 0, list(parts))

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of a contiguous tensor, each [count, length]."""
        first = flat.storage_offset()
        return [flat.as_strided((self.count, length), (self.stride, 1), first + start) for start, length in self.parts]


def shards(geometry: LinearGeometry, tensor_rank: int, spec: AdapterSpec, starts: Iterable[int] = repeat(0)) -> list[Factor]:  # noqa: B008  it has no state
    """Return the factors of an adapter in a linear of a tensor rank, A and B^T of each targeted module; they begin at `starts`."""
    found, column, k, start = [], geometry.parallel == "column", geometry.in_features, iter(starts)
    for index, (module, path, n) in enumerate(zip(geometry.modules, geometry.paths, geometry.out_features, strict=True)):
        if module in spec.target_modules:
            inputs, outputs = ((0 if column else geometry.first_feature, k),), geometry.pieces(index, tensor_rank)
            found.append(Factor(path=path, kind="A", start=next(start), r=spec.r, width=k, sharded=not column, pieces=inputs))
            found.append(Factor(path=path, kind="B", start=next(start), r=spec.r, width=n, sharded=column, pieces=outputs))
    return found


class Region:
    """One linear's part of the flat buffers: offsets, and the views that its kernels get."""

    def __init__(self, geometry: LinearGeometry, room: Room, start: int, tensor_rank: int):
        """Lay a region out from `start` on."""
        self.geometry = geometry
        self.tensor_rank = tensor_rank
        rows = [room.get(module, 0) for module in geometry.modules]
        self.a_shape = (sum(rows), geometry.in_features)
        self.b_shapes = tuple(zip(rows, geometry.out_features, strict=True))
        self.a_start = start
        self.b_starts: list[int] = []
        end = start + math.prod(self.a_shape)
        for shape in self.b_shapes:
            self.b_starts.append(end)
            end += math.prod(shape)
        self.end = -(-end // ALIGN) * ALIGN

    def place(self, spec: AdapterSpec, places: Places) -> Place:
        """Return where an adapter lies here."""
        rows = [places[module] if module in spec.target_modules else (-1, -1) for module in self.geometry.modules]
        return Place(height=padded_rank(spec.r), a_rows=tuple(a for a, _ in rows), b_rows=tuple(b for _, b in rows))

    def factors(self, spec: AdapterSpec, place: Place) -> list[Factor]:
        """Return an adapter's factors: A and B^T of each targeted module."""
        k, starts = self.geometry.in_features, []
        for b_start, n, a_row, b_row in zip(self.b_starts, self.geometry.out_features, place.a_rows, place.b_rows, strict=True):
            if a_row >= 0:
                starts += [self.a_start + a_row * k, b_start + b_row * n]
        return shards(self.geometry, self.tensor_rank, spec, starts)

    def views(self, compute: Tensor, grad: Tensor) -> dict[str, Any]:
        """Return the linear's views on the flat buffers, and the geometry that its kernels need: arguments of a LoraGroup."""

        def cut(buffer: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
            return buffer[start : start + math.prod(shape)].view(shape)

        return {
            "a_RK": cut(compute, self.a_start, self.a_shape),
            "b_RN": tuple(cut(compute, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            "grad_a_RK": cut(grad, self.a_start, self.a_shape),
            "grad_b_RN": tuple(cut(grad, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            "columns": self.geometry.columns,
            "first_feature": self.geometry.first_feature,
        }

    def group(self, views: dict[str, Any], places: Sequence[Place | None], adapters: AdapterTable) -> LoraGroup:
        """Return the linear's adapters; `places` and `adapters` are by adapter row, None where one is free."""
        nowhere = (-1,) * len(self.geometry.modules)
        a_rows, b_rows = (tuple(getattr(place, rows) if place else nowhere for place in places) for rows in ("a_rows", "b_rows"))
        return LoraGroup(**views, a_rows=a_rows, b_rows=b_rows, adapters=adapters)
