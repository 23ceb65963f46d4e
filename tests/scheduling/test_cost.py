"""Cost, memory, layer split and data-parallel split: by hand, by round trip, and against brute force."""

import dataclasses
import json
import statistics
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.cost import (
    DEVICES,
    CostModel,
    MeasuredCosts,
    Measurement,
    ModelShape,
    PassCost,
    StageCost,
    analytic_cost,
    head_layers,
    head_share,
    linear_tiles,
    recomputing,
    refine,
    split_layers,
    stage_costs,
)
from scheduling.data_parallel import BALANCE, deal, split_batch
from scheduling.memory import choose_capacity
from scheduling.planner import plan_stream
from scheduling.slot_cost import TILE_ROWS, SlotCost, even_slot_estimate
from scheduling.types import Microbatch, PlanError
from scheduling.validate import replay_replicas

LLAMA_8B = ModelShape(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=14336, vocab_size=128256)
COST = SlotCost()


def plan_replicas(lengths, num_replicas, num_stages, capacity, cost=None):
    """Plan one stream per replica, as a run does (planning/plan_feed.py)."""
    dealt = deal(lengths, num_replicas, cost)
    shared = plan_stream(dealt.rounds, num_stages, capacity, 1, 1, cost)
    return tuple(tuple(dealt.part(microbatch, replica) for microbatch in shared) for replica in range(num_replicas))


def test_llama_8b_numbers():
    assert LLAMA_8B.layer_params == 4096 * 128 * 80 + 3 * 4096 * 14336
    assert 32 * LLAMA_8B.layer_params + 2 * LLAMA_8B.head_params == pytest.approx(8.03e9, rel=1e-3)
    assert 16 * 32 * LLAMA_8B.lora_width == pytest.approx(41.9e6, rel=2e-3)  # r = 16 on all linears, as PEFT counts


SMOLLM2 = ModelShape(hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=1536, vocab_size=49152)


def test_the_head_in_layers():
    h100, cpu = DEVICES["h100"], DEVICES["cpu"]
    plain, again = head_layers(LLAMA_8B, h100, 8192), head_layers(LLAMA_8B, h100, 8192, recompute="full")
    assert 1.4 < again < plain < 2.4
    half = head_layers(LLAMA_8B, h100, 8192, recompute=("full",) * 16 + ("cheap",) * 16)
    assert again < half < plain
    assert head_layers(SMOLLM2, cpu, 512) == pytest.approx(8, rel=0.02)  # the work alone
    assert head_layers(SMOLLM2, h100, 512) < 0.5  # layers of a small model are launches, not work


def test_the_head_computes_its_targets_alone():
    every, some = head_layers(LLAMA_8B, DEVICES["h100"], 8192), head_layers(LLAMA_8B, DEVICES["h100"], 8192, head_share=0.25)
    assert some == pytest.approx(every / 4)
    whole, part = (analytic_cost(LLAMA_8B, DEVICES["h100"], (20, 12), head_share=share).stages for share in (1.0, 0.25))
    assert part[0] == whole[0] and part[1].backward == whole[1].backward
    saved = whole[1].forward.per_token - part[1].forward.per_token
    assert saved == pytest.approx(0.75 * 4 * LLAMA_8B.head_params / 6.4e14)


