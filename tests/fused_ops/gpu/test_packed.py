"""Stored weights on a GPU: the bits of the twins, and products as near to those of the dequantised weights as rounding allows."""

import pytest
import torch

from fused_ops.lora.fp8 import DTYPE, Fp8Matrix, quantise_rows
from fused_ops.lora.linear import multi_lora_linear
from fused_ops.lora.nf4 import quantise_nf4
from fused_ops.lora.packed import Scratch, pack, unpack_reference
from fused_ops.lora.triton.unpack import unpack

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a CUDA GPU with 8-bit tensor cores")

KINDS = ("nf4", "fp8", "fp8, any scales")


def stored(kind, rows=208, cols=576, device="cuda"):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * torch.linspace(0.02, 0.5, rows)[:, None]
    weight = weight.bfloat16().to(device)
    if kind == "nf4":
        return quantise_nf4(weight)
    matrix = quantise_rows(weight)
    return (
        matrix if kind == "fp8" else Fp8Matrix(values=matrix.values, scales=matrix.scales * torch.linspace(0.6, 1.9, rows, device=device))
    )


def moved(matrix):
    if isinstance(matrix, Fp8Matrix):
        return Fp8Matrix(values=matrix.values.cpu(), scales=matrix.scales.cpu())
    return type(matrix)(codes=matrix.codes.cpu(), absmax=matrix.absmax.cpu())


@pytest.mark.parametrize("shape", [(1, 64), (77, 192), (208, 576), (1024, 4096)])
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DTYPE])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_unpacking_gives_the_bits_of_its_twin(shape, kind, dtype, transposed, scaled):
    matrix, factors = stored(kind, *shape), torch.linspace(0.1, 1, shape[0]).cuda() if scaled else None
    out = torch.full(shape[::-1] if transposed else shape, float("nan"), device="cuda").to(dtype)
    ours = unpack(matrix, factors, out, transposed)
    theirs = unpack_reference(moved(matrix), None if factors is None else factors.cpu(), dtype, transposed)
    assert torch.equal(ours.cpu().float(), theirs.float())


def test_nf4_on_a_gpu_has_the_codes_of_the_cpu():
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = quantise_nf4(weight.cuda()), quantise_nf4(weight)
    assert torch.equal(ours.codes.cpu(), theirs.codes)
    torch.testing.assert_close(ours.absmax.cpu(), theirs.absmax, rtol=1e-6, atol=1e-7)  # their mean is summed in another order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("dropouts", [None, [0.1, 0.0, 0.3]])
def test_linears_multiply_the_stored_numbers(kind, in_8_bits, dropouts, make_problem):
    """In 16 bits within twice the error of torch's product of the dequantised weight; in 8 within that of rounding X and dY."""
    p = make_problem([300, 130, 90], [16, 8, 33], k=576, n=(128, 48, 32), dropouts=dropouts, dtype=torch.bfloat16, device="cuda")
    matrix = stored(kind)
    weight, exact = pack(matrix, torch.bfloat16, in_8_bits, Scratch()), matrix.float()
    base = exact.bfloat16()

    def run(weight, x, dy, group, route):
        x = x.clone().requires_grad_()
        y = multi_lora_linear(x, weight, None, group, route)
        y.backward(dy)
        return y.detach().float(), x.grad.float()

    ours, plain = run(weight, p.x, p.dy, None, None), run(base, p.x, p.dy, None, None)
    true = p.x.float() @ exact.T, p.dy.float() @ exact
    for mine, usual, right in zip(ours, plain, true, strict=True):
        error, bound = (mine - right).norm() / right.norm(), (usual - right).norm() / right.norm()
        assert error <= (0.05 if in_8_bits else 2 * bound + 1e-6), (float(error), float(bound))
    with_lora, usual = run(weight, p.x, p.dy, p.group, p.route), run(base, p.x, p.dy, p.group, p.route)
    for mine, right in zip(with_lora, usual, strict=True):
        assert (mine - right).norm() <= (0.05 if in_8_bits else 1e-2) * right.norm()
