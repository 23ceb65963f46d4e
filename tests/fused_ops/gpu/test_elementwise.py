"""RMSNorm, rotary embedding and SwiGLU on a GPU: as accurate as plain bf16, the same bits again, refills included. Needs CUDA."""

import pytest
import torch

from fused_ops.elementwise.rms_norm import rms_norm, rms_norm_reference
from fused_ops.elementwise.rope import rotate_qkv, rotate_qkv_reference
from fused_ops.elementwise.swiglu import swiglu, swiglu_reference
from fused_ops.lora.refill import Refill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EPS = 1e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()


def norm_case(rows, hidden, with_residual, dtype=torch.bfloat16):
    weight = random(hidden, seed=9).to(dtype)
    inputs = [random(rows, hidden, seed=i) for i in range(1 + with_residual)]
    return (
        lambda x, r=None, refill=None: rms_norm(x, weight, EPS, r, refill),
        lambda x, r=None: rms_norm_reference(x, weight.to(x.dtype), EPS, r),
        inputs,
    )


def rope_case(rows, heads, kv_heads, head_dim, with_norms, pairs=None):
    angles = random(rows, head_dim // 2 if pairs is None else pairs, seed=9).float()
    table = angles.cos().bfloat16(), angles.sin().bfloat16()
    weights = random(head_dim, seed=7), random(head_dim, seed=8)

    def reference(x):
        return rotate_qkv_reference(
            x, tuple(t.to(x.dtype) for t in table), heads, kv_heads, (*(w.to(x.dtype) for w in weights), EPS) if with_norms else None
        )

    return (
        lambda x, refill=None: rotate_qkv(x, table, heads, kv_heads, (*weights, EPS) if with_norms else None),
        reference,
        [random(rows, (heads + 2 * kv_heads) * head_dim)],
    )


def swiglu_case(rows, ffn, gelu=False):
    return lambda x, refill=None: (swiglu(x, refill, gelu=gelu),), lambda x: (swiglu_reference(x, gelu),), [random(rows, 2 * ffn)]


CASES = {
    "norm": (norm_case, 1000, 4096, False),
    "norm, one token": (norm_case, 1, 4096, True),
    "norm, residual": (norm_case, 777, 5120, True),
    "norm, narrow": (norm_case, 1001, 576, True),
    "norm, odd": (norm_case, 33, 77, False),
    "norm, wide": (norm_case, 65, 16384, True),
    "norm, weight in float32": (norm_case, 777, 3840, True, torch.float32),
    "rope, three quarters": (rope_case, 333, 24, 8, 128, False, 48),
    "rope, none": (rope_case, 333, 16, 4, 128, False, 0),
    "rope, wide heads with norms": (rope_case, 77, 16, 8, 256, True),
    "gelu": (swiglu_case, 1000, 15360, True),
    "rope": (rope_case, 1000, 32, 8, 128, False),
    "rope, one token": (rope_case, 1, 9, 3, 64, False),
    "rope, odd heads": (rope_case, 333, 7, 1, 12, False),
    "rope, head norms": (rope_case, 500, 16, 8, 128, True),
    "rope, head norms, uneven": (rope_case, 77, 5, 1, 80, True),
    "swiglu": (swiglu_case, 1000, 14336),
    "swiglu, one token": (swiglu_case, 1, 1536),
    "swiglu, odd": (swiglu_case, 77, 333),
    "swiglu, more rows than a grid's second axis": (swiglu_case, 70_000, 64),
}


def run(function, inputs, **options):
    """Return outputs and input gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    torch.autograd.backward(outputs, [random(*y.shape, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)])
    return [*(y.detach() for y in outputs), *(x.grad for x in leaves)]


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_plain_bf16(name):
    make, *shape = CASES[name]
    ours, reference, inputs = make(*shape)
    found, plain, exact = run(ours, inputs), run(reference, inputs), run(reference, [x.float() for x in inputs])
    again = run(ours, inputs)
    for value, repeated, rough, truth in zip(found, again, plain, exact, strict=True):
        assert torch.equal(value, repeated) and value.dtype == torch.bfloat16
        error, allowed = value.float() - truth, rough.float() - truth
        tiny = 1e-6 * float(truth.abs().max()) + 1e-30
        assert error.pow(2).mean().sqrt() <= 2 * allowed.pow(2).mean().sqrt() + tiny
        assert error.abs().max() <= 3 * allowed.abs().max() + 2**-8 * float(truth.abs().max())


@pytest.mark.parametrize("name", ["norm", "norm, residual", "norm, odd", "swiglu", "swiglu, odd", "gelu"])
def test_what_is_made_again_has_the_same_bits(name):
    make, *shape = CASES[name]
    ours, _, inputs = make(*shape)
    refill, seen = Refill(), []
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = ours(*leaves, refill=refill)[0]
    y.register_hook(lambda grad: refill.defer(seen.append))
    y.backward(random(*y.shape, seed=20))
    assert torch.equal(seen[0], y.detach())
