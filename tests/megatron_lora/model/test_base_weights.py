"""`base_weights: fp8`: a stage whose frozen linears multiply in 8 bits, on one rank and on several, under every recomputation policy."""

from __future__ import annotations

import json
import shutil

import oracle
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from tiny import attach_adapters, save_model, stage_input, train_step

from fused_ops.lora.fp8 import quantise_rows
from fused_ops.lora.nf4 import quantise_nf4
from megatron_lora.config.schema import ParallelConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.stage import build_stage
from megatron_lora.planning.predict import cost_of, memory_of
from scheduling.cost import DEVICES

LENGTHS = (5, 22, 1, 16)
SEGMENTS = ((2, 9, 1), (9, 40, 0))
JOB = {"name": "mine", "datasets": [{"path": "rows.jsonl", "type": "text"}]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_model(path, "llama")
    return path


def step_of(directory, base_weights, parallel, recompute="none", segments=SEGMENTS):
    """Train one microbatch; runs on any rank."""
    stage = build_stage(
        read_architecture(directory), directory, parallel,
        dtype=torch.float32, device=torch.device("cpu"), base_weights=base_weights, recompute=recompute,
    )  # fmt: skip
    attach_adapters(stage.linears, parallel.tensor, dropout=0.25)
    return train_step(stage, stage_input(LENGTHS, stage.architecture.vocab_size, segments), parallel)


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


@pytest.mark.parametrize("kind", ["fp8", "fp8/bf16", "nf4/bf16"])
def test_a_weight_that_is_not_finite_is_named(kind, wide, tmp_path, one_process):
    spoilt = with_weights(wide, tmp_path, lambda w: w.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(UserError, match=r"base_model: the tensor model.layers.0.self_attn.q_proj.weight holds NaN or infinite"):
        step_of(spoilt, kind, ParallelConfig())


# ---- one copy, unpacked for each product ----


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a model that two tensor ranks can cut into blocks of 64 inputs."""
    path = tmp_path_factory.mktemp("wide")
    save_model(path, "llama", more={"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}.items())
    return path


def with_weights(directory, path, change):
    """Return a copy of a model with other weights in its linears."""
    shutil.copytree(directory, path / "copy")
    tensors = load_file(path / "copy" / "model.safetensors")
    changed = {name: change(w) if "_proj.weight" in name else w for name, w in tensors.items()}
    save_file(changed, path / "copy" / "model.safetensors", metadata={"format": "pt"})
    return path / "copy"


@pytest.fixture(scope="module")
def dequantised(wide, tmp_path_factory):
    """Return storage -> the model with the weights that are stored so, in float32."""
    quantise = {"nf4": quantise_nf4, "fp8": quantise_rows}
    return {name: with_weights(wide, tmp_path_factory.mktemp(name), lambda w, q=q: q(w).float()) for name, q in quantise.items()}


def same(ours, theirs, bound):
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name in ("losses", "logits"):
        assert distance(ours[name], theirs[name]) <= bound, name
    assert distance(all_gradients(ours), all_gradients(theirs)) <= bound


@pytest.mark.parametrize("storage", ["nf4", "fp8"])
def test_losses_and_gradients_are_those_of_the_dequantised_weights(storage, wide, dequantised, one_process):
    """In float32 the same; multiplied in 8 bits, the same as two copies of these weights in 8 bits but for the transpose's last digits."""
    native = step_of(wide, "native", ParallelConfig())
    exact, rounded = (step_of(dequantised[storage], kind, ParallelConfig()) for kind in ("native", "fp8"))
    ours = {compute: step_of(wide, f"{storage}/{compute}", ParallelConfig()) for compute in ("bf16", "fp8")}
    same(ours["bf16"], exact, 1e-6)
    same(ours["fp8"], rounded, 0.05 * distance(rounded["logits"], exact["logits"]))
    assert distance(exact["logits"], native["logits"]) > 1e-3


@pytest.mark.parametrize("kind", ["fp8/bf16", "fp8/fp8", "nf4/bf16", "nf4/fp8"])
def test_tensor_ranks_hold_slices_of_the_whole(kind, wide, pool, one_process):
    """Multiplied in 8 bits they round their slices of the activations and of the transpose by scales of their own."""
    parallel = ParallelConfig(tensor=2)
    answers = pool(tp=2).run(step_of, wide, kind, parallel)
    same(answers[0], step_of(wide, kind, ParallelConfig()), 1e-5 if kind.endswith("bf16") else 1e-2)


@pytest.mark.parametrize("kind", ["fp8", "fp8/bf16", "fp8/fp8", "nf4/bf16", "nf4/fp8"])
def test_a_job_alone_gets_the_gradients_that_it_gets_among_others(kind, wide, one_process):
    both = ((0, 5, 1), (5, 44, 0))  # whole samples
    alone, among = (step_of(wide, kind, ParallelConfig(), segments=segments) for segments in (both[1:], both))
    assert distance(alone["losses"][5:], among["losses"][5:]) < 1e-5
    own = [name for name in among["gradients"] if name.endswith(" 0")]
    assert len(own) > 20 and all(distance(alone["gradients"][name], among["gradients"][name]) < 1e-5 for name in own)


def test_blocks_have_to_fit(directory, one_process):
    with pytest.raises(UserError, match=r"base_weights: 'nf4/bf16': a rank's linears with 32 inputs are not made of blocks of 64"):
        step_of(directory, "nf4/bf16", ParallelConfig())


def test_the_cost_model_knows_the_storage(wide, tmp_path):
    """Unpacking takes its bytes' time, once a pass; 8 bits are multiplied faster, and as they are stored in a forward."""
    path = runs.write_config(tmp_path / "config.yaml", wide, tmp_path / "run", [JOB], {}, 64)
    architecture, costs = read_architecture(wide), {}
    for kind in ("native", "fp8", "fp8/fp8", "nf4/bf16", "nf4/fp8"):
        config = load_config(path, ["recompute=none", f"base_weights={kind}", "precision=bf16", "parallel.layers_per_stage=[2]"])
        costs[kind] = cost_of(config, architecture, DEVICES["h100"]).stages[0]
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 128)
    added = {kind: [(one.fixed - costs["native"].forward.fixed) * 3e12 / weights for one in (cost.forward, cost.backward)]
             for kind, cost in costs.items()}  # fmt: skip
    for kind, bytes_moved in {"fp8": (0, 0), "fp8/fp8": (0, 2), "nf4/bf16": (2.5625, 2.5625), "nf4/fp8": (1.5625, 1.5625)}.items():
        assert added[kind] == pytest.approx(bytes_moved, abs=1e-6), kind
    assert costs["fp8"].forward.per_token == costs["nf4/fp8"].forward.per_token < costs["native"].forward.per_token
    assert costs["nf4/bf16"].forward.per_token == costs["native"].forward.per_token


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["fp8/bf16", "fp8/fp8", "nf4/bf16", "nf4/fp8"])
def test_the_memory_model_knows_the_storage(kind, precision, wide, tmp_path, one_process):
    path = runs.write_config(tmp_path / "config.yaml", wide, tmp_path / "run", [JOB], {}, 64)
    config = load_config(path, ["recompute=none", f"base_weights={kind}", f"precision={precision}"])
    (predicted,) = memory_of(config, read_architecture(wide), DEVICES["cpu"])
    stage = build_stage(
        read_architecture(wide), wide, ParallelConfig(), dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]),
        device=torch.device("cpu"), base_weights=kind,
    )  # fmt: skip
    frozen = [linear.frozen for linear in stage.linears]
    small = sum(4 * weight.shape[0] * kind.startswith("fp8") for weight in frozen)
    others = sum(parameter.nbytes for name, parameter in stage.named_parameters() if not name.endswith("bias"))
    assert predicted.weights == sum(weight.num_bytes for weight in frozen) - small + others + frozen[0].scratch.num_bytes


