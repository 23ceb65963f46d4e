"""The same bits again on a GPU: attention's backward, a stage under every way to keep its inputs, whole runs of three jobs.

Without `deterministic` attention's dQ differs from one backward to the next at these lengths. What runs on a rank takes the device, so
that it keeps up with what it calls where there is no GPU.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import runs
import torch
from safetensors.torch import load_file

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Packing
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.attention import can_varlen, per_sample_attention, varlen_attention
from megatron_lora.model.stage import build_stage
from megatron_lora.training.determinism import determinism
from megatron_lora.training.warm_up import dummy
from scheduling.cost import OFFLOADED

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
RANKS, DROPOUTS = (8, 16, 64), (0.1, 0.0, 0.05)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Four layers of a small model with long positions."""
    root = tmp_path_factory.mktemp("model")
    config = {"model_type": "mistral", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "head_dim": 128}
    config |= {"vocab_size": 4096, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_key_value_heads": 2}
    (root / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "sliding_window": None}))
    return root


def attention_gradients(repeats: int, device: str) -> bool:
    """Return whether q, k and v get the same gradients in every one of `repeats` backwards."""
    lengths = (4096, 3000, 1000, 96) if device == "cuda" else (40, 1, 23)
    generator = torch.Generator(device=device).manual_seed(0)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    packing = Packing(cu_seqlens=ends, lengths=lengths, positions=ends, max_length=max(lengths))
    q, k, v, d_out = (
        torch.randn(sum(lengths), heads, 128, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (32, 8, 8, 32)
    )
    attend = varlen_attention if can_varlen(q) else per_sample_attention
    with determinism(True):
        out = attend(q, k, v, packing, 128**-0.5, None)
        first = torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
        again = (torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True) for _ in range(repeats - 1))
        return all(torch.equal(ours, theirs) for grads in again for ours, theirs in zip(grads, first, strict=True))


def differing_stage_gradients(directory, repeats: int, device: str) -> list[str]:
    """Return the ways to keep a layer's input under which a full microbatch's gradients differed from the first, one for each time."""
    rows, kind = (8192 if device == "cuda" else 96), {"dtype": torch.bfloat16, "device": torch.device(device)}
    first, differing = None, []
    with determinism(True):
        stage = build_stage(read_architecture(directory), None, ParallelConfig(), **kind, load_weights=False)
        specs = [
            AdapterSpec(r=r, scale=1.0, dropout=p, target_modules=frozenset(TARGET_MODULES)) for r, p in zip(RANKS, DROPOUTS, strict=True)
        ]
        arena = Arena(stage.linears, specs, tensor_rank=0, tensor_ranks=1, **kind)
        generator = torch.Generator(device=device).manual_seed(1)
        arena.compute.copy_(torch.randn(arena.compute.shape, generator=generator, device=device) * 0.02)
        for recompute in ("none", "full", OFFLOADED):
            stage.set_recompute("full" if recompute == OFFLOADED else recompute, offload=recompute == OFFLOADED)
            stage.reserve_host_memory(rows)
            data = dummy(rows, len(RANKS), torch.device(device))
            data.tokens.copy_(torch.arange(rows) * 7 % 4096)
            for _ in range(repeats):
                arena.grad.zero_()
                (stage.losses(stage(data), data.labels) * data.weights).sum().backward()
                first = arena.grad.clone() if first is None else first
                differing += [] if torch.equal(arena.grad, first) else [recompute]
    assert first is not None and bool(first.isfinite().all()) and bool(first.any())
    return differing


@on_each_device
def test_attentions_backward_repeats_its_bits(device, run_on):
    assert run_on(device, attention_gradients, 200 if device == "cuda" else 2)


@on_each_device
def test_a_stage_has_the_same_bits_however_often_it_runs_and_wherever_inputs_wait(device, directory, run_on):
    assert run_on(device, differing_stage_gradients, directory, 8 if device == "cuda" else 1) == []


@needs_gpu
def test_two_runs_of_three_jobs_have_the_same_bits(directory, one_gpu, tmp_path):
    longest = 3000
    jobs = []
    for number, (r, dropout) in enumerate(zip(RANKS, DROPOUTS, strict=True)):
        file = tmp_path / f"job-{number}.jsonl"
        lengths = [longest // (1 + (number + row) % 3) for row in range(12)]
        file.write_text("".join(json.dumps({"tokens": tokens, "targets": tokens // 2}) + "\n" for tokens in lengths))
        data = {"datasets": [{"path": str(file), "type": "lengths"}], "global_batch_size": 3, "max_steps": 10, "sequence_len": longest}
        jobs.append({"name": f"job-{number}", "seed": number, "r": r, "lora_dropout": dropout, "learning_rate": 1e-3} | data)
    keys = {"precision": "bf16", "deterministic": True, "load_weights": False}
    results = []
    for name in ("first", "second"):
        path = runs.write_config(tmp_path / f"{name}.yaml", directory, tmp_path / name, jobs, {}, 2 * longest)
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        assert runs.start(lambda: SimpleNamespace(run=lambda fn, *args: [one_gpu(fn, *args)]), path, {}) == 0
        names = [job["name"] for job in jobs]
        adapters = [load_file(tmp_path / name / "jobs" / job / "adapter_model.safetensors") for job in names]
        results.append(([runs.losses_of(tmp_path / name, job) for job in names], adapters))
    (losses, adapters), (same_losses, same_adapters) = results
    assert losses == same_losses and all(len(each) == 10 for each in losses)
    for ours, theirs in zip(adapters, same_adapters, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
