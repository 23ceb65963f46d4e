"""The memory model beside torch.cuda.max_memory_allocated: within 5% at the peak of a microbatch, under every policy. Needs CUDA."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.backends import Backends, this_machine
from megatron_lora.model.stage import build_stage
from megatron_lora.planning.predict import shape_of
from megatron_lora.training.warm_up import dummy, warm_up
from scheduling.cost import OFFLOADED
from scheduling.layer_memory import Adapter
from scheduling.memory import stage_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LAYERS, VOCABULARY = 8, 32000
RANKS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A quarter of an 8B Llama, in width and in depth."""
    root = tmp_path_factory.mktemp("model")
    config = {"model_type": "mistral", "hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": LAYERS, "head_dim": 128}
    config |= {"vocab_size": VOCABULARY, "max_position_embeddings": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
    (root / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "sliding_window": None}))
    return root


def measure(directory, recompute, num_rows, dropout, attention, device) -> tuple[float, float]:
    """Return the bytes that a stage and one microbatch took at the worst moment, and those that the model says."""
    if device == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # of an earlier test on this rank; the model counts them
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    architecture, dtype = read_architecture(directory), torch.bfloat16
    kind = {"dtype": dtype, "device": torch.device(device)}
    offload = recompute == OFFLOADED
    recompute = "full" if offload else recompute
    stage = build_stage(
        architecture, None, ParallelConfig(), **kind, load_weights=False, recompute=recompute, backends=Backends(attention=attention),
        activation_offloading=offload,
    )  # fmt: skip
    specs = [AdapterSpec(r=r, scale=1.0, dropout=dropout, target_modules=frozenset(TARGET_MODULES)) for r in RANKS]
    arena = Arena(stage.linears, specs, tensor_rank=0, tensor_ranks=1, **kind)
    warm_up(stage, arena, num_rows)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    data = dummy(num_rows, len(RANKS), torch.device(device))
    (stage.losses(stage(data), data.labels) * data.weights).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    resident, policies = [Adapter(r) for r in RANKS], {"recompute": recompute, "offload": offload}
    model = stage_memory(shape_of(architecture), (LAYERS,), 0, resident, **policies, cuda=device == "cuda")
    return peak, model.total(num_rows, num_rows)


@pytest.mark.parametrize("attention", ["torch", "cudnn"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("num_rows", [4096, 16384])
@pytest.mark.parametrize("recompute", ["none", "cheap", "full", OFFLOADED, ("full",) * 3 + ("cheap",) * 3 + ("none",) * 2])
def test_the_peak(recompute, num_rows, dropout, attention, directory, one_gpu):
    if attention == "cudnn" and this_machine().cudnn is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    peak, predicted = one_gpu(measure, directory, recompute, num_rows, dropout, attention, "cuda")
    assert predicted == pytest.approx(peak, rel=0.05), f"predicted {predicted / 1e9:.3f} GB, took {peak / 1e9:.3f} GB"
