"""`base_weights: fp8`: a stage whose frozen linears multiply in 8 bits, on one rank and on several, under every recomputation policy."""

from __future__ import annotations

import json

import oracle
import pytest
import runs
import torch
from tiny import attach_adapters, save_model, stage_input, train_step

from megatron_lora.config.schema import ParallelConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.stage import build_stage
from megatron_lora.planning.predict import memory_of
from scheduling.cost import DEVICES

LENGTHS = (5, 22, 1, 16)
SEGMENTS = ((2, 9, 1), (9, 40, 0))
JOB = {"name": "mine", "datasets": [{"path": "rows.jsonl", "type": "text"}]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_model(path, "llama")
    return path


def step_of(directory, base_weights, parallel, recompute="none"):
    """Train one microbatch; runs on any rank."""
    stage = build_stage(
        read_architecture(directory), directory, parallel,
        dtype=torch.float32, device=torch.device("cpu"), base_weights=base_weights, recompute=recompute,
    )  # fmt: skip
    attach_adapters(stage.linears, parallel.tensor, dropout=0.25)
    return train_step(stage, stage_input(LENGTHS, stage.architecture.vocab_size, SEGMENTS), parallel)


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def all_gradients(answer):
    return torch.cat([answer["gradients"][name].flatten() for name in sorted(answer["gradients"])])


def test_rounding_moves_losses_and_gradients_a_little(directory, one_process):
    """The model is random and narrow, where rounding errors do not average out as in a real one."""
    ours, exact = (step_of(directory, kind, ParallelConfig()) for kind in ("fp8", "native"))
    assert 0 < distance(ours["losses"], exact["losses"]) < 0.05
    assert 0 < distance(all_gradients(ours), all_gradients(exact)) < 0.25
    for name, gradient in ours["gradients"].items():
        assert gradient.any(), name


@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_recomputation_gives_the_same_bits(recompute, directory, one_process):
    ours, exact = (step_of(directory, "fp8", ParallelConfig(), policy) for policy in (recompute, "none"))
    assert torch.equal(ours["losses"], exact["losses"]) and torch.equal(all_gradients(ours), all_gradients(exact))


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}, {"tp": 2, "sequence": True}])
def test_other_layouts_round_to_the_same_model(layout, directory, pool, one_process):
    parallel = ParallelConfig(pipeline=layout.get("pp", 1), tensor=layout.get("tp", 1), sequence=layout.get("sequence", False))
    ours = pool(**layout).run(step_of, directory, "fp8", parallel)
    alone, native = (step_of(directory, kind, ParallelConfig()) for kind in ("fp8", "native"))
    losses = next(answer["losses"] for answer in ours if "losses" in answer)
    assert distance(losses, alone["losses"]) < 0.3 * distance(losses, native["losses"])
    first = {name: gradient for answer in ours for name, gradient in answer["gradients"].items()}
    assert first.keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        assert distance(first[name], gradient) < 0.1, name


def test_weights_in_16_bits_are_gone(directory, one_process):
    stage = build_stage(
        read_architecture(directory), directory, ParallelConfig(),
        dtype=torch.bfloat16, device=torch.device("cpu"), base_weights="fp8",
    )  # fmt: skip
    for linear in stage.linears:
        (num_out, num_in), kept = linear.frozen.shape, linear.frozen.num_bytes
        assert linear.weight is None and kept == 2 * num_out * num_in + 4 * (num_out + num_in)
        assert (num_out, num_in) == (sum(linear.geometry.out_features), linear.geometry.in_features)
    held = {name for name, _ in stage.named_parameters() if "linear" in name}
    assert all(name.endswith("bias") for name in held)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_memory_model_knows_the_bytes(precision, dtype, directory, tmp_path, one_process):
    path = runs.write_config(tmp_path / "config.yaml", directory, tmp_path / "run", [JOB], {}, 64)
    config = load_config(path, ["recompute=none", "base_weights=fp8", f"precision={precision}"])
    architecture = read_architecture(directory)
    (predicted,) = memory_of(config, architecture, DEVICES["cpu"])
    stage = build_stage(architecture, directory, ParallelConfig(), dtype=dtype, device=torch.device("cpu"), base_weights="fp8")
    in_8_bits = [linear.frozen for linear in stage.linears]
    values = sum(weight.num_bytes - 4 * sum(weight.shape) for weight in in_8_bits)
    others = sum(parameter.nbytes for name, parameter in stage.named_parameters() if not name.endswith("bias"))
    assert predicted.weights == values + others


def test_a_weight_that_is_not_finite_is_named(directory, one_process):
    stage = build_stage(read_architecture(directory), directory, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        stage.linears[2].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"base_weights: 'fp8': model.layers.0.mlp.gate_proj: .* not finite; use native"):
        stage.linears[2].quantise()


def test_a_whole_run_learns_as_the_one_in_full_precision(pool, tmp_path):
    rows = oracle.make_rows(tmp_path / "rows.jsonl", num_rows=12, seed=10)
    model = oracle.make_model(tmp_path / "model")
    job = {
        "name": "mine", "datasets": [{"path": str(rows), "type": "prompt_completion"}], "seed": 5,
        "r": 8, "learning_rate": 5e-3, "warmup_ratio": 0.0, "global_batch_size": 3, "max_steps": 12,
    }  # fmt: skip
    losses = {}
    for kind in ("fp8", "native"):
        config = runs.write_config(tmp_path / f"{kind}.yaml", model, tmp_path / kind, [job], {}, 256)
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"base_weights": kind}))
        assert runs.start(pool, config, {}) == 0
        losses[kind] = runs.losses_of(tmp_path / kind, "mine")
    assert losses["fp8"] != losses["native"] and losses["fp8"] == pytest.approx(losses["native"], rel=0.03)
    assert losses["fp8"][-1] < losses["fp8"][0]
