"""DoRA's magnitudes on a linear's outputs: the formula in float64, and rows of others, of which no bit changes."""

from __future__ import annotations

import pytest
import torch

from fused_ops.lora import magnitude
from fused_ops.lora.magnitude import Magnitudes, scale_outputs
from fused_ops.lora.route import make_route

SEGMENTS = ((0, 5, 0), (5, 12, 1), (13, 20, 2))  # the second adapter has no magnitudes, and row 12 no adapter
ROWS, WIDTH = 20, 6


def magnitudes(norms, m, share=1.0):
    inverse = 1 / norms
    return Magnitudes(rows=(1, -1, 0), scale_MN=m * inverse, inverse_norm_MN=inverse, grad_MN=torch.zeros_like(m), share=share)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(has_bias, share, monkeypatch):
    monkeypatch.setattr(magnitude, "BLOCK_ROWS", 3)
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(ROWS, WIDTH, generator=draw) for _ in range(2))
    bias = torch.randn(WIDTH, generator=draw) if has_bias else None
    norms, m = (torch.rand(2, WIDTH, generator=draw) + 0.5 for _ in range(2))
    x[5:13] = float("nan")
    table, given = magnitudes(norms, m, share), x.clone().requires_grad_()
    y = scale_outputs(given * 1.0, bias, table, make_route(ROWS, SEGMENTS, torch.zeros(ROWS, dtype=torch.int32), "cpu"))
    y.backward(dy.clone())
    exact_x, exact_m = x.double().requires_grad_(), m.double().requires_grad_()
    shift = torch.zeros(WIDTH).double() if bias is None else bias.double()
    expected = [exact_x[:5], exact_x[5:12], exact_x[12:13], exact_x[13:]]
    for part, row in ((0, 1), (3, 0)):
        expected[part] = (expected[part] - shift) * exact_m[row] / norms[row].double() + shift
    torch.cat(expected).backward(dy.double())
    for part, (first, end) in enumerate(((0, 5), (5, 12), (12, 13), (13, 20))):
        torch.testing.assert_close(y[first:end], expected[part].float(), equal_nan=True)
    torch.testing.assert_close(given.grad, exact_x.grad.float())
    torch.testing.assert_close(table.grad_MN, (exact_m.grad * share).float())
    assert torch.equal(given.grad[5:13], dy[5:13]), "rows of others"


def test_a_route_without_them_has_no_blocks():
    table = magnitudes(torch.ones(2, WIDTH), torch.ones(2, WIDTH))
    assert table.blocks(None) == table.blocks(make_route(4, ((0, 4, 1),), torch.zeros(4, dtype=torch.int32), "cpu")) == []
