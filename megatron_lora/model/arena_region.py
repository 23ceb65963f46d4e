"""One linear's region of the arena's flat buffers: how many rank rows it has, and which of them an adapter takes.

A region is A [R, K], then per module m its B^T [R_m, N_m]; R is the sum of all R_m; then the magnitudes [M, N]
of DoRA adapters, one row for each. Experts' is A of each expert, then B^T of each. R_m is the same in all
linears that merge the same modules, on all stages: the
arena's `room`. An adapter takes, for each module that it targets, as many rows of A and of that B^T as
its padded rank, or of experts its rank there; its rows of A are contiguous. Which rows is its `Places`,
plain data that serve every linear: the first rank chooses them (planning/adapter_rows.py), and all
ranks follow.

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

from fused_ops.experts.adapters import ExpertGroup
from fused_ops.lora.adapters import AdapterTable, LoraGroup, padded_rank
from megatron_lora.huggingface.adapter_files import layer_of
from megatron_lora.huggingface.architecture import EXPERT_MODULES, MAGNITUDES, SPACES
from megatron_lora.model.linears import EXPERT, LinearGeometry

NOWHERE = repeat((0, 0))  # it has no state
ALIGN = 64  # elements; every region starts on a multiple of it: 128 bytes in 16 bits

KINDS = ("A", "B", "m")  # of factors, in the order of a module's tensors
Room = Mapping[str, int]  # module -> rank rows; none of a module that is not there
Places = Mapping[str, Sequence[int]]  # targeted module -> its first row of A, and of its B^T


class LinearSpec(NamedTuple):
    """Linears of one module that an adapter has with a rank or a scale of their own."""

    module: str
    layers: frozenset[int]
    r: int
    ratio: float  # of the linears' scale to the adapter's


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What the arena needs to know of one job's adapter: its rank and targets, and the scale and dropout that kernels apply.

    Kernels see one rank and one scale. A linear of a smaller rank leaves rows of A and B^T zero, whose gradients are zero then, as do
    linears that are not adapted; one of another scale has its B multiplied by its ratio, which the optimizer takes into account.
    """

    r: int
    scale: float
    dropout: float
    target_modules: frozenset[str]  # with MAGNITUDES, where it is a DoRA adapter
    expert_rank: int = 0  # of gate, up and down of each expert, which the base model has in place of an MLP; 0: those are of an MLP
    expert_scale: float = 0.0
    linears: tuple[LinearSpec, ...] = ()  # all that it adapts; without any, each targeted module in each layer, alike
    has_frozen_half: bool = False  # the second half of all rows of A and B^T stays as it is

    @property
    def lora_rank(self) -> int:
        """The rank, by the word of the book of rank rows."""
        return self.r

    def linear(self, module: str, path: str) -> tuple[int, float]:
        """Return the rank of the linear at a path, 0 where it is not adapted, and the ratio of its scale."""
        if not self.linears:
            return self.rank_of(module), 1.0
        layer = layer_of(path)
        return next(((each.r, each.ratio) for each in self.linears if each.module == module and layer in each.layers), (0, 1.0))

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's A and B."""
        return self.expert_rank if self.expert_rank and module in EXPERT_MODULES else self.r

    def rows_of(self, module: str) -> int:
        """Return the rank rows that a module's A, or B, takes."""
        if module == MAGNITUDES:
            return 1
        return self.rank_of(module) if self.expert_rank and module in EXPERT_MODULES else padded_rank(self.r)

    @property
    def adapter(self) -> str:
        """Its kind, "lora" or "dora"."""
        return "dora" if self.has_magnitudes else "lora"

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA adapter."""
        return MAGNITUDES in self.target_modules


FREE_ROW = AdapterSpec(r=1, scale=0.0, dropout=0.0, target_modules=frozenset())  # what the tables hold where an adapter row is free


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One job's A [r, K], B^T [r, N] or magnitudes m [1, N] of one module on this rank, from `start` on in every flat buffer.

    Of experts, one for each.
    """

    path: str  # the module's Hugging Face path, "model.layers.0.self_attn.q_proj"; of experts with EXPERT
    kind: str  # one of KINDS
    start: int
    r: int
    rows: int  # that it takes, the surplus ones of a padded rank included
    width: int  # columns on this rank
    sharded: bool  # this tensor rank alone has it, or these columns of it; otherwise it is replicated on all
    pieces: tuple[tuple[int, int], ...]  # global (first, number) of this rank's columns, in its order
    trained: int  # of its r rows; those behind stay as they are
    ratio: float = 1.0  # of its scale to that which kernels apply; what a B^T here is multiplied by
    tensor_ranks: int = 1  # that share its columns
    experts: range = range(0)  # on this rank
    stride: int = 0  # elements from one expert's to the next one's

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the module, one, or of every expert's."""
        return tuple(self.path.replace(EXPERT, str(expert)) for expert in self.experts) or (self.path,)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each of these begins."""
        return tuple(self.start + index * self.stride for index in range(self.count))

    @property
    def count(self) -> int:
        """How many there are: one, or one for each expert."""
        return len(self.experts) or 1

    @property
    def length(self) -> int:
        """Elements, of all experts."""
        return self.r * self.width * self.count

    def parts(self, values: Tensor) -> list[tuple[str, Tensor]]:
        """Return (path, [r, width]) of `values`, which has the factor's elements one expert after another."""
        return list(zip(self.paths, values.view(-1, self.r, self.width), strict=True))

    def of(self, full: Tensor) -> Tensor:
        """Return this rank's columns of the factor of all tensor ranks."""
        return torch.cat([full[:, first : first + number] for first, number in self.pieces], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one adapter lies in one region: per module its first row of A and of B^T, -1 where the module is not targeted."""

    a_rows: tuple[int, ...]
    b_rows: tuple[int, ...]
    magnitude_row: int = -1


def room_of(specs: Sequence[AdapterSpec]) -> dict[str, int]:
    """Return the rank rows of each module that these adapters take together."""
    modules = {module for spec in specs for module in spec.target_modules}
    return {module: sum(spec.rows_of(module) for spec in specs if module in spec.target_modules) for module in modules}


def side_by_side(specs: Sequence[AdapterSpec]) -> list[Places]:
    """Return places of these adapters one after another, without holes."""
    found: list[Places] = []
    ends: dict[str, int] = {}  # of a merged linear's A, and of a module's B^T
    for spec in specs:
        places = {}
        for kind, modules in SPACES.items():
            for module in modules:
                if module in spec.target_modules:
                    places[module] = (ends.get(kind, 0), ends.get(module, 0))
                    ends[kind], ends[module] = (end + spec.rows_of(module) for end in places[module])
        found.append(places)
    return found


def check_apart(room: Room, held: Sequence[tuple[AdapterSpec, Places]]) -> None:
    """Assert that adapters, each with its places, lie inside the room and overlap nowhere."""
    for modules in SPACES.values():
        spaces = [(0, modules), *((1, (module,)) for module in modules)]  # A, whose rows the modules share; each B^T
        for which, shared in spaces:
            spans = sorted((lies[m][which], lies[m][which] + spec.rows_of(m)) for spec, lies in held for m in shared if m in lies)
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


def shards(
    geometry: LinearGeometry, tensor_rank: int, spec: AdapterSpec, starts: Iterable[tuple[int, int]] = repeat((0, 0))
) -> list[Factor]:  # noqa: B008  it has no state
    """Return the factors of an adapter in a linear of a tensor rank: A, B^T and magnitudes of each targeted module.

    `starts`: (start, stride) of each.
    """
    found, column, k, start = [], geometry.parallel == "column", geometry.in_features, iter(starts)
    for index, (module, path, n) in enumerate(zip(geometry.modules, geometry.paths, geometry.out_features, strict=True)):
        if module in spec.target_modules:
            inputs, outputs = ((0 if column else geometry.first_feature, k),), geometry.pieces(index, tensor_rank)
            r, ratio = spec.linear(module, path)
            of_factor = {"r": r, "rows": spec.rows_of(module), "trained": r // 2 if spec.has_frozen_half else r}
            alone = geometry.tensor_ranks == 1
            kinds = [("A", k, alone or not column, inputs, 1.0, of_factor), ("B", n, alone or column, outputs, ratio, of_factor)]
            if spec.has_magnitudes:
                kinds.append(("m", n, alone or column, outputs, 1.0, {"r": 1, "rows": 1, "trained": 1}))
            for kind, width, sharded, pieces, times, shared in kinds:
                first, stride = next(start)
                own = {"start": first, "stride": stride, "width": width, "sharded": sharded, "pieces": pieces, "ratio": times}
                own |= {"path": path, "experts": geometry.experts, "tensor_ranks": geometry.tensor_ranks}
                found += [Factor(kind=kind, **own, **shared)] if r else []
    return found


def cut(buffer: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """Return a part of a flat buffer."""
    return buffer[start : start + math.prod(shape)].view(shape)


class Region:
    """One linear's part of the flat buffers: offsets, and the views that its kernels get."""

    def __init__(self, geometry: LinearGeometry, room: Room, start: int, tensor_rank: int):
        """Lay a region out from `start` on."""
        self.geometry = geometry
        self.tensor_rank = tensor_rank
        rows = [room.get(module, 0) for module in geometry.modules]
        self.experts = (len(geometry.experts),) if geometry.experts else ()
        self.a_shape = (*self.experts, sum(rows), geometry.in_features)
        self.b_shapes = tuple((*self.experts, *shape) for shape in zip(rows, geometry.out_features, strict=True))
        self.a_start = start
        self.b_starts: list[int] = []
        end = start + math.prod(self.a_shape)
        for shape in self.b_shapes:
            self.b_starts.append(end)
            end += math.prod(shape)
        self.magnitudes_start = end
        self.magnitudes_shape = (0 if self.experts else room.get(MAGNITUDES, 0), sum(geometry.out_features))
        self.end = -(-(end + math.prod(self.magnitudes_shape)) // ALIGN) * ALIGN

    def place(self, spec: AdapterSpec, places: Places) -> Place:
        """Return where an adapter lies here."""
        rows = [places[module] if module in spec.target_modules else (-1, -1) for module in self.geometry.modules]
        magnitude_row = places[MAGNITUDES][0] if spec.has_magnitudes else -1
        return Place(a_rows=tuple(a for a, _ in rows), b_rows=tuple(b for _, b in rows), magnitude_row=magnitude_row)

    def factors(self, spec: AdapterSpec, place: Place) -> list[Factor]:
        """Return an adapter's factors: A, B^T and magnitudes of each targeted module."""
        starts, ((*_, a_height, k), b_shapes) = [], (self.a_shape, self.b_shapes)
        columns, magnitudes = self.geometry.columns, self.magnitudes_start + place.magnitude_row * self.magnitudes_shape[1]
        for b_start, (*_, height, n), a_row, b_row, (column, _) in zip(
            self.b_starts, b_shapes, place.a_rows, place.b_rows, columns, strict=True
        ):
            if a_row >= 0:
                starts += [(self.a_start + a_row * k, a_height * k), (b_start + b_row * n, height * n)]
                starts += [(magnitudes + column, 0)] if spec.has_magnitudes else []
        return shards(self.geometry, self.tensor_rank, spec, starts)

    def magnitudes(self, buffer: Tensor) -> Tensor:
        """Return the linear's magnitudes in a flat buffer, [M, N]."""
        return cut(buffer, self.magnitudes_start, self.magnitudes_shape)

    def views(self, compute: Tensor, grad: Tensor) -> dict[str, Any]:
        """Return the linear's views on the flat buffers, and the geometry that its kernels need: arguments of a group."""

        e = "E" if self.experts else ""
        return {
            f"a_{e}RK": cut(compute, self.a_start, self.a_shape),
            f"b_{e}RN": tuple(cut(compute, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            f"grad_a_{e}RK": cut(grad, self.a_start, self.a_shape),
            f"grad_b_{e}RN": tuple(cut(grad, s, shape) for s, shape in zip(self.b_starts, self.b_shapes, strict=True)),
            "columns": self.geometry.columns,
            "first_feature": self.geometry.first_feature,
        }

    def group(self, views: dict[str, Any], places: Sequence[Place | None], specs: Sequence[AdapterSpec]) -> LoraGroup | ExpertGroup:
        """Return the linear's adapters; `places` and `specs` are by adapter row, None and FREE_ROW where one is free."""
        adapters = AdapterTable(
            ranks=tuple(spec.rank_of(self.geometry.modules[0]) for spec in specs),
            scales=tuple(spec.expert_scale if self.experts else spec.scale for spec in specs),
            dropouts=tuple(spec.dropout for spec in specs),
        )
        nowhere = (-1,) * len(self.geometry.modules)
        a_rows, b_rows = (tuple(getattr(place, rows) if place else nowhere for place in places) for rows in ("a_rows", "b_rows"))
        return (ExpertGroup if self.experts else LoraGroup)(**views, a_rows=a_rows, b_rows=b_rows, adapters=adapters)
