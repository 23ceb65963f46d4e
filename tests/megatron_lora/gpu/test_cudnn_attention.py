"""cuDNN's attention on a GPU against one call per sample in float32: lengths, windows, heads, isolation, stages.

Needs CUDA and nvidia-cudnn-frontend. Its error may be twice that of torch's flash attention. Where cuDNN has no kernels for a GPU, the
tests are skipped with what it said.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_stage import one_backward
from tiny import save_model

from fused_ops.launch.backend import gradients
from megatron_lora.data.microbatch import Packing
from megatron_lora.model import cudnn_attention
from megatron_lora.model.attention import PackedRows, per_sample_attention, varlen_attention
from megatron_lora.model.backends import Backends, Machine, choose, this_machine
from megatron_lora.model.cudnn_attention import Cudnn, CudnnPlan, PlannedAttention, attention_fault

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend"),
]

LENGTHS = (70, 1, 300, 129, 128)
MANY = tuple(torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist())
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def attention():
    """Return the attention with plans of one size, compiled when they are asked for, so that tests are quick."""
    if fault := attention_fault(4, 2, 64, (None,), torch.bfloat16, DEVICE, num_rows=1024):
        pytest.skip(fault)
    return PlannedAttention(Cudnn().compile_plan, usual_samples=())


@pytest.fixture(autouse=True)
def nothing_unwritten(monkeypatch):
    """Fill what the attention allocates with NaN, so that an element that no kernel writes is seen."""

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        empty_like = staticmethod(lambda like: torch.full_like(like, float("nan")))
        empty = staticmethod(
            lambda *shape, **kind: torch.empty(*shape, **kind).fill_(255 if kind["dtype"] == torch.uint8 else float("nan"))
        )

    monkeypatch.setattr(cudnn_attention, "torch", Poisoned())


def packing_of(lengths) -> Packing:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return Packing(cu_seqlens=ends, lengths=tuple(lengths), positions=ends, max_length=max(lengths))


def random_inputs(lengths, heads, kv_heads, head_dim, dtype=torch.bfloat16, seed=0):
    """Return q, k, v and the output's gradient."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    shapes = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes)


def both_ways(attend, inputs, lengths, window):
    """Return output, dq, dk and dv."""
    *qkv, d_out = inputs
    packing = packing_of(lengths)
    rows = PackedRows(qkv_format="thd", packing=packing) if isinstance(attend, PlannedAttention) else packing
    outs, grads = gradients(lambda *x: (attend(*x, rows, inputs[0].shape[-1] ** -0.5, window),), tuple(qkv), (d_out,))
    return *outs, *grads


def check(attention, lengths, heads=4, kv_heads=2, head_dim=128, window=None, dtype=torch.bfloat16) -> None:
    inputs = random_inputs(lengths, heads, kv_heads, head_dim, dtype)
    exact = both_ways(per_sample_attention, tuple(x.float() for x in inputs), lengths, window)
    flash = both_ways(varlen_attention, inputs, lengths, window)
    ours = both_ways(attention, inputs, lengths, window)
    for name, got, twin, truth in zip(("output", "dq", "dk", "dv"), ours, flash, exact, strict=True):
        error, allowed = ((x.float() - truth).square().mean().sqrt() for x in (got, twin))
        assert error <= 2 * allowed + 1e-4, f"{name}: {error:.3g}, flash attention's {allowed:.3g}"
        assert (got.float() - truth).abs().max() <= 4 * (twin.float() - truth).abs().max() + 1e-2, name


def test_a_machine_with_the_package_takes_it():
    machine = this_machine()
    assert isinstance(machine, Machine) and machine.cudnn and choose("auto", machine) == Backends(attention="cudnn")


@pytest.mark.parametrize("window", [None, 1, 50, 512])
@pytest.mark.parametrize("lengths", [(1,), (16384,), (127,), LENGTHS, MANY, (4096, 4096), (1,) * 300, (3000, 2100, 1200, 900, 600, 392)])
def test_lengths_and_windows(lengths, window, attention):
    check(attention, lengths, window=window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (4, 4, 64, torch.bfloat16),
        (32, 8, 128, torch.bfloat16),
        (8, 2, 128, torch.float16),
        (7, 1, 96, torch.bfloat16),
        (9, 3, 80, torch.bfloat16),
        (8, 2, 192, torch.bfloat16),
        (16, 8, 256, torch.bfloat16),
    ],
)
def test_heads(heads, kv_heads, head_dim, dtype, attention):
    if fault := attention_fault(heads, kv_heads, head_dim, (None,), dtype, DEVICE, num_rows=1024):
        pytest.skip(fault)
    for window in (None, 50):
        check(attention, LENGTHS, heads, kv_heads, head_dim, window, dtype)


