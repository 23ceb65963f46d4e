"""The memory model by hand, and the policies that follow from it against all that there are.

Whether it counts what a GPU allocates is tests/megatron_lora/planning/test_memory.py's question.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.cost import DEVICES
from scheduling.layer_memory import Adapter
from scheduling.memory import cheapest_policies, fitting_tokens, peak_bytes, stage_memory, tokens_in_flight, usable_bytes
from scheduling.model_shape import ModelShape
from scheduling.types import Microbatch, Segment

LLAMA_8B = ModelShape(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=14336, vocab_size=128256)
LAYERS = (9, 9, 8, 6)
FOUR = [Adapter(16)] * 4
H100 = DEVICES["h100"]


def stages(recompute="none", **options):
    return [stage_memory(LLAMA_8B, LAYERS, stage, FOUR, recompute=recompute, **options) for stage in range(len(LAYERS))]


def test_weights_and_adapters_by_hand():
    first, *_, last = stages()
    norm, matrix = 4096 * 2, 128256 * 4096 * 2
    assert first.weights == 2 * 9 * LLAMA_8B.layer_params + matrix + 9 * 2 * norm
    assert last.weights == 2 * 6 * LLAMA_8B.layer_params + matrix + (6 * 2 + 1) * norm
    assert first.adapters == 4 * 16 * 9 * LLAMA_8B.lora_width * 18
    assert stage_memory(LLAMA_8B, (32,), 0, [Adapter(17)]).adapters == 2 * 16 * 32 * LLAMA_8B.lora_width * 18  # rows come in sixteens
    assert stage_memory(LLAMA_8B, (32,), 0, [Adapter(16, ("q_proj", "down_proj"))]).adapters == 16 * 32 * (8192 + 14336 + 4096) * 18
    assert stage_memory(LLAMA_8B, (32,), 0, FOUR, item=4).adapters == 4 * 16 * 32 * LLAMA_8B.lora_width * 16  # masters are what computes
    eighth = stage_memory(LLAMA_8B, (32,), 0, FOUR, weight_bytes=1)
    assert first.runtime > 0 and eighth.weights == 32 * LLAMA_8B.layer_params + 2 * matrix + 65 * norm


def test_tensor_ranks_hold_whole_a_of_columns_and_whole_b_of_rows():
    whole, half = (stage_memory(LLAMA_8B, (32,), 0, [Adapter(16, modules)], tensor=2) for modules in (("q_proj",), ("o_proj",)))
    alone = 16 * 32 * (4096 + 4096) * 18
    gradients_on_their_way = 16 * 32 * (4096 + 2048) * 4
    assert whole.adapters == half.adapters == alone * 3 / 4 + gradients_on_their_way


def test_a_token_of_a_layer_by_hand():
    kept = {policy: stage_memory(LLAMA_8B, (32,), 0, FOUR, recompute=policy).layer.kept(policy) for policy in ("none", "cheap", "full")}
    s, statistics, sums = 2 * 16 * (3 + 1 + 2 + 1), 2 * 4, 4 * 32
    assert kept["none"] == 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336) + s + statistics + sums
    assert kept["none"] - kept["cheap"] == 2 * (2 * 4096 + 14336) and kept["full"] == 2 * 4096
    headed = stage_memory(replace(LLAMA_8B, qk_norm=True), (32,), 0, FOUR).layer
    assert headed.kept("none") - kept["none"] == 2 * (4096 + 2 * 1024)
    bare = stage_memory(LLAMA_8B, (32,), 0, [Adapter(16, ("o_proj",))]).layer  # the other linears need no input
    assert kept["none"] - bare.kept("none") == 2 * (2 * 4096 + 14336) + s - 2 * 16


def test_memory_grows_with_what_it_should():
    plain, cheap, full = stages("none"), stages("cheap"), stages("full")
    fits = [fitting_tokens(each, H100) for each in (full, cheap, plain)]
    assert fits == sorted(fits, reverse=True) and fits[0] > fits[1] > fits[2] > 4096
    for chosen, budget in zip((full, cheap, plain), fits, strict=True):
        peaks = [peak_bytes(memory, stage, 4, budget) for stage, memory in enumerate(chosen)]
        assert max(peaks) <= usable_bytes(H100) < max(peak_bytes(m, stage, 4, budget + 1) for stage, m in enumerate(chosen))
    mixed = stage_memory(LLAMA_8B, LAYERS, 1, FOUR, recompute=("none",) * 9 + ("full",) * 4 + ("none",) * 19)
    expected = 4 * full[1].per_token_in_flight + 5 * plain[1].per_token_in_flight
    assert mixed.per_token_in_flight * 9 == pytest.approx(expected)
    whole, shards = (stages(tensor=4, sequence=sequence)[0] for sequence in (False, True))
    assert shards.per_token_in_flight < whole.per_token_in_flight < plain[0].per_token_in_flight
    assert fitting_tokens(plain, replace(H100, memory_bytes=4e9)) == 0
    assert [stage.num_messages for stage in plain] == [2, 3, 3, 1]  # sent either way, and the gradient that came
    small = [stage.workspace(256) for stage in plain]
    assert small[3] > 256 * 128256 * 2 > small[2]  # logits
    stream = tuple(Microbatch((Segment(0, k, (0,), tokens),)) for k, tokens in enumerate((5, 1, 7, 2)))
    assert [tokens_in_flight(stream, stage, 3) for stage in range(3)] == [13, 9, 7]


def test_layers_that_run_again_need_room_where_the_others_are_still_kept():
    first, last = (
        stage_memory(LLAMA_8B, (32,), 0, FOUR, recompute=policies)
        for policies in (["full"] * 16 + ["none"] * 16, ["none"] * 16 + ["full"] * 16)
    )
    assert first.per_token_in_flight == last.per_token_in_flight and first.workspace(8192) < last.workspace(8192)


@given(st.integers(1, 6), st.integers(0, 700), st.integers(1, 100), st.integers(1, 100))
@settings(max_examples=200)
def test_the_cheapest_policies_that_fit(num_layers, room, saved_by_cheap, saved_by_more):
    saved = {"none": 0, "cheap": saved_by_cheap, "full": saved_by_cheap + saved_by_more}

    def fits(policies):
        return num_layers * 100 - sum(saved[policy] for policy in policies) <= room

    every = [policies for policies in product(("none", "cheap", "full"), repeat=num_layers) if fits(policies)]
    chosen = cheapest_policies(num_layers, fits)
    if not every:
        assert chosen is None
    else:
        costs = [(policies.count("full"), policies.count("cheap")) for policies in every]
        assert (chosen.count("full"), chosen.count("cheap")) == min(costs) and fits(chosen)
        assert list(chosen) == sorted(chosen, key=("full", "cheap", "none").index)
