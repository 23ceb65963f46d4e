"""dA beside dX: the same gradients, whichever way they are made."""

import pytest
import torch

from fused_ops import linear
from fused_ops.linear import multi_lora_linear


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_do_not_depend_on_where_they_are_made(make_problem, monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    p = make_problem([70, 300, 33], [16, 8, 16], k=64, n=(48,), dropouts=[0.1, 0.0, 0.3], dtype=dtype, device=device)

    def gradients(beside):
        monkeypatch.setattr(linear, "BESIDE", beside)
        p.zero_grads()
        x = p.x.detach().requires_grad_()
        multi_lora_linear(x, p.weight, None, p.group, p.route).backward(p.dy)
        return [x.grad, *(grad.clone() for grad in p.grads)]

    apart, beside = gradients(False), gradients(True)
    assert all(grad.any() for grad in apart)
    assert all(torch.equal(a, b) for a, b in zip(apart, beside, strict=True))
