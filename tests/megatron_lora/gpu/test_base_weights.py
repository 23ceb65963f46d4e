"""A GPU stage whose frozen linears multiply in 8 bits: near the one in 16 bits, what the CPU computes, the same bits when run again."""

from __future__ import annotations

import pytest
import torch
from tiny import attach_adapters, save_model, stage_input

from fused_ops.adapters import LoraGroup
from fused_ops.route import make_route
from megatron_lora.architecture import read_architecture
from megatron_lora.base_model import build_stage
from megatron_lora.config import ParallelConfig
from megatron_lora.microbatch import Packing, StageInput

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a CUDA GPU with 8-bit tensor cores")

LENGTHS = (5, 22, 1, 16)
SEGMENTS = ((2, 9, 1), (9, 40, 0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_model(path, "llama")
    return path


def moved(microbatch: StageInput, device) -> StageInput:
    packing = microbatch.packing
    return StageInput(
        tokens=microbatch.tokens.to(device),
        labels=microbatch.labels.to(device),
        weights=microbatch.weights.to(device),
        packing=Packing(
            cu_seqlens=packing.cu_seqlens.to(device),
            lengths=packing.lengths,
            positions=packing.positions.to(device),
            max_length=packing.max_length,
        ),
        route=make_route(microbatch.route.num_rows, microbatch.route.segments, microbatch.route.row_keys, device),
    )


def put(linear, dtype, device) -> None:
    """Put a linear's adapters on the device."""
    group = linear.group
    fields = {name: getattr(group, name) for name in ("columns", "a_rows", "b_rows", "slots", "first_feature")}
    linear.group = LoraGroup(
        a_RK=group.a_RK.to(device, dtype),
        b_RN=tuple(b.to(device, dtype) for b in group.b_RN),
        grad_a_RK=group.grad_a_RK.to(device),
        grad_b_RN=tuple(grad.to(device) for grad in group.grad_b_RN),
        **fields,
    )


def one_backward(directory, base_weights, recompute, dtype, device) -> dict:
    """Return losses and all adapter gradients of one microbatch; runs on any rank."""
    device = torch.device(device)
    stage = build_stage(
        read_architecture(directory), directory, ParallelConfig(),
        dtype=dtype, device=device, base_weights=base_weights, recompute=recompute,
    )  # fmt: skip
    attach_adapters(stage.linears, 1, dropout=0.25)
    for linear in stage.linears:
        put(linear, dtype, device)
    microbatch = moved(stage_input(LENGTHS, stage.architecture.vocab_size, SEGMENTS), device)
    losses = stage.losses(stage(microbatch), microbatch.labels)
    (losses * microbatch.weights).sum().backward()
    grads = [grad for linear in stage.linears for grad in (linear.group.grad_a_RK, *linear.group.grad_b_RN)]
    return {"losses": losses.detach().cpu(), "gradients": torch.cat([grad.flatten() for grad in grads]).cpu()}


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_rounding_moves_losses_and_gradients_a_little(directory, one_gpu):
    ours, exact = (one_gpu(one_backward, directory, kind, "none", torch.bfloat16, "cuda") for kind in ("fp8", "native"))
    assert 0 < distance(ours["losses"], exact["losses"]) < 0.05
    assert 0 < distance(ours["gradients"], exact["gradients"]) < 0.25


def test_the_gpu_rounds_as_the_cpu_does(directory, one_gpu, pool):
    """In float32, where nothing but a rounding that falls the other way, and the tensor core's sums, tell them apart."""
    ours = one_gpu(one_backward, directory, "fp8", "none", torch.float32, "cuda")
    cpu, native = (pool().run(one_backward, directory, kind, "none", torch.float32, "cpu")[0] for kind in ("fp8", "native"))
    for name in ("losses", "gradients"):
        assert distance(ours[name], cpu[name]) < 0.5 * distance(cpu[name], native[name]), name


@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_recomputation_gives_the_same_bits(recompute, directory, one_gpu):
    ours, exact = (one_gpu(one_backward, directory, "fp8", policy, torch.bfloat16, "cuda") for policy in (recompute, "none"))
    assert torch.equal(ours["losses"], exact["losses"]) and torch.equal(ours["gradients"], exact["gradients"])
