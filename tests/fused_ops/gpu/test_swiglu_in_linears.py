"""SwiGLU and a residual in the epilogues of linears: what kernels give one after another, refills included. Needs Hopper."""

import pytest
import torch

from fused_ops.elementwise.swiglu import swiglu
from fused_ops.launch.shapes import suits_hopper
from fused_ops.lora import fused
from fused_ops.lora.gated import Gated
from fused_ops.lora.linear import multi_lora_linear
from fused_ops.lora.refill import Refill
from tests.fused_ops.conftest import build_problem

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not suits_hopper(torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")), reason="needs a Hopper GPU"
)
MIXES = {
    "tiles of one job": {"lengths": [2048] * 4, "ranks": [16] * 4},
    "ragged": {"lengths": [1337, 0, 311, 2500, 1], "ranks": [8, 16, 3, 64, 16], "gaps": 7},
    "dropout": {"lengths": [700, 1000, 348], "ranks": [16, 33, 128], "dropouts": [0.1, 0.0, 0.5]},
}


def both_passes(up, down, refill, with_gated):
    """Return gate | up, the output, d x and all gradients of adapters of residual + down(swiglu(up(x))), the residual being x."""
    for each in (up, down):
        each.zero_grads()
    x, gated, refill = up.x.clone().requires_grad_(), Gated() if with_gated else None, Refill() if refill else None
    gate_up = multi_lora_linear(x, up.weight, None, up.group, up.route, makes=gated)
    y = swiglu(gate_up, refill, gated=gated)
    residual = x if with_gated else None
    out = multi_lora_linear(y, down.weight, None, down.group, down.route, refill=refill, reads=gated, residual=residual)
    out = out if with_gated else x + out
    kept = [gate_up.detach().clone(), y.detach().clone(), out.detach()]
    out.backward(down.dy)
    assert gated is None or (gated.done and gated.y is None and gated.gate_up is None), "the kernels did not do SwiGLU's work"
    return [*kept, x.grad, *(grad.clone() for each in (up, down) for grad in each.grads)]


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_as_three_kernels(mix, refill, monkeypatch):
    monkeypatch.setattr(fused, "FORWARD", True)
    monkeypatch.setattr(fused, "BACKWARD", True)
    options = MIXES[mix] | {"dtype": torch.bfloat16, "device": "cuda"}
    up, down = build_problem(**options, k=1024, n=(1536, 1536)), build_problem(**options, k=1536, n=(1024,), seed=1)
    apart, together, again = (both_passes(up, down, refill, with_gated) for with_gated in (False, True, True))
    for i, (a, b, c) in enumerate(zip(apart, together, again, strict=True)):
        assert torch.equal(b, c), f"{i}: two runs differ"
        error = float((a.float() - b.float()).norm() / a.float().norm())
        assert error < (1e-3 if i < 2 else 4e-3), f"{i}: {error}"
