"""Cross-entropy on a GPU: as accurate as plain bf16, the same bits again, rows apart, no wait for the device. Needs CUDA."""

import pytest
import torch
import torch.nn.functional as F

from fused_ops.elementwise.cross_entropy import scatter_scaled, softmax_residual_, softmax_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = {  # rows, hidden, vocabulary
    "one row": (1, 64, 1000),
    "8B": (300, 4096, 128256),
    "not a multiple of a block": (257, 128, 4097),
    "odd": (77, 96, 49153),
    "small vocabulary": (513, 64, 61),
}


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).cuda().bfloat16()


def problem(rows, hidden, vocabulary):
    x, weight = random(rows, hidden), random(vocabulary, hidden, seed=1, scale=4 / hidden**0.5)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).cuda()
    labels[::7] = -100
    labels[0] = vocabulary - 1
    scales = torch.rand(rows, generator=torch.Generator().manual_seed(3)).cuda() + 0.1
    return x, weight, labels, scales


def ours(x, weight, labels, scales):
    """Return losses and dX of a chunk."""
    logits = x @ weight.t()
    highest, total = softmax_sums(logits)
    target = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).float() - highest
    losses = torch.where(labels >= 0, total.log() - target, 0.0)
    return losses, scatter_scaled(softmax_residual_(logits, labels, highest, total) @ weight, scales)


def torchs(x, weight, labels, scales):
    leaf = x.detach().clone().requires_grad_()
    losses = F.cross_entropy((leaf @ weight.t()).float(), labels, reduction="none")
    losses.backward(scales)
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_bf16(name):
    x, weight, labels, scales = problem(*SHAPES[name])
    found, again = ours(x, weight, labels, scales), ours(x, weight, labels, scales)
    plain, exact = torchs(x, weight, labels, scales), torchs(x.float(), weight.float(), labels, scales)
    for value, repeated, rough, truth in zip(found, again, plain, exact, strict=True):
        assert torch.equal(value, repeated) and value.dtype == rough.dtype
        error, allowed = value.float() - truth, rough.float() - truth
        tiny = 1e-6 * float(truth.abs().max()) + 1e-30
        assert error.pow(2).mean().sqrt() <= 2 * allowed.pow(2).mean().sqrt() + tiny
        assert error.abs().max() <= 3 * allowed.abs().max() + 2**-8 * float(truth.abs().max())
    assert not found[0][labels < 0].any() and not found[1][labels < 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_twins_agree(dtype):
    logits = random(333, 50000, scale=5.0).to(dtype)
    _, _, labels, _ = problem(333, 8, 50000)
    highest, total = softmax_sums(logits)
    expected = softmax_sums(logits, "reference")
    assert torch.equal(highest, expected[0])
    torch.testing.assert_close(total, expected[1], rtol=1e-5, atol=0)
    residual = softmax_residual_(logits.clone(), labels - 100, highest, total, 37)  # labels before the range, in it, and none
    twin = softmax_residual_(logits.clone(), labels - 100, highest, total, 37, "reference")
    torch.testing.assert_close(residual, twin, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-9)


def test_a_rows_nan_stays_in_its_row():
    x, weight, labels, scales = problem(300, 256, 32000)
    poisoned, others = x.clone(), torch.arange(300, device="cuda") != 10
    poisoned[10] = float("nan")
    labels[10] = 5
    for clean, dirty in zip(ours(x, weight, labels, scales), ours(poisoned, weight, labels, scales), strict=True):
        assert torch.equal(clean[others], dirty[others]) and dirty[10].isnan().all()
    scales[10] = 0.0
    assert not ours(poisoned, weight, labels, scales)[1][10].any()


def test_rows_go_to_their_places():
    grad, scales = random(1000, 4096), torch.rand(5000, device="cuda")
    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:1000].sort().values.cuda()
    assert torch.equal(scatter_scaled(grad, scales, rows), scatter_scaled(grad, scales, rows, "reference"))


def test_offsets_beyond_31_bits():
    """2.2e9 logits: the last row's sums and residual are right."""
    logits = torch.zeros(17000, 128256, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((17000,), 7, device="cuda")
    highest, total = softmax_sums(logits)
    assert not highest.any() and bool((total == 128256).all())
    softmax_residual_(logits, labels, highest, total)
    assert bool((logits[:, 7] < -0.99).all()) and float(logits[-1].float().sum().abs()) < 0.01


def test_nothing_waits_for_the_device():
    arguments = problem(300, 64, 5000)
    rows = torch.arange(0, 600, 2, device="cuda")
    ours(*arguments)
    scatter_scaled(arguments[0], torch.ones(600, device="cuda"), rows)
    torch.cuda.synchronize()
    scales = torch.ones(600, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*arguments)
        scatter_scaled(arguments[0], scales, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