def apart(lengths, sick: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows are of a sample, and which are not."""
    of_sick = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE) == sick
    return of_sick, ~of_sick


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("sick", range(len(LENGTHS)))
@pytest.mark.parametrize("broken", range(4))  # q, k, v, the output's gradient
def test_a_sample_of_nan_harms_no_other(broken, sick, window, attention):
    inputs = random_inputs(LENGTHS, 4, 2, 128)
    of_sick, others = apart(LENGTHS, sick)
    healthy = both_ways(attention, inputs, LENGTHS, window)
    for poison in (float("nan"), float("inf")):
        inputs[broken][of_sick] = poison
        ill = both_ways(attention, inputs, LENGTHS, window)
        assert broken == 3 or not ill[0][of_sick].isfinite().all()
        assert torch.equal(ill[0][others], healthy[0][others])
        for name, got, truth in zip(("dq", "dk", "dv"), ill[1:], healthy[1:], strict=True):
            assert (got[others].float() - truth[others].float()).norm() <= 1e-3 * truth[others].float().norm(), name


def test_bits_of_an_output_hang_on_its_own_sample(attention):
    alone = random_inputs((129,), 4, 2, 128, seed=1)
    first = both_ways(attention, alone, (129,), None)
    for before, after in ((1, 2), (70, 1000), (333, 1)):
        lengths = (before, 129, after)
        inputs = random_inputs(lengths, 4, 2, 128, seed=2)
        for x, mine in zip(inputs, alone, strict=True):
            x[before : before + 129] = mine
        among = [x[before : before + 129] for x in both_ways(attention, inputs, lengths, None)]
        assert torch.equal(among[0], first[0])
        for got, truth in zip(among[1:], first[1:], strict=True):
            assert (got.float() - truth.float()).norm() <= 1e-3 * truth.float().norm()


def test_plans_of_all_sizes_give_the_same(attention):
    inputs, answers = random_inputs(LENGTHS, 4, 2, 128), []
    for num_samples, num_rows in ((8, 640), (64, 1024), (256, 16384)):
        sized = PlannedAttention(lambda shape, _, __, s=num_samples, r=num_rows: Cudnn().compile_plan(shape, s, r), usual_samples=())
        answers.append(both_ways(sized, inputs, LENGTHS, None))
    for answer in answers[1:]:
        assert torch.equal(answer[0], answers[0][0])
        for got, truth in zip(answer[1:], answers[0][1:], strict=True):
            assert (got.float() - truth.float()).norm() <= 1e-3 * truth.float().norm()


def test_the_deterministic_backward_repeats_its_bits(attention):
    inputs = random_inputs((500, 1, 301), 8, 2, 128)
    compiled = Cudnn()
    fixed = PlannedAttention(lambda *shape: CudnnPlan(compiled, *shape, deterministic=True), usual_samples=())
    first = both_ways(fixed, inputs, (500, 1, 301), None)
    for _ in range(5):
        assert all(map(torch.equal, both_ways(fixed, inputs, (500, 1, 301), None), first))


def test_no_call_waits_for_the_device(attention):
    inputs = random_inputs(LENGTHS, 4, 2, 128)
    both_ways(attention, inputs, LENGTHS, None)
    rows = PackedRows(qkv_format="thd", packing=packing_of(LENGTHS))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(lambda *x: (attention(*x, rows, 128**-0.5, None),), inputs[:3], inputs[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_a_stage_computes_the_same(recompute, attention, one_gpu, tmp_path):
    save_model(tmp_path, "qwen3")
    ours, torchs = (one_gpu(one_backward, tmp_path, Backends(attention=each), recompute) for each in ("cudnn", "torch"))
    for name in ("losses", "gradients"):
        assert (ours[name] - torchs[name]).norm() <= 0.03 * torchs[name].norm(), name
