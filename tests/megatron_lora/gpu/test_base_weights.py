"""A GPU stage whose frozen linears multiply in 8 bits: near the one in 16 bits, what the CPU computes, the same bits when run again.

What compares with the CPU also runs without a GPU, as the CPU against itself, so that it keeps up with what it calls.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import attach_adapters, save_model, stage_input

from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.route import make_route
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Packing, StageInput
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.stage import build_stage

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_gpu = pytest.mark.skipif(not CAPABLE, reason="needs a CUDA GPU with 8-bit tensor cores")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])

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
    group = linear.adapters
    fields = {name: getattr(group, name) for name in ("columns", "a_rows", "b_rows", "adapters", "first_feature")}
    linear.adapters = LoraGroup(
        a_RK=group.a_RK.to(device, dtype),
        b_RN=tuple(b.to(device, dtype) for b in group.b_RN),
        grad_a_RK=group.grad_a_RK.to(device),
        grad_b_RN=tuple(grad.to(device) for grad in group.grad_b_RN),
        **fields,
    )


def build(directory, base_weights, recompute, dtype, device):
    """Return a stage with two jobs' adapters and a microbatch, both on the device; runs on any rank."""
    device = torch.device(device)
    stage = build_stage(
        read_architecture(directory), directory, ParallelConfig(),
        dtype=dtype, device=device, base_weights=base_weights, recompute=recompute,
    )  # fmt: skip
    attach_adapters(stage.linears, 1, dropout=0.25)
    for linear in stage.linears:
        put(linear, dtype, device)
    return stage, moved(stage_input(LENGTHS, stage.architecture.vocab_size, SEGMENTS), device)


def forward_and_backward(stage, microbatch) -> torch.Tensor:
    """Run one forward and backward; return the losses."""
    losses = stage.losses(stage(microbatch), microbatch.labels)
    (losses * microbatch.weights).sum().backward()
    return losses.detach().cpu()


def gradients_of(linear) -> tuple[torch.Tensor, ...]:
    return linear.adapters.grad_a_RK, *linear.adapters.grad_b_RN


def one_backward(directory, base_weights, recompute, dtype, device) -> dict:
    """Return losses and all adapter gradients of one microbatch; runs on any rank."""
    stage, microbatch = build(directory, base_weights, recompute, dtype, device)
    losses = forward_and_backward(stage, microbatch)
    return {"losses": losses, "gradients": torch.cat([g.flatten() for linear in stage.linears for g in gradients_of(linear)]).cpu()}


def each_linear(directory, base_weights, given, device) -> list[dict]:
    """Return what every linear read and made in one microbatch in float32: x, y, dy, dx, its adapters' gradients, its 8-bit weight.

    Each reads what the stage before it made, or the x and dy that are `given`; runs on any rank.
    """
    stage, microbatch = build(directory, base_weights, "none", torch.float32, device)
    seen = [{} for _ in stage.linears]

    def note(into: dict, _, inputs, outputs) -> None:
        into |= {"x": inputs[0].detach(), "y": outputs[0].detach().clone()}  # SwiGLU's backward overwrites what it read
        for name, tensor in (("dx", inputs[0]), ("dy", outputs[0])):  # norms, attention and SwiGLU each feed one linear
            tensor.register_hook(partial(into.__setitem__, name))

    for linear, into in zip(stage.linears, seen, strict=True):
        linear.register_forward_hook(partial(note, into))
    if given is None:
        forward_and_backward(stage, microbatch)
    else:
        for linear, theirs in zip(stage.linears, given, strict=True):
            linear(theirs["x"].to(device).requires_grad_(), microbatch.route)[0].backward(theirs["dy"].to(device))
    for linear, into in zip(stage.linears, seen, strict=True):
        into |= {f"gradient {number}": gradient for number, gradient in enumerate(gradients_of(linear))}
        if base_weights == "fp8":
            matrices = linear.frozen.by_output, linear.frozen.by_input
            into["weight"] = torch.cat([matrix.float().flatten() for matrix in matrices])
    return [{name: tensor.cpu() for name, tensor in into.items()} for into in seen]


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@needs_gpu
def test_rounding_moves_losses_and_gradients_a_little(directory, run_on):
    ours, exact = (run_on("cuda", one_backward, directory, kind, "none", torch.bfloat16) for kind in ("fp8", "native"))
    assert 0 < distance(ours["losses"], exact["losses"]) < 0.05
    assert 0 < distance(ours["gradients"], exact["gradients"]) < 0.25