@given(st.integers(1, 9), st.integers(100, 600), st.integers(1, 10))
def test_the_rows_of_the_head_are_targets_and_what_fills_their_chunks(tenths, tokens, chunk_rows):
    """Beside a count over microbatches whose numbers of targets spread over some whole chunks."""
    targets, rows = tokens * tenths // 10, head_share(tenths / 10, tokens, chunk_rows) * tokens
    spread = range(targets - chunk_rows, targets + chunk_rows)
    if spread.start > 0 and spread.stop + chunk_rows < tokens:
        counted = [-(-number // chunk_rows) * chunk_rows for number in spread]
        assert rows == pytest.approx(statistics.fmean(counted), abs=2)
    assert chunk_rows <= rows <= tokens


@given(st.floats(0.01, 1.0), st.integers(1, 600), st.integers(1, 600))
def test_no_microbatch_has_less_than_a_chunk_nor_more_than_its_tokens(share, tokens, chunk_rows):
    assert head_share(1.0, tokens, chunk_rows) == 1.0
    assert min(chunk_rows, tokens) / tokens <= head_share(share, tokens, chunk_rows) <= 1.0
    assert head_share(share, tokens, max(tokens, chunk_rows)) == 1.0  # a single chunk


def test_analytic_cost_scales_as_it_must():
    model = analytic_cost(LLAMA_8B, DEVICES["h100"], (8, 8, 8, 8))
    first, last = model.stages[0], model.stages[-1]
    assert first.forward.per_token == pytest.approx(8 * 2 * LLAMA_8B.layer_params / 6.4e14)
    assert last.forward.per_token - first.forward.per_token == pytest.approx(4 * LLAMA_8B.head_params / 6.4e14)
    assert last.backward == first.backward  # the loss made its gradient in the forward
    assert analytic_cost(LLAMA_8B, DEVICES["h100"], (8, 8, 8, 8), tensor=2).stages[0].forward.per_token == first.forward.per_token / 2
    recomputed = analytic_cost(LLAMA_8B, DEVICES["h100"], (8,) * 4, recompute="full").stages[0]
    last_product = LLAMA_8B.hidden_size * LLAMA_8B.ffn_size / LLAMA_8B.layer_params  # is not computed again
    assert recomputed.backward.per_token == pytest.approx((2.02 - last_product) * recomputed.forward.per_token)
    cheap = analytic_cost(LLAMA_8B, DEVICES["h100"], (8,) * 4, recompute="cheap").stages[0]
    assert 1.01 < cheap.backward.per_token / first.backward.per_token < 1.03 and cheap.forward == first.forward
    assert first.forward.seconds(0, 0) == 0.0
    passes = [
        (stage.forward.seconds(4096, 4096.0 * 1024, 16 * 4096), stage.backward.seconds(4096, 4096.0 * 1024, 16 * 4096))
        for stage in model.stages
    ]
    assert len(passes) == 4 and passes[0][1] > passes[0][0] < passes[3][0]
    planner = model.slot_cost()
    assert 1e-6 < planner.per_square < 1e-4 and planner.fixed > 0


def test_json_round_trip():
    model = analytic_cost(LLAMA_8B, DEVICES["a100"], (10, 6))
    assert CostModel.from_json(json.loads(json.dumps(dataclasses.asdict(model)["stages"]))) == model


def test_refining_recovers_the_truth_and_leaves_the_unmeasured_alone():
    _, model = analytic_cost(LLAMA_8B, DEVICES["h100"], (16, 16)).stages
    truth = model.backward
    factors = {"per_token": 1.4, "per_square": 2.0, "per_rank_token": 3.0, "fixed": 0.5}
    rows = []
    for tokens, mean, rank in product((256, 1024, 4096, 16384), (128, 1024), (0, 8, 64)):
        terms = {
            "per_token": truth.per_token * tokens,
            "per_square": truth.per_square * tokens * mean,
            "per_rank_token": truth.per_rank_token * tokens * rank,
            "fixed": truth.fixed,
        }
        seconds = sum(factors[name] * term for name, term in terms.items())
        rows.append(Measurement(True, tokens, tokens * mean, tokens * rank, seconds))
    refined = refine(model, rows)
    assert refined.forward == model.forward
    for m in rows:
        assert refined.backward.seconds(m.tokens, m.squares, m.rank_tokens) == pytest.approx(m.seconds, rel=0.02)
    one = refine(model, [Measurement(False, 1000, 1e6, 0, 2 * model.forward.seconds(1000, 1e6))])
    assert one.forward.per_square == pytest.approx(2 * model.forward.per_square, rel=1e-3) and one.backward == model.backward


def test_refining_keeps_the_mean_of_noisy_times_and_leaves_out_what_compiled():
    (model,) = analytic_cost(LLAMA_8B, DEVICES["h100"], (32,)).stages
    truth = model.forward.seconds(1000, 1e6)
    rows = [Measurement(False, 1000, 1e6, 0, 2 * truth * factor) for factor in (0.5, 1.5) * 10]
    for extra in ([], [Measurement(False, 1000, 1e6, 0, 500 * truth)]):
        refined = refine(model, rows + extra).forward
        assert refined.seconds(1000, 1e6) == pytest.approx(2 * truth, rel=1e-2)


def test_layers_leave_room_for_the_head():
    assert split_layers(32, 4) == (8, 8, 8, 8)
    assert split_layers(32, 4, head_layers=2.0) == (9, 9, 8, 6)
    assert split_layers(30, 2, head_layers=8) == (19, 11)
    assert split_layers(4, 4, head_layers=9) == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="3 layers cannot be split over 4 stages"):
        split_layers(3, 4)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 20))
