"""What adapters of pissa and olora start from: the best approximation, with a sign of its own; and files that are not what was written."""

import pytest
import torch

from megatron_lora.training.first_factors import cut

SHAPES = [(48, 32), (20, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_16", "olora"])
def test_a_start_is_what_peft_cuts_out(how, shape):
    """peft's own start is compared in test_adapter_kinds.py; here the products, of a weight whose spectrum falls."""
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    weight = u @ torch.diag(s * 0.7 ** torch.arange(len(s))) @ vh
    a, b = cut(weight, 5, how, 1.5, torch.Generator().manual_seed(1))
    assert a.shape == (5, shape[1]) and b.shape == (shape[0], 5)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
    q, upper = torch.linalg.qr(weight)
    expected = q[:, :5] @ upper[:5] if how == "olora" else best / 1.5
    torch.testing.assert_close(b @ a, expected, atol=1e-4, rtol=1e-4)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all(), "the sign is not fixed"
    flipped = cut(-weight, 5, how, 1.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(flipped[0], a, atol=1e-4, rtol=1e-3)
    if how != "olora":
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-5, rtol=1e-4)
