"""Transformer Engine's norms and attention against ours on a GPU, alone and in a stage. Needs CUDA and transformer_engine.

Where its attention fails on this GPU (its cuDNN may be too old), the tests of it are skipped, with what it said.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from gpu_stage import one_backward
from tiny import save_model

from fused_ops.launch.backend import gradients
from fused_ops.lora.refill import Refill
from megatron_lora.data.microbatch import Packing
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model import transformer_engine
from megatron_lora.model.attention import per_sample_attention
from megatron_lora.model.backends import Backends, Machine, choose, import_engine, this_machine
from megatron_lora.model.norm import RMSNorm

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs transformer_engine"),
]

LENGTHS = (70, 1, 300, 129)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    import_engine("te")


def fault_of(heads, kv_heads, head_dim, window) -> str:
    return transformer_engine.attention_fault(heads, kv_heads, head_dim, (window,), torch.bfloat16, torch.device("cuda"))


def test_the_machine_has_it():
    machine = this_machine()
    assert isinstance(machine, Machine) and machine.engine and choose("te", machine) == Backends(norms="te", attention="te")


@pytest.mark.parametrize("hidden", [576, 4096])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_refill", [False, True])
def test_norms_are_alike(hidden, with_residual, with_refill):
    config, answers = SimpleNamespace(use_cpu_initialization=False, params_dtype=torch.bfloat16), []
    for kind in (RMSNorm, transformer_engine.EngineNorm):
        generator = torch.Generator(device="cuda").manual_seed(0)
        norm = kind(config, hidden, eps=1e-5)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(hidden, generator=generator, device="cuda"))
        x, residual = (torch.randn(257, 1, hidden, generator=generator, device="cuda").bfloat16().requires_grad_() for _ in range(2))
        dy, d_total = (torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
        refill, again = Refill() if with_refill else None, []
        y, total = norm.add(x, residual if with_residual else None, refill)
        if refill is not None:
            refill.defer(again.append)
        torch.autograd.backward((y, total) if with_residual else (y,), (dy, d_total) if with_residual else (dy,))
        answers.append([y.detach(), total.detach(), x.grad, *again, *([residual.grad] if with_residual else [])])
    assert len(answers[0]) == 3 + with_residual + with_refill
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("window", [None, 50])
def test_attention_is_alike(heads, kv_heads, head_dim, window):
    fault = fault_of(heads, kv_heads, head_dim, window)
    if fault:
        pytest.skip(fault)
    generator = torch.Generator(device="cuda").manual_seed(1)
    shapes = [(sum(LENGTHS), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v, d_out = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in [*shapes, shapes[0]])
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to("cuda", torch.int32)
    packing = Packing(cu_seqlens=ends, lengths=LENGTHS, positions=ends, max_length=max(LENGTHS))
    attention = transformer_engine.make_attention(heads, kv_heads, head_dim, head_dim**-0.5)
    outs, grads = gradients(lambda *x: (transformer_engine.attend(attention, *x, packing, window),), (q, k, v), (d_out.flatten(1),))
    truth, exact = gradients(
        lambda *x: (per_sample_attention(*x, packing, head_dim**-0.5, window).flatten(1),),
        tuple(x.float() for x in (q, k, v)),
        (d_out.flatten(1).float(),),
    )
    for ours, theirs in zip((*outs, *grads), (*truth, *exact), strict=True):
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


def backward_with_engine(directory, norms, attention, recompute) -> dict:
    """Return losses and gradients of one microbatch, or what is wrong with the attention; runs on the rank."""
    import_engine("te")
    if attention == "te":
        architecture = read_architecture(directory)
        sizes = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
        fault = transformer_engine.attention_fault(*sizes, architecture.sliding_windows, torch.bfloat16, torch.device("cuda"))
        if fault:
            return {"fault": fault}
    return one_backward(directory, Backends(norms=norms, attention=attention), recompute)


@pytest.mark.parametrize("attention", ["torch", "te"])
@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_a_stage_with_its_parts_computes_the_same(attention, recompute, one_gpu, tmp_path):
    save_model(tmp_path, "qwen3")
    theirs = one_gpu(backward_with_engine, tmp_path, "te", attention, recompute)
    if "fault" in theirs:
        pytest.skip(theirs["fault"])
    ours = one_gpu(backward_with_engine, tmp_path, "ours", "torch", recompute)
    for name in ("losses", "gradients"):
        assert (theirs[name] - ours[name]).norm() <= 0.03 * ours[name].norm(), name