def test_a_whole_run_learns_and_saves_as_the_one_in_full_precision(pool, tmp_path):
    rows = oracle.make_rows(tmp_path / "rows.jsonl", num_rows=12, seed=10)
    model = oracle.make_model(tmp_path / "model")
    job = {
        "name": "mine", "datasets": [{"path": str(rows), "type": "prompt_completion"}], "seed": 5,
        "r": 8, "learning_rate": 5e-3, "warmup_ratio": 0.0, "global_batch_size": 3, "max_steps": 12,
    }  # fmt: skip
    losses, saved = {}, {}
    for kind in ("fp8", "native"):
        config = runs.write_config(tmp_path / f"{kind}.yaml", model, tmp_path / kind, [job], {}, 256)
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"base_weights": kind}))
        assert runs.start(pool, config, {}) == 0
        losses[kind] = runs.losses_of(tmp_path / kind, "mine")
        adapter = tmp_path / kind / "jobs" / "mine"
        tensors = load_file(adapter / "adapter_model.safetensors").items()
        saved[kind] = [(name, t.shape, t.dtype) for name, t in tensors], (adapter / "adapter_config.json").read_text()
    assert saved["fp8"] == saved["native"] and len(saved["fp8"][0]) > 20
    assert losses["fp8"] != losses["native"] and losses["fp8"] == pytest.approx(losses["native"], rel=0.03)
    assert losses["fp8"][-1] < losses["fp8"][0]
