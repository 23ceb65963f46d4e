"""The 8-bit kernels on a GPU: the same bits as their twins, sums as exact as the tensor core's, isolation. Needs capability >= 8.9."""

import pytest
import torch

from fused_ops.elementwise.rms_norm import rms_norm
from fused_ops.elementwise.swiglu import swiglu
from fused_ops.lora import fused, reference
from fused_ops.lora.fp8 import Rounded, quantise_rows, quantise_weight
from fused_ops.lora.linear import multi_lora_linear

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a CUDA GPU with 8-bit tensor cores")

MIXES = {
    "one token": {"lengths": [1], "ranks": [1], "k": 64, "n": (64,)},
    "many tiles": {"lengths": [1000, 1100, 948], "ranks": [16, 16, 16], "k": 256, "n": (4096,)},
    "many tiles and dropout": {"lengths": [1000, 1100, 948], "ranks": [16, 16, 16], "k": 256, "n": (2048, 2048), "dropouts": [0.1] * 3},
    "ragged": {"lengths": [100, 0, 77, 340, 5], "ranks": [16, 8, 3, 16, 12], "k": 512, "n": (384,), "gaps": 3},
    "mixed ranks": {"lengths": [130, 70, 300, 129, 64], "ranks": [1, 16, 256, 40, 128], "k": 272, "n": (208,), "gaps": 1},
    "merged": {"lengths": [150, 260, 90], "ranks": [8, 33, 16], "k": 256, "n": (192, 64, 64), "missing": {(0, 1), (1, 0), (2, 1)}},
    "merged and dropout": {"lengths": [150, 260, 90], "ranks": [8, 33, 16], "k": 256, "n": (192, 64, 64), "dropouts": [0.1, 0.3, 0.0]},
    "merged of rank 16": {"lengths": [150, 260], "ranks": [16, 16], "k": 256, "n": (512, 256, 256), "dropouts": [0.1, 0.3]},
    "odd sizes": {"lengths": [100, 40], "ranks": [8, 16], "k": 77, "n": (51, 33), "dropouts": [0.1, 0.0], "gaps": 1},
    "forty jobs": {"lengths": [7 * i % 61 for i in range(40)], "ranks": [1 + 5 * i % 64 for i in range(40)], "k": 128, "n": (144,)},
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN, so that an element that a kernel forgets, or should not read, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cols", [1, 77, 4096, 28672, 40000])
def test_rounding_gives_the_bits_of_its_twin(dtype, cols):
    x = torch.randn(70, cols, generator=torch.Generator().manual_seed(cols)) * torch.logspace(-30, 30, 70)[:, None]
    x[3], x[4], x[5, cols // 2], x[6, cols - 1] = 0.0, 449.0, float("nan"), float("-inf")
    x = x.to(dtype).cuda()
    ours, theirs = quantise_rows(x), quantise_rows(x.cpu(), "reference")
    for a, b in ((ours.values.float(), theirs.values.float()), (ours.scales, theirs.scales)):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cols", [77, 4096, 14336])
def test_neighbours_round_to_the_bits_of_the_linear(cols):
    generator = torch.Generator("cuda").manual_seed(cols)
    x, weight = (torch.randn(*shape, cols, generator=generator, device="cuda").bfloat16() for shape in ((70, 1), ()))
    x[3], x[4, 0, 7], x[5, 0, 1] = 0.0, float("inf"), float("nan")
    norm, up, down = Rounded(), Rounded(), Rounded()
    y, _ = rms_norm(x, weight, 1e-5, rounded=norm)
    gate_up = torch.randn(70, 1, 2 * cols, generator=generator, device="cuda").bfloat16().requires_grad_()
    z = swiglu(gate_up, rounded_up=up, rounded_down=down)
    z.backward(x)
    for rounded, rows in ((norm.take_x(), y), (down.take_x(), z), (up.take_dy(), gate_up.grad)):
        expected = quantise_rows(rows.detach().squeeze(1))
        for a, b in ((rounded.values.float(), expected.values.float()), (rounded.scales, expected.scales)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mix", MIXES)
def test_sums_are_as_exact_as_a_tensor_cores(make_problem, mix):
    """Both sides multiply the same 8-bit numbers; left are the output's 8 bits and the accumulator's 14."""
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    weight = quantise_weight(p.weight)
    ours = p.steps(fused, weight)
    for name, truth in p.steps(reference, weight).items():
        error = ours[name].float() - truth.float()
        assert error.isfinite().all(), name
        assert error.norm() <= 8e-3 * truth.float().norm() + 1e-30, (name, float(error.norm() / truth.float().norm()))
        assert error.abs().max() <= 0.04 * truth.float().abs().max() + 1e-30, name


def test_long_sums_cost_less_than_the_rounding(make_problem):
    p = make_problem([300, 212], [16, 8], k=14336, n=(512,), dtype=torch.bfloat16, device="cuda")
    weight = quantise_weight(p.weight)
    ours, truth = (p.steps(ops, weight)["y"].float() for ops in (fused, reference))
    rounded = p.steps(reference, p.weight)["y"].float()
    sums, rounding = ((a - b).norm() / b.norm() for a, b in ((ours, truth), (truth, rounded)))
    print(f"sums of 14336 products: {sums:.2e} relative, rounding of the operands: {rounding:.2e}")
    assert sums < rounding / 2


@pytest.mark.parametrize("mix", ["ragged", "merged and dropout", "forty jobs"])
def test_repetition_gives_the_same_bits(make_problem, mix):
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    weight = quantise_weight(p.weight)
    first = p.steps(fused, weight)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), p.steps(fused, weight).values(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_job(make_problem, value):
    mix = {"lengths": [60, 50, 90], "ranks": [4, 20, 16], "k": 128, "n": (192, 64), "dropouts": [0.1, 0.2, 0.1], "gaps": 1}
    clean, p = (make_problem(**mix, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = quantise_weight(p.weight)
    first, end, _ = p.route.segments[1]
    p.x[first:end, 3], p.dy[first:end, 5] = value, value
    got, expected = p.steps(fused, weight), clean.steps(fused, weight)
    others = torch.ones(p.route.num_rows, dtype=torch.bool, device="cuda")
    others[first:end] = False
    for name in ("y", "dx"):
        assert got[name][first:end].isnan().all(), name
        assert torch.equal(got[name][others], expected[name][others]), name


def test_the_autograd_function_takes_the_kernels_under_a_cuda_graph(make_problem):
    p = make_problem(**MIXES["merged and dropout"], dtype=torch.bfloat16, device="cuda")
    weight = quantise_weight(p.weight)
    expected = p.steps(fused, weight)
    p.zero_grads()
    x = p.x.clone().requires_grad_()
    y = multi_lora_linear(x, weight, None, p.group, p.route)
    y.backward(p.dy)
    assert all(torch.equal(a, b) for a, b in zip((y, x.grad, *p.grads), expected.values(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.steps(fused, weight)
    graph.replay()
    assert all(torch.equal(captured[name], value) for name, value in expected.items())