def test_layer_split_is_the_best_there_is(num_stages, more, head_tenths):
    head = head_tenths / 10
    split = split_layers(num_stages + more, num_stages, head)

    def slowest(layers):
        return max(count + (head if stage == num_stages - 1 else 0) for stage, count in enumerate(layers))

    every = (layers for layers in product(range(1, more + 2), repeat=num_stages) if sum(layers) == num_stages + more)
    assert slowest(split) == pytest.approx(min(map(slowest, every)))


def test_capacity_is_no_larger_than_fits_or_pays():
    lengths = [[[500] * 16] * 8] * 4
    chosen = choose_capacity(lengths, 4, 16384)
    assert 500 <= chosen < 16384 and chosen % 256 == 0
    assert even_slot_estimate(lengths, 4, chosen) >= even_slot_estimate(lengths, 4, 16384) - 0.002
    assert choose_capacity(lengths, 4, 1000) <= 1000
    with pytest.raises(ValueError, match="the longest sample has 500 tokens, memory allows 400"):
        choose_capacity(lengths, 4, 400)


def test_capacity_stops_where_recomputing_for_it_costs_more_than_it_gains():
    lengths = [[[500] * 16] * 8] * 4
    chosen = choose_capacity(lengths, 2, 16384)
    assert choose_capacity(lengths, 2, 16384, slowdown=lambda size: 1.0 if size <= 768 else 1.3) <= 768 < chosen


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=60)
def test_slices_are_balanced_or_provably_indivisible(batch, num_replicas):
    split = split_batch(batch, num_replicas, COST)
    parts = [[sample for sample in dealt if sample >= 0] for dealt in split.tolist()]
    assert sorted(sample for part in parts for sample in part) == list(range(len(batch)))
    times = [COST.sample(tokens) for tokens in batch]
    mean = sum(times) / num_replicas
    excess = max(sum(times[k] for k in part) for part in parts) / mean - 1
    best = min(
        max(sum(times[k] for k, replica in enumerate(owners) if replica == r) for r in range(num_replicas)) / mean - 1
        for owners in product(range(num_replicas), repeat=len(batch))
    )
    assert excess <= BALANCE + 1e-9 or best > BALANCE - 1e-9


@given(
    st.lists(st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=7), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
)
@settings(max_examples=25)
def test_replicas_step_in_the_same_slots(lengths, num_replicas, num_stages):
    streams = plan_replicas(lengths, num_replicas, num_stages, 64, cost=SlotCost(1e-3, 2.0))
    assert len(streams) == num_replicas and len(set(map(len, streams))) == 1
    replay_replicas(streams, lengths, num_stages, 64)


def test_replicas_that_differ_are_refused():
    lengths = [[[5, 5]]]
    first, second = plan_replicas(lengths, 2, 2, 64)
    with pytest.raises(PlanError, match="replica 1 ends a step in another slot"):
        replay_replicas([first, (Microbatch(), *second)], lengths, 2, 64)
    with pytest.raises(PlanError, match="is scheduled 2 times"):
        replay_replicas([first, first], lengths, 2, 64)


def test_stages_whose_time_is_all_launches_still_weigh_slots():
    launch = PassCost(per_token=0.0, per_square=0.0, per_rank_token=0.0, fixed=0.1)
    cost = CostModel((StageCost(launch, launch),)).slot_cost()
    assert cost.slot([10, 10]) == pytest.approx(cost.slot([1000]), rel=1e-2)  # slots count, tokens hardly


LLAMA_8B = ModelShape(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=14336, vocab_size=128256)