@on_each_device
def test_every_linear_rounds_as_on_the_cpu(device, directory, run_on):
    """Both sides read the same x and dy, so they multiply the same 8-bit numbers; left are the tensor core's sums.

    A product of two such numbers has 8 bits and is exact. A tensor core adds 32 of them and the sum so far at a time, aligned to the
    largest, and drops what lies more than 13 bits below it. So a sum of K = 96, the longest here, loses less than (96 + 3) / 2^13 = 1.2%
    of its largest addend, which is about as large as the sum. An addend loses nothing unless it is 2^6 times smaller than the largest,
    which about a quarter are: 0.3%, if all lost as much as they can and to one side. Rounding both operands, 2.6% rms each, moves the
    sum by 3.7%, of which the sums must not cost an eighth. Operands that are rounded in any other way cost more than half of it.
    """
    ours = run_on(device, each_linear, directory, "fp8", None)
    cpu, exact = (run_on("cpu", each_linear, directory, kind, ours) for kind in ("fp8", "native"))
    for number, (mine, theirs, unrounded) in enumerate(zip(ours, cpu, exact, strict=True)):
        assert torch.equal(mine["weight"], theirs["weight"]), number
        for name in ("y", "dx"):
            apart, rounding = distance(mine[name], theirs[name]), distance(theirs[name], unrounded[name])
            print(f"linear {number}, {name}: {apart:.2e} from the CPU's, which rounding moved by {rounding:.2e}")
            assert apart < rounding / 8 and 0.005 < rounding < 0.05, (number, name, apart, rounding)
        for name in (name for name in mine if name.startswith("gradient")):  # of x and dy as they are
            assert theirs[name].any() and distance(mine[name], theirs[name]) < 1e-5, (number, name, distance(mine[name], theirs[name]))


@on_each_device
def test_the_gpu_is_no_farther_from_the_cpu_than_two_roundings(device, directory, run_on):
    """A whole microbatch in float32, where no bound can be close, since rounding magnifies what is small.

    A number that differs by a relative d falls to the other side of a rounding with probability 11 d, and then differs by a whole step,
    1/11 on average (1/16 to 1/8): d becomes sqrt(d / 11). Sums that differ by 2^-12 thus differ by 0.5% one linear later and by 2% two
    linears later, next to the 2.6% that rounding moves every number by; twelve linears follow one another here, and as many backward.
    In the worst case the two sides have rounded independently. Each is then as far from the exact result as the other, and they are
    sqrt(2) times that apart. How exact each linear is, the test above says.
    """
    ours = run_on(device, one_backward, directory, "fp8", "none", torch.float32)
    cpu, exact = (run_on("cpu", one_backward, directory, kind, "none", torch.float32) for kind in ("fp8", "native"))
    for name in ("losses", "gradients"):
        apart, rounding = distance(ours[name], cpu[name]), distance(cpu[name], exact[name])
        print(f"{name}: {apart:.2e} from the CPU's, which rounding moved by {rounding:.2e}")
        assert apart < 2**0.5 * rounding, (name, apart, rounding)


@needs_gpu
@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_recomputation_gives_the_same_bits(recompute, directory, run_on):
    ours, exact = (run_on("cuda", one_backward, directory, "fp8", policy, torch.bfloat16) for policy in (recompute, "none"))
    assert torch.equal(ours["losses"], exact["losses"]) and torch.equal(ours["gradients"], exact["gradients"])
