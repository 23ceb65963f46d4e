"""One linear's region of the arena's flat buffers: which of its rank rows belong to which adapter.

A region is A [R, K], then per module m its B^T [R_m, N_m]; R is the sum of all R_m. An adapter
takes, for each module that it targets, as many rows of A and of that B^T as its padded rank. Its
rows of A are contiguous. Which rows are free differs between linears, because adapters target
different modules. Rows are taken first-fit, so adapters that are added to an empty region lie in
the order of adding.

    region = Region(linear.geometry, [spec], start=0, tensor_rank=0)      # room for these adapters at once
    place = region.take(spec)                                             # NoRoom where it does not fit
    region.give_back(place)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fused_ops.lora.adapters import AdapterTable, LoraGroup, padded_rank
from megatron_lora.model.linears import LinearGeometry

ALIGN = 64  # elements; every region starts on a multiple of it: 128 bytes in 16 bits


class NoRoom(Exception):
    """An adapter does not fit into the free rank rows of a region."""


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
    first: int  # global index of this rank's first column

    @property
    def length(self) -> int:
        """Elements of the slice."""
        return self.r * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one adapter lies in one region: per module its first row of A and of B^T, -1 where the module is not targeted."""

    height: int  # rows of each of its factors: the padded rank
    a_rows: tuple[int, ...]
    b_rows: tuple[int, ...]


class FreeRows:
    """The free rows among `size`, as sorted intervals [first, end)."""

    def __init__(self, size: int):
        self.size = size
        self.intervals: list[tuple[int, int]] = [(0, size)] if size else []

    def find(self, count: int) -> int | None:
        """Return the first of `count` contiguous free rows, the lowest there are; None where there are not as many."""
        return next((first for first, end in self.intervals if end - first >= count), None)

    def take(self, first: int, count: int) -> None:
        """Take `count` rows from `first` on, which must be free."""
        i, (low, high) = next((i, each) for i, each in enumerate(self.intervals) if each[0] <= first < each[1])
        assert first + count <= high, f"rows {first} to {first + count} are not all free"
        self.intervals[i : i + 1] = [each for each in ((low, first), (first + count, high)) if each[0] < each[1]]

    def give_back(self, first: int, count: int) -> None:
        """Give `count` rows back from `first` on, none of which may be free."""
        end = first + count
        assert first >= 0 and end <= self.size and all(high <= first or end <= low for low, high in self.intervals)
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.intervals, (first, end)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self.intervals = merged


class Region:
    """One linear's part of the flat buffers: offsets, free rows, and the views that its kernels get."""

    def __init__(self, geometry: LinearGeometry, room_for: Sequence[AdapterSpec], start: int, tensor_rank: int):
        """Lay a region out from `start` on, as large as the adapters of `room_for` take together."""
        self.geometry = geometry
        self.tensor_rank = tensor_rank
        targets = [sum(padded_rank(spec.r) for spec in room_for if module in spec.target_modules) for module in geometry.modules]
        self.a_shape = (sum(targets), geometry.in_features)
        self.b_shapes = tuple(zip(targets, geometry.out_features, strict=True))
        self.a_start = start
        self.b_starts: list[int] = []
        end = start + math.prod(self.a_shape)
        for shape in self.b_shapes:
            self.b_starts.append(end)
            end += math.prod(shape)
        self.end = -(-end // ALIGN) * ALIGN
        self.free_a = FreeRows(self.a_shape[0])
        self.free_b = [FreeRows(rows) for rows in targets]

    def take(self, spec: AdapterSpec) -> Place:
        """Take the rows of an adapter. Raises NoRoom, and takes none, where not enough are free."""
        height = padded_rank(spec.r)
        targeted = [module in spec.target_modules for module in self.geometry.modules]
        a_first = self.free_a.find(height * sum(targeted)) if any(targeted) else 0
        b_first = [free.find(height) if used else -1 for free, used in zip(self.free_b, targeted, strict=True)]
        if a_first is None or None in b_first:
            raise NoRoom(f"{self.geometry.paths[0]}: no {height} rank rows are free for each of its modules")
        a_rows = []
        for used in targeted:
            a_rows.append(a_first if used else -1)
            a_first += height if used else 0
        place = Place(height=height, a_rows=tuple(a_rows), b_rows=tuple(row for row in b_first if row is not None))
        for free, first in self._rows_of(place):
            free.take(first, height)
        return place

    def give_back(self, place: Place) -> None:
        """Give the rows of an adapter back."""
        for free, first in self._rows_of(place):
            free.give_back(first, place.height)

    def _rows_of(self, place: Place) -> list[tuple[FreeRows, int]]:
        rows = []
        for free_b, a_row, b_row in zip(self.free_b, place.a_rows, place.b_rows, strict=True):
            if a_row >= 0:
                rows += [(self.free_a, a_row), (free_b, b_row)]
        return rows

    def slices(self, place: Place) -> list[slice]:
        """Return where an adapter's rows lie in the flat buffers, the surplus rows of its padded rank included."""
        k, found = self.geometry.in_features, []
        for b_start, n, a_row, b_row in zip(self.b_starts, self.geometry.out_features, place.a_rows, place.b_rows, strict=True):
            if a_row >= 0:
                found.append(slice(self.a_start + a_row * k, self.a_start + (a_row + place.height) * k))
                found.append(slice(b_start + b_row * n, b_start + (b_row + place.height) * n))
        return found

    def factors(self, spec: AdapterSpec, place: Place) -> list[Factor]:
        """Return an adapter's factors: A and B^T of each targeted module."""
        g, found = self.geometry, []
        column = g.parallel == "column"
        for path, n, b_base, a_row, b_row in zip(g.paths, g.out_features, self.b_starts, place.a_rows, place.b_rows, strict=True):
            if a_row < 0:
                continue
            k = g.in_features
            a_start, b_start = self.a_start + a_row * k, b_base + b_row * n
            first_k, first_n = (0, self.tensor_rank * n) if column else (g.first_feature, 0)
            found.append(Factor(path=path, kind="A", start=a_start, r=spec.r, width=k, sharded=not column, first=first_k))
            found.append(Factor(path=path, kind="B", start=b_start, r=spec.r, width=n, sharded=column, first=first_n))
        return found

    def group(self, compute: Tensor, grad: Tensor, places: Sequence[Place | None], adapters: AdapterTable) -> LoraGroup:
        """Return the linear's views on the flat buffers; `places` and `adapters` are by adapter row, None where one is free."""

        def cut(buffer: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
            return buffer[start : start + math.prod(shape)].view(shape)

        nowhere = (-1,) * len(self.geometry.modules)
        return LoraGroup(
            a_RK=cut(compute, self.a_start, self.a_shape),
            b_RN=tuple(cut(compute, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            grad_a_RK=cut(grad, self.a_start, self.a_shape),
            grad_b_RN=tuple(cut(grad, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            columns=self.geometry.columns,
            a_rows=tuple(place.a_rows if place else nowhere for place in places),
            b_rows=tuple(place.b_rows if place else nowhere for place in places),
            adapters=adapters,
            first_feature=self.geometry.first_feature,
        )