def test_linear_time_is_a_staircase_of_whole_waves():
    """Of 5,120 columns 26 row tiles are four waves of 132, 27 to 33 are five; a device without tiles has no steps."""
    square = ModelShape(hidden_size=5120, num_layers=1, num_heads=40, num_kv_heads=0, head_dim=128, ffn_size=5120, vocab_size=8)
    tiles = linear_tiles(square, DEVICES["h100"])
    assert tiles[0] == 0 and tiles[33] == pytest.approx(33 * TILE_ROWS) and tiles[26] == pytest.approx(0.8 * tiles[33])
    assert tiles[27] > 0.92 * tiles[33] and tiles[34] > 1.1 * tiles[33]
    for tensor in (1, 2):
        found = linear_tiles(LLAMA_8B, DEVICES["h100"], tensor)
        assert list(found) == sorted(found) and all(time >= n * TILE_ROWS for n, time in enumerate(found))
    half = dataclasses.replace(LLAMA_8B, num_heads=16, num_kv_heads=4, ffn_size=7168)
    assert linear_tiles(LLAMA_8B, DEVICES["h100"], 2) == linear_tiles(half, DEVICES["h100"])
    assert linear_tiles(LLAMA_8B, DEVICES["cpu"]) == ()


@given(st.integers(1, 50_000), st.integers(1, 40), st.floats(0, 1e-2), st.floats(0, 1e4), st.floats(0, 1e3))
def test_sums_of_times_are_exact_in_any_order(tokens, segments, per_square, fixed, per_segment):
    cost = SlotCost(per_square=per_square, fixed=fixed, per_segment=per_segment, tiles=(0.0, 131.7, 0.1))
    for time in (cost.sample(tokens), cost.overhead(tokens, segments), cost.slot([tokens, 3], segments)):
        assert (1024 * time).is_integer()
    assert cost.sample(tokens) == pytest.approx(tokens + per_square * tokens**2, abs=1e-3)


def test_a_slot_takes_its_stair_and_more_for_every_further_job():
    cost = SlotCost(per_square=0.0, fixed=10.0, per_segment=7.0, tiles=(0.0, 200.0, 300.0))
    assert cost.slot([]) == 0.0 and cost.slot([100]) == 210.0 and cost.slot([28, 100]) == 210.0 and cost.slot([129], segments=3) == 324.0
    assert cost.slot([257]) == 267.0 + 300.0 - 256.0, "beyond the table it wastes what the end of the table wastes"


def test_a_measured_device_costs_what_its_layers_and_its_head_do():
    def cost(forward, backward):
        passes = (PassCost(per_token=each, per_square=0.0, per_rank_token=0.0, fixed=1.0) for each in (forward, backward))
        return StageCost(*passes)

    layers = (("none", cost(1.0, 2.0)), ("cheap", cost(1.0, 2.5)), ("full", cost(1.0, 3.0)))
    device = dataclasses.replace(DEVICES["h100"], measured=MeasuredCosts(layers=layers, head=cost(8.0, 4.0), step_s=0.1))
    first, last = stage_costs(
        LLAMA_8B, device, (3, 2), tensor=2, recompute=["full", "full", "none", "cheap", "none"], head_share=0.5
    ).stages
    assert (first.forward.per_token, first.backward.per_token, first.forward.fixed) == (3.0, 8.0, 3.0)
    assert (last.forward.per_token, last.backward.per_token, last.backward.fixed) == (2.0 + 4.0, 4.5 + 2.0, 3.0)
    assert stage_costs(LLAMA_8B, DEVICES["h100"], (3, 2)) == analytic_cost(LLAMA_8B, DEVICES["h100"], (3, 2))
    assert head_layers(LLAMA_8B, device, 10, head_share=0.5) == pytest.approx((40 + 1 + 20 + 1) / (10 + 1 + 20 + 1))


def test_recomputation_adds_a_forward_or_a_little_of_one():
    none = StageCost(*(PassCost(per_token=each, per_square=each, per_rank_token=each, fixed=each) for each in (1.0, 2.0)))
    assert recomputing(none, "none") == none and recomputing(none, "full").backward.fixed == 3.0
    assert 2.0 < recomputing(none, "cheap").backward.per_token < 2.1 and recomputing(none, "full").forward == none.forward
