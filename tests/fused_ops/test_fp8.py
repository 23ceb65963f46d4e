"""Matrices in 8 bits and the linear over them: error bounds, both copies alike, rows apart, gradients; the reference operators, on CPU."""

import pytest
import torch

from fused_ops.lora.fp8 import Fp8Weight, quantise_rows, quantise_weight
from fused_ops.lora.linear import multi_lora_linear

MIX = {"lengths": [30, 0, 17, 40], "ranks": [4, 16, 20, 8], "k": 96, "n": (48, 32), "gaps": 3}


def matrix(rows=64, cols=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.logspace(-6, 6, rows)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_keeps_four_bits(dtype):
    x = matrix().to(dtype).float()
    x = x.clamp(-60000, 60000)
    rounded = quantise_rows(x.to(dtype)).float()
    large = x.abs() >= x.abs().amax(1, keepdim=True) * 2**-14
    assert ((rounded - x).abs() <= x.abs() / 16)[large].all()
    assert ((rounded - x).abs() <= x.abs().amax(1, keepdim=True) * 2**-17)[~large].all()


def test_scales_are_powers_of_two_that_leave_no_room():
    x = matrix()
    x[5], x[6], x[7] = 0.0, 448.0, 449.0
    q = quantise_rows(x)
    mantissa, _ = torch.frexp(q.scales)
    assert (mantissa == 0.5).all()
    largest = q.values.float().abs().amax(1)
    assert largest[5] == 0 and largest[6] == 448 and q.scales[6] == 1 and q.scales[7] == 2
    others = torch.arange(len(x)) != 5
    assert ((largest > 220) & (largest <= 448))[others].all()


def test_a_row_that_is_not_finite_is_nan_and_alone():
    x = matrix()
    clean = quantise_rows(x)
    x[3, 7], x[9, 0] = float("nan"), float("-inf")
    dirty = quantise_rows(x)
    rows = torch.ones(len(x), dtype=torch.bool)
    rows[[3, 9]] = False
    assert dirty.float()[~rows].isnan().all()
    assert torch.equal(dirty.values.float()[rows], clean.values.float()[rows]) and torch.equal(dirty.scales[rows], clean.scales[rows])


def test_both_copies_are_the_same_matrix_as_is_every_shard():
    weight = torch.randn(80, 144, generator=torch.Generator().manual_seed(1)) * 0.02
    whole = quantise_weight(weight)
    assert torch.equal(whole.by_output.float(), whole.by_input.float().T)
    shards = [quantise_weight(shard.contiguous()) for shard in weight.chunk(2, dim=1)]
    assert torch.equal(torch.cat([shard.by_output.float() for shard in shards], 1), whole.by_output.float())
    assert whole.shape == (80, 144) and whole.num_bytes == 2 * 80 * 144 + 4 * (80 + 144)


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.zeros(16, 16)
    weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        quantise_weight(weight)


def run(problem, weight):
    problem.zero_grads()
    x = problem.x.clone().requires_grad_()
    y = multi_lora_linear(x, weight, None, problem.group, problem.route)
    y.backward(problem.dy)
    return {"y": y.detach(), "dx": x.grad, **{f"grad {i}": grad.clone() for i, grad in enumerate(problem.grads)}}


@pytest.mark.parametrize("dropouts", [None, [0.1, 0.0, 0.3, 0.0]])
def test_the_linear_differs_by_its_rounding_alone(make_problem, dropouts):
    """Two roundings of at most 1/16, 2.6% rms each, in every product; what is LoRA's alone stays as it was."""
    p = make_problem(**MIX, dropouts=dropouts)
    weight = quantise_weight(p.weight)
    ours, exact = run(p, weight), run(p, p.weight)
    for name in ("y", "dx"):
        error = (ours[name] - exact[name]).norm() / exact[name].norm()
        assert 0.005 < error < 0.05, (name, error)
    for name in ours.keys() - {"y", "dx"}:
        assert torch.equal(ours[name], exact[name]), name
    rounded = p.x.clone(), p.dy.clone()
    p.x, p.dy = (quantise_rows(t).float() for t in rounded)
    base = {"group": None, "route": None}
    y = multi_lora_linear(p.x, weight, None, **base)
    torch.testing.assert_close(y, p.x @ weight.by_output.float().T)
    x = p.x.clone().requires_grad_()
    multi_lora_linear(x, weight, None, **base).backward(p.dy)
    torch.testing.assert_close(x.grad, p.dy @ weight.by_output.float())


def test_a_bias_is_added_and_shapes_are_checked(make_problem):
    p = make_problem(**MIX)
    weight, bias = quantise_weight(p.weight), torch.arange(80.0)
    plain = multi_lora_linear(p.x, weight, None, p.group, p.route)
    torch.testing.assert_close(multi_lora_linear(p.x, weight, bias, p.group, p.route), plain + bias)
    with pytest.raises(ValueError, match="does not fit W"):
        multi_lora_linear(p.x[:, :-1], weight, None, None, None)
    with pytest.raises(ValueError, match="bias"):
        multi_lora_linear(p.x, weight, bias[1:], None, None)


def test_nan_stays_with_its_job(make_problem):
    clean, p = make_problem(**MIX), make_problem(**MIX)
    first, end, _ = p.route.segments[1]
    p.x[first:end] = float("nan")
    p.dy[first] = float("inf")
    weight = quantise_weight(p.weight)
    assert isinstance(weight, Fp8Weight)
    dirty, expected = run(p, weight), run(clean, weight)
    others = torch.ones(len(p.x), dtype=torch.bool)
    others[first:end] = False
    for name in ("y", "dx"):
        assert torch.equal(dirty[name][others], expected[name][others]), name
    assert dirty["y"][first:end].isnan().all() and dirty["dx"][first].isnan().all() and dirty["dx"][first + 1].isfinite().all()
