"""Adapters come, go and move in the arena as the book says: nothing overlaps, no bit of another's state changes, what was left is zero."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_ops.lora.adapters import padded_rank
from megatron_lora.huggingface.architecture import MAGNITUDES
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec, LinearSpec, Stripes, room_of, shards, side_by_side
from megatron_lora.model.linears import LinearGeometry
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.training.snapshots import join_shards

QKV, PROJ = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
SIZES = {"q_proj": 24, "k_proj": 8, "v_proj": 8, "o_proj": 32}
STATE = ("master", "exp_avg", "exp_avg_sq", "compute")


def test_a_fused_module_is_cut_and_joined_by_its_parts():
    spec = AdapterSpec(r=3, scale=1.0, dropout=0.0, target_modules=frozenset({"qkv_proj"}))
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    full = {"qkv": (torch.ones(3, 5), values)}  # of q 24, k 8 and v 8 features
    factors, flats = [], []
    for rank in range(2):
        geometry = LinearGeometry(
            modules=("qkv_proj",),
            paths=("qkv",),
            in_features=5,
            out_features=(20,),
            parallel="column",
            first_feature=0,
            parts=((12, 4, 4),),
            tensor_ranks=2,
        )
        factors.append(shards(geometry, rank, spec))
        flats.append(torch.cat([factor.of(part).flatten() for factor, part in zip(factors[-1], (full["qkv"][0], values.T), strict=True)]))
        own = [values[first : first + size] for first, size in ((12 * rank, 12), (24 + 4 * rank, 4), (32 + 4 * rank, 4))]
        assert torch.equal(factors[-1][1].of(values.T), torch.cat(own).T)
    joined = join_shards(factors, flats)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(joined["qkv"], full["qkv"], strict=True))


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
            tensor_ranks=ranks,
        )
        self.adapters = None


def build(adapters=(), room=None, rank=0, ranks=1, dtype=torch.float32) -> Arena:
    """Build an arena over two layers of two linears."""
    linears = [Linear(layer, modules, rank, ranks) for layer in range(2) for modules in (QKV, PROJ)]
    place = {"tensor_rank": rank, "tensor_ranks": ranks, "device": torch.device("cpu")}
    return Arena(linears, adapters, room=room, dtype=dtype, **place)


def of_some_linears(spec: AdapterSpec, layers: tuple[int, ...], less: int) -> AdapterSpec:
    """Return an adapter of some layers alone, with a smaller rank there than its rows."""
    of = (LinearSpec(module, frozenset(layers), max(1, spec.r - less), 0.5) for module in sorted(spec.target_modules))
    return replace(spec, linears=tuple(of))


alike = st.builds(
    AdapterSpec,
    r=st.integers(1, 70),
    scale=st.floats(0.1, 4.0),
    dropout=st.sampled_from([0.0, 0.1]),
    target_modules=st.tuples(st.sets(st.sampled_from([*QKV, *PROJ]), min_size=1), st.sampled_from([(), (MAGNITUDES,)])).map(
        lambda both: frozenset((*both[0], *both[1]))
    ),
)
specs = alike | st.builds(of_some_linears, alike, st.sampled_from([(0,), (1,), (0, 1)]), st.integers(0, 20))


def fill(arena: Arena, row: int, number: int) -> dict[str, torch.Tensor]:
    """Give an adapter values of its own in every buffer of its state; return them by buffer."""
    gen = torch.Generator().manual_seed(number)
    for name in STATE:
        for factor in arena.factors[row]:
            arena.view(factor, getattr(arena, name)).copy_(torch.rand(factor.r, factor.width, generator=gen) + number)
    return state(arena, row)


def state(arena: Arena, row: int) -> dict[str, torch.Tensor]:
    return {name: torch.cat([arena.view(f, getattr(arena, name)).flatten().clone() for f in arena.factors[row]]) for name in STATE}


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


steps = st.lists(st.tuples(st.sampled_from(["join", "leave", "move"]), specs, st.integers(0, 99)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), steps, st.integers(1, 2), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_arena_repeats_the_book_and_keeps_every_bit(units, actions, ranks, dtype):
    room = dict.fromkeys((*QKV, *PROJ), 16 * units) | {MAGNITUDES: 2}
    arenas, book = [build(room=room, rank=rank, ranks=ranks, dtype=dtype) for rank in range(ranks)], Book(room)
    resident: dict[int, AdapterSpec] = {}  # by adapter row, which names it in the book too
    values: dict[int, list[dict[str, torch.Tensor]]] = {}
    for number, (what, spec, which) in enumerate(actions, start=1):
        row = sorted(resident)[which % len(resident)] if resident else -1
        if what == "join":
            places = book.take("new", spec)
            if places is None:
                continue
            sent = json.loads(json.dumps(places))
            (row,) = {arena.add(spec, sent) for arena in arenas}
            assert row not in resident and not any(each.any() for arena in arenas for each in state(arena, row).values())
            book.residents[str(row)], resident[row] = book.residents.pop("new"), spec
            values[row] = [fill(arena, row, number) for arena in arenas]
        elif what == "leave" and resident:
            book.give_back(str(row))
            for arena in arenas:
                arena.grad.fill_(1.0)
                arena.remove(row)
                assert arena.factors[row] == []
                arena.grad[arena.grad != 0] = 0.0
            del resident[row], values[row]
        elif (
            what == "move"
            and resident
            and (moves := book.compact(set(map(str, resident)), spec) if Book(book.room).take("alone", spec) else None)
        ):
            for job, places in moves.items():
                book.move(job, places)
                for arena in arenas:
                    arena.move(int(job), places)
            book.finish_moves()
        for rank, arena in enumerate(arenas):
            check_tables(arena, resident)
            assert len(arena.specs) <= 4 * units, "adapter rows are not used again"
            for other, of_ranks in values.items():
                assert all(torch.equal(now, of_ranks[rank][name]) for name, now in state(arena, other).items()), (
                    "an adapter's state changed"
                )
            covered = sum(factor.length for factors in arena.factors for factor in factors)
            assert all(covered == int((getattr(arena, name) != 0).sum()) for name in STATE), "rows outside adapters are not zero"


def test_a_move_over_the_adapters_own_rows():
    every = frozenset([*QKV, *PROJ])
    spec = AdapterSpec(r=40, scale=1.0, dropout=0.0, target_modules=every)
    book = Book(dict.fromkeys(every, 64))
    book.take("first", AdapterSpec(r=16, scale=1.0, dropout=0.0, target_modules=every))
    places = book.take("second", spec)
    assert places is not None
    arena = build(room=book.room, dtype=torch.bfloat16)
    assert arena.add(spec, places) == 0
    before, zeros = fill(arena, 0, 5), int((arena.master == 0).sum())
    held = arena.linears[0].adapters
    for there in ({module: (a - 16 * (module == "o_proj"), b - 16) for module, (a, b) in places.items()}, places, side_by_side([spec])[0]):
        arena.move(0, there)
        assert all(torch.equal(now, before[name]) for name, now in state(arena, 0).items())
        assert int((arena.master == 0).sum()) == zeros and arena.linears[0].adapters.b_rows[0][0] == there["q_proj"][1]
    assert held.b_rows[0] == (16, 16, 16), "a microbatch in flight keeps its tables"


@settings(max_examples=40, deadline=None)
@given(st.lists(specs, min_size=1, max_size=6))
def test_adapters_that_are_there_from_the_start_lie_in_their_order_without_holes(adapters):
    arena, book = build(adapters), Book(room_of(adapters))
    check_tables(arena, dict(enumerate(adapters)))
    assert arena.places == [book.take(str(number), spec) for number, spec in enumerate(adapters)] == side_by_side(adapters)
    assert not any(rows.spans for rows in book.free.values())


def test_rows_that_are_taken_are_refused():
    spec = AdapterSpec(r=16, scale=1.0, dropout=0.0, target_modules=frozenset(PROJ))
    arena = build(room={"o_proj": 48})
    arena.add(spec, {"o_proj": (16, 16)})
    for rows in ((16, 0), (0, 16), (48, 0), (0, 48), (-16, 0)):
        with pytest.raises(AssertionError, match="of o_proj: adapters at"):
            arena.add(spec, {"o_proj": rows})
    assert arena.add(spec, {"o_proj": (0, 32)}) == 1


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_first_a_is_pefts_and_b_is_zero(gaussian):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian" if gaussian else True)
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 16)), config)
    spread = theirs.base_model.model[0].lora_A["default"].weight.std()
    spec = AdapterSpec(r=8, scale=1.0, dropout=0.0, target_modules=frozenset([*QKV, *PROJ]))
    arena = build([spec])
    arena.put(0, arena.draw(spec, 3, gaussian), arena.master)
    values = {kind: torch.cat([arena.view(f, arena.master).flatten() for f in arena.factors[0] if f.kind == kind]) for kind in "AB"}
    assert not values["B"].any() and abs(values["A"].std() / spread - 1) < 0.15 and values["A"].unique().numel() > 1000


def test_moments_do_not_pass_on():
    every = frozenset([*QKV, *PROJ])
    first, second = (AdapterSpec(r=r, scale=1.0, dropout=0.0, target_modules=every) for r in (16, 5))
    arena = build([first, second], dtype=torch.bfloat16)
    fill(arena, 0, 3)
    arena.grad.fill_(1.0)
    before, places = arena.linears[0].adapters, arena.places[0]
    arena.remove(0)
    assert before.a_rows[0] != arena.linears[0].adapters.a_rows[0], "a microbatch in flight keeps its tables"
    assert arena.add(first, places) == 0 and not any(each.any() for each in state(arena, 0).values())
    assert not any(arena.view(factor, arena.grad).any() for factor in arena.factors[0])


def test_linears_that_merge_the_same_modules_share_their_tables():
    spec = AdapterSpec(r=16, scale=1.0, dropout=0.0, target_modules=frozenset([*QKV, *PROJ]))
    arena = build([spec])
    (first, _, second, _) = (linear.adapters for linear in arena.linears)
    assert first.adapter_table is second.adapter_table and first.a_RK.data_ptr() != second.a_RK.data_ptr()
    with arena.showing([AdapterSpec(r=5, scale=1.0, dropout=0.5, target_modules=frozenset(PROJ))]):
        assert [linear.adapters.width for linear in arena.linears] == [0, 16, 0, 16] and arena.linears[1].adapters.has_dropout
    assert [linear.adapters.width for linear in arena.linears] == [48, 16, 48, 16] and not arena.linears[1].adapters.has_dropout


@pytest.mark.parametrize(
    ("parts", "num_views"), [([(0, 2), (5, 3), (10, 2), (15, 3)], 2), ([(0, 2), (5, 3), (10, 2), (16, 3)], 4), ([], 0)]
)
def test_stripes_are_the_parts_as_few_views(parts, num_views):
    flat = torch.arange(23.0)[1:]  # begins inside its storage
    views = Stripes.of(parts, 2).views(flat)
    assert len(views) == num_views
    found = [row for rows in zip(*(view.unbind() for view in views), strict=True) for row in rows]
    assert [row.tolist() for row in found] == [flat[start : start + length].tolist() for start, length in parts]


def test_shards_are_a_function_of_adapter_and_rank():
    spec = AdapterSpec(r=5, scale=1.0, dropout=0.0, target_modules=frozenset(["k_proj", "o_proj"]))
    for rank in range(2):
        arena = build([AdapterSpec(r=16, scale=1.0, dropout=0.0, target_modules=frozenset(QKV)), spec], rank=rank, ranks=2)
        found = [shard for region in arena.regions for shard in shards(region.geometry, rank, spec)]
        facts = [[(f.path, f.kind, f.r, f.width, f.sharded, f.pieces) for f in factors] for factors in (found, arena.factors[1])]
        assert facts[0] == facts[1] and {f.pieces[0][0] for f in found} == {0, *([4, 16] if rank else [])}
        assert not any(padded_rank(f.r) * f.width == 0 for f in found)
