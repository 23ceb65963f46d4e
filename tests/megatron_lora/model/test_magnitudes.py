"""DoRA of a stage against peft, and the norms of W + c B A for every way in which W may be stored, and for shares of its inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from full_logits import full_logits
from peft import PeftModel
from tiny import random_factor, save_model, stage_input

from fused_ops.lora.fp8 import quantise_rows, quantise_weight
from fused_ops.lora.frozen import operand
from fused_ops.lora.nf4 import quantise_nf4
from fused_ops.lora.packed import Scratch, pack
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.adapter_files import AdapterFile, write_adapter
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model import magnitudes
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec, Region
from megatron_lora.model.linears import LinearGeometry
from megatron_lora.model.magnitudes import MagnitudeRows
from megatron_lora.model.stage import Stage, build_stage

WIDTHS, K, R, SCALE = (20, 12), 128, 3, 1.75
STORED = {
    "fp32": lambda w: w,
    "bf16": lambda w: w.bfloat16(),
    "fp8": quantise_weight,
    "nf4": lambda w: pack(quantise_nf4(w), torch.float32, False, Scratch()),
    "nf4 in 8 bits": lambda w: pack(quantise_nf4(w), torch.bfloat16, True, Scratch()),
    "packed fp8": lambda w: pack(quantise_rows(w), torch.bfloat16, False, Scratch()),
}


def rows_of(weight, parallel="column", ranks=1):
    geometry = LinearGeometry(
        modules=("gate_proj", "up_proj"), paths=("gate", "up"), in_features=K // ranks, out_features=WIDTHS, parallel=parallel,
        first_feature=0, tensor_ranks=ranks,
    )  # fmt: skip
    region = Region(geometry, {"gate_proj": 16, "up_proj": 16, "magnitudes": 2}, 0, 0)
    linear = SimpleNamespace(stored_weight=weight, parallel=parallel, config=SimpleNamespace(sequence_parallel=False))
    return MagnitudeRows(linear, region, torch.zeros(region.end), torch.zeros(region.end))


@pytest.fixture
def factors():
    draw = torch.Generator().manual_seed(0)
    w, a = torch.randn(sum(WIDTHS), K, generator=draw) * 0.1, torch.randn(2, R, K, generator=draw) * 0.3
    return w, a, [torch.randn(R, n, generator=draw) * 0.2 for n in WIDTHS]


@pytest.mark.parametrize("stored", STORED)
def test_norms_are_those_of_the_sum(stored, factors, monkeypatch):
    monkeypatch.setattr(magnitudes, "BLOCK_ROWS", 8)
    w, a, b = factors
    weight = STORED[stored](w)
    rows, matrix = rows_of(weight), operand(weight, backward=False)
    exact = matrix.double() if isinstance(matrix, torch.Tensor) else matrix.float().double()
    exact[WIDTHS[0] :] += SCALE * b[1].T.double() @ a[1].double()  # the first module is not targeted
    squares = rows.square_norms([(1, a[1], b[1])], SCALE)
    torch.testing.assert_close(squares.double(), exact.square().sum(1), rtol=1e-5, atol=0)
    rows.set(1, [1], squares, restart=True)
    table = rows.factors
    assert (table.scale_MN == 1).all() and not table.inverse_norm_MN[0].any() and not table.inverse_norm_MN[1, : WIDTHS[0]].any()
    torch.testing.assert_close(rows.master_MN[1, WIDTHS[0] :].double(), exact.norm(dim=1)[WIDTHS[0] :], rtol=1e-5, atol=0)
    rows.master_MN[1] *= 3
    rows.set(1, [1], squares, restart=False)
    torch.testing.assert_close(table.scale_MN[1, WIDTHS[0] :], torch.full((WIDTHS[1],), 3.0))
    rows.move(1, 0)
    assert torch.equal(table.scale_MN[0], table.scale_MN[1]) and torch.equal(table.inverse_norm_MN[0], table.inverse_norm_MN[1])


def test_ranks_that_hold_parts_of_the_inputs_add_up(factors):
    w, a, b = factors
    terms = [(m, a[m], b[m]) for m in (0, 1)]
    parts = [
        rows_of(w[:, half], "row", 2).square_norms([(m, a_RK[:, half], b_RN) for m, a_RK, b_RN in terms], SCALE)
        for half in (slice(0, 64), slice(64, K))
    ]
    torch.testing.assert_close(sum(parts), rows_of(w).square_norms(terms, SCALE))
    assert rows_of(w[:, :64], "row", 2).factors.share == 0.5 and rows_of(w).factors.share == 1.0


LENGTHS = (5, 22, 1, 16)


def both(kind: str, folder) -> tuple[torch.nn.Module, Stage]:
    """Return transformers' model of a family, and our stage of it."""
    reference = save_model(folder, kind)
    architecture = read_base_model(folder)
    return reference, build_stage(architecture, folder, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gemma3_text", "granite", "qwen3_moe"])
def test_a_stage_with_dora_is_peft_s(kind, tmp_path, one_process):
    reference, stage = both(kind, tmp_path / "base")
    sizes = {path: size for linear in stage.linears for path, *size in ((p, linear.geometry.in_features, n) for p, n in outputs(linear))}
    weights = {path: (random_factor(path, "A", 0, R, k), random_factor(path, "B", 0, R, n).T) for path, (k, n) in sizes.items()}
    m = {path: 0.5 + random_factor(path, "m", 0, 1, n)[0].abs() for path, (_, n) in sizes.items()}
    modules = tuple(dict.fromkeys(path.rpartition(".")[2] for path in sizes))
    adapter = AdapterFile(r=R, lora_alpha=R / 2, use_rslora=False, target_modules=modules, weights=weights, magnitudes=m)
    write_adapter(tmp_path / "adapter", adapter, str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    microbatch = stage_input(LENGTHS, stage.architecture.vocab_size, ((0, sum(LENGTHS), 0),))
    logits = torch.cat([theirs(tokens[None]).logits[0] for tokens in microbatch.tokens.split(LENGTHS)])
    losses = torch.nn.functional.cross_entropy(logits, microbatch.labels, reduction="none")
    (losses * microbatch.weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}

    spec = AdapterSpec(r=R, scale=0.5, dropout=0.0, target_modules=frozenset((*modules, "magnitudes")))
    ranks = {"tensor_rank": 0, "tensor_ranks": 1}
    arena = Arena(stage.adapted, [spec], **ranks, dtype=torch.float32, device=torch.device("cpu"), room=dict.fromkeys(EVERY, 32))
    arena.load(0, adapter.factors)
    arena.set_norms(0, None)
    arena.move(0, {module: (8, 8) if module == "magnitudes" else rows for module, rows in arena.places[0].items()})
    for recompute in ("none", "cheap", "full"):
        stage.set_recompute(recompute)
        arena.grad.zero_()
        hidden = stage(microbatch)
        assert apart(full_logits(hidden, stage.head), logits) < 1e-5
        (stage.losses(hidden, microbatch.labels) * microbatch.weights).sum().backward()
        for factor in arena.factors[0]:
            name = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}[factor.kind]
            gradient = expected[f"base_model.model.{factor.path}.{name}"]
            ours = arena.view(factor, arena.grad)
            assert apart({"A": ours, "B": ours.T, "m": ours[0]}[factor.kind], gradient) < 1e-4, (recompute, factor.path, factor.kind)


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj", "magnitudes")


def outputs(linear):
    return zip(linear.geometry.paths, linear.geometry.out_features, strict=True)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("base_weights", ["fp8", "native"])
def test_dora_begins_as_the_lora_that_it_has(base_weights, tmp_path, one_process):
    """Its magnitudes are then the norms, and every factor is 1: not a bit of the products changes, and none of A's and B's gradients."""
    save_model(tmp_path, "mistral")
    found, cpu = [], torch.device("cpu")
    for kinds in ((), ("magnitudes",)):
        stage = build_stage(
            read_base_model(tmp_path), tmp_path, ParallelConfig(), dtype=torch.float32, device=cpu, base_weights=base_weights
        )
        spec = AdapterSpec(r=R, scale=0.5, dropout=0.0, target_modules=frozenset(("q_proj", "v_proj", "up_proj", "down_proj", *kinds)))
        arena = Arena(stage.adapted, [spec], tensor_rank=0, tensor_ranks=1, dtype=torch.float32, device=cpu)
        factors = [factor for factor in arena.factors[0] if factor.kind != "m"]
        for factor in factors:
            arena.view(factor, arena.master).copy_(random_factor(factor.path, factor.kind, 0, factor.r, factor.width))
        arena.set_norms(0, None, restart=True)
        microbatch = stage_input(LENGTHS, stage.architecture.vocab_size, ((3, sum(LENGTHS), 0),))
        hidden = stage(microbatch)
        (stage.losses(hidden, microbatch.labels) * microbatch.weights).sum().backward()
        found.append([hidden.detach(), *(arena.view(factor, arena.grad).clone() for factor in factors)])
    assert all(torch.equal(ours, lora) for lora, ours in zip(*found, strict=True)) and any(each.any() for each in found[0][1:])
