"""Adapters come and go in the arena: rank rows never overlap, others keep their numbers, and what was given back is zero."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_ops.lora.adapters import padded_rank
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec, FreeRows, NoRoom
from megatron_lora.model.linears import LinearGeometry

QKV, PROJ = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
SIZES = {"q_proj": 24, "k_proj": 8, "v_proj": 8, "o_proj": 32}
BUFFERS = ("master", "grad", "exp_avg", "exp_avg_sq", "compute")


class Linear:
    """What the arena needs of a patched linear: of one layer, on one tensor rank of `ranks`."""

    def __init__(self, layer: int, modules: tuple[str, ...], rank: int, ranks: int):
        column = modules == QKV
        self.geometry = LinearGeometry(
            modules=modules,
            paths=tuple(f"model.layers.{layer}.{module}" for module in modules),
            in_features=32 if column else 32 // ranks,
            out_features=tuple(SIZES[module] // (ranks if column else 1) for module in modules),
            parallel="column" if column else "row",
            first_feature=0 if column else rank * (32 // ranks),
        )
        self.adapters = None


def build(adapters=(), room_for=None, rank=0, ranks=1, dtype=torch.float32) -> Arena:
    """Build an arena over two layers of two linears."""
    linears = [Linear(layer, modules, rank, ranks) for layer in range(2) for modules in (QKV, PROJ)]
    place = {"tensor_rank": rank, "tensor_ranks": ranks, "device": torch.device("cpu")}
    return Arena(linears, adapters, room_for=room_for, dtype=dtype, **place)


specs = st.builds(
    AdapterSpec,
    r=st.integers(1, 70),
    scale=st.floats(0.1, 4.0),
    dropout=st.sampled_from([0.0, 0.1]),
    target_modules=st.sets(st.sampled_from([*QKV, *PROJ]), min_size=1).map(frozenset),
)


def fill(arena: Arena, row: int, number: float) -> None:
    for factor in arena.factors[row]:
        for name in BUFFERS:
            arena.view(factor, getattr(arena, name)).fill_(number)


def holds(arena: Arena, row: int, number: float) -> bool:
    return all(bool((arena.view(f, getattr(arena, name)) == number).all()) for f in arena.factors[row] for name in BUFFERS)


def check_tables(arena: Arena, resident: dict[int, AdapterSpec]) -> None:
    """Check every linear's tables against who is resident, by the operators' own words (fused_ops.lora.adapters)."""
    for linear in arena.linears:
        group = linear.adapters
        assert len(group.a_rows) == len(arena.factors)
        for row, (a_rows, b_rows) in enumerate(zip(group.a_rows, group.b_rows, strict=True)):
            targets = resident[row].target_modules if row in resident else frozenset()
            assert [a >= 0 for a in a_rows] == [b >= 0 for b in b_rows] == [module in targets for module in linear.geometry.modules]
            if row in resident:
                assert (group.adapters.ranks[row], group.adapters.scales[row]) == (resident[row].r, resident[row].scale)
        for m in range(len(linear.geometry.modules)):
            for rows, limit in (
                ([a[m] for a in group.a_rows], group.a_RK.shape[0]),
                ([b[m] for b in group.b_rows], group.b_RN[m].shape[0]),
            ):
                spans = sorted((first, first + padded_rank(resident[row].r)) for row, first in enumerate(rows) if first >= 0)
                assert all(end <= limit for _, end in spans)
                assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(specs, min_size=1, max_size=6), st.lists(st.tuples(st.booleans(), specs, st.integers(0, 99)), max_size=25), st.integers(1, 2)
)
def test_joins_and_leaves_keep_everybody_apart(room_for, moves, ranks):
    arenas = [build(room_for=room_for, rank=rank, ranks=ranks) for rank in range(ranks)]
    resident: dict[int, AdapterSpec] = {}
    for number, (joins, spec, which) in enumerate(moves, start=1):
        if joins:
            before = [
                [*map(tuple, (free.intervals for region in arena.regions for free in (region.free_a, *region.free_b)))] for arena in arenas
            ]
            try:
                rows = {arena.add(spec) for arena in arenas}
            except NoRoom:
                after = [
                    [*map(tuple, (free.intervals for region in a.regions for free in (region.free_a, *region.free_b)))] for a in arenas
                ]
                assert after == before, "an adapter without room took some"
                continue
            assert len(rows) == 1, "tensor ranks disagree"
            row = rows.pop()
            assert row not in resident and all(holds(arena, row, 0.0) for arena in arenas), "the row was not clean"
            resident[row] = spec
            for arena in arenas:
                fill(arena, row, float(number))
        elif resident:
            row = sorted(resident)[which % len(resident)]
            numbers = {
                other: float(arenas[0].view(arenas[0].factors[other][0], arenas[0].master)[0, 0]) for other in resident if other != row
            }
            for arena in arenas:
                arena.remove(row)
                assert arena.factors[row] == [] and all(holds(arena, other, value) for other, value in numbers.items())
            del resident[row]
        for arena in arenas:
            check_tables(arena, resident)
            covered = sum(factor.length for factors in arena.factors for factor in factors)
            assert covered == sum(int((arena.master != 0).sum()) for _ in range(1)), "rows outside adapters are not zero"


@settings(max_examples=40, deadline=None)
@given(st.lists(specs, min_size=1, max_size=6))
def test_adapters_that_are_there_from_the_start_lie_in_their_order_without_holes(adapters):
    arena = build(adapters)
    check_tables(arena, dict(enumerate(adapters)))
    for region, places in zip(arena.regions, arena.places, strict=True):
        assert not region.free_a.intervals and not any(free.intervals for free in region.free_b)
        firsts = [min(row for row in place.a_rows if row >= 0) for place in places if place and any(row >= 0 for row in place.a_rows)]
        assert firsts == sorted(firsts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), max_size=40))
def test_free_rows_are_what_nobody_holds(size, moves):
    free, held = FreeRows(size), []
    for count, which in moves:
        first = free.find(count)
        if first is None:
            used = sorted(held)
            gaps = [b[0] - (a[0] + a[1]) for a, b in zip([(0, 0), *used], [*used, (size, 0)], strict=True)]
            assert max(gaps) < count, "rows were free and not found"
            if held:
                free.give_back(*held.pop(which % len(held)))
            continue
        free.take(first, count)
        held.append((first, count))
        assert sum(end - low for low, end in free.intervals) == size - sum(n for _, n in held)
    with pytest.raises(AssertionError):
        free.give_back(*(free.intervals[0] if free.intervals else (0, size + 1)))


def test_a_row_of_the_departed_is_taken_first_and_moments_do_not_pass_on():
    every = frozenset([*QKV, *PROJ])
    first, second = (AdapterSpec(r=r, scale=1.0, dropout=0.0, target_modules=every) for r in (16, 5))
    arena = build([first, second], dtype=torch.bfloat16)
    fill(arena, 0, 3.0)
    before = arena.linears[0].adapters
    arena.remove(0)
    assert before.a_rows[0] != arena.linears[0].adapters.a_rows[0], "a microbatch in flight keeps its tables"
    assert arena.add(first) == 0 and holds(arena, 0, 0.0)
    with pytest.raises(NoRoom, match="model.layers.0.q_proj"):
        arena.add(second)
    assert math.isclose(float(arena.master.abs().sum()), 0.0)
