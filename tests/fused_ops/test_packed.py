"""Weights in 4 and 8 bits: bitsandbytes' numbers, parts of a whole, both directions alike, kernels and their twins; on CPU."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from fused_ops.lora.fp8 import DTYPE, Fp8Matrix, quantise_rows
from fused_ops.lora.linear import multi_lora_linear
from fused_ops.lora.nf4 import CODES, quantise_nf4
from fused_ops.lora.packed import Scratch, pack, unpack_reference


def whole_numbers(rows=40, cols=512):
    """Return a matrix in bfloat16 whose sums of absmax are exact, so that their mean has the same bits on every machine."""
    steps = torch.arange(rows * cols, dtype=torch.int64).reshape(rows, cols)
    x = ((steps * 7919 + steps**2 * 31) % 255 - 127) / 1024
    x[3, :64], x[5, 64:128] = 0.0, x[5, 64:128] / 16
    return x.to(torch.bfloat16)


ORACLE = """
import ctypes, sys
def absent(*_): raise OSError("its compiled CPU code rounds absmax by a table of 2^16 steps; its torch code is exact, as is its CUDA code")
ctypes.cdll.LoadLibrary = absent
import bitsandbytes.functional as F, torch
for x in torch.load(sys.argv[1]):
    codes, state = F.quantize_nf4(x, blocksize=64, compress_statistics=True)
    sys.stdout.buffer.write(bytes(codes.flatten().tolist()) + F.dequantize_4bit(codes, state).float().numpy().tobytes())
"""


def as_bytes(x):
    matrix = quantise_nf4(x)
    return bytes(matrix.codes.flatten().tolist()) + matrix.float().to(x.dtype).float().numpy().tobytes()


def test_numbers_are_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape, dtype in (
        ((300, 576), torch.float32), ((1000, 64), torch.float16), ((77, 1536), torch.bfloat16))]  # fmt: skip
    given.append(whole_numbers())
    torch.save(given, tmp_path / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", ORACLE, str(tmp_path / "given.pt")], capture_output=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    )
    assert done.stdout == b"".join(map(as_bytes, given)), done.stderr[-2000:]


def test_numbers_are_those_that_bitsandbytes_gave():
    """Of version 0.50.2, recorded by the oracle above."""
    assert hashlib.sha256(as_bytes(whole_numbers())).hexdigest() == "e7fa2f0bffd47a42d23aafb9d88b306fd1322b1943023ca2219461067323b8d3"


def test_parts_are_those_of_the_whole():
    matrix = quantise_nf4(whole_numbers())
    part = matrix.part(slice(7, 20), slice(128, 384))
    assert torch.equal(part.float(), matrix.float()[7:20, 128:384])
    with pytest.raises(ValueError, match="64"):
        matrix.part(slice(None), slice(32, 96))
    with pytest.raises(ValueError, match="64"):
        quantise_nf4(torch.zeros(4, 96))


def stored(kind):
    weight = torch.randn(80, 192, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.02, 0.5, 80)[:, None]
    if kind == "nf4":
        return quantise_nf4(weight)
    matrix = quantise_rows(weight)
    return matrix if kind == "fp8" else Fp8Matrix(values=matrix.values, scales=matrix.scales * torch.linspace(0.6, 1.9, 80))


KINDS = ("nf4", "fp8", "fp8, any scales")


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_of_the_stored_numbers(kind, make_problem):
    p, matrix = make_problem([30, 0, 17, 40], [4, 16, 20, 8], k=192, n=(48, 32)), stored(kind)
    scratch = Scratch()
    wide, narrow = (pack(matrix, torch.float32, in_8_bits, scratch) for in_8_bits in (False, True))
    assert torch.equal(wide.forward(), matrix.float()) and torch.equal(wide.grad_input(), matrix.float())
    assert scratch.num_bytes == 80 * 192 * 4 and wide.shape == narrow.shape == (80, 192)
    p.x, p.dy = (quantise_rows(t).float() for t in (p.x, p.dy))  # rounding them again changes nothing
    answers = {}
    for name, weight in (("exact", matrix.float()), ("wide", wide), ("narrow", narrow)):
        x = p.x.clone().requires_grad_()
        y = multi_lora_linear(x, weight, None, p.group, p.route)
        y.backward(p.dy)
        answers[name] = y.detach(), x.grad
    for ours, exact in zip(answers["wide"], answers["exact"], strict=True):
        torch.testing.assert_close(ours, exact)
    for ours, exact in zip(answers["narrow"], answers["exact"], strict=True):
        error = float((ours - exact).norm() / exact.norm())
        assert error < (1e-5 if kind == "fp8" else 0.04), error


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_multiply_the_same_numbers(kind):
    """But for the last bits of what is 2^14 times smaller than the largest: the transpose has one scale."""
    weight = pack(stored(kind), torch.bfloat16, True, Scratch())
    left = 1.0 if weight.dy_factors is None else weight.dy_factors[:, None]
    apart = (weight.forward().float() - weight.grad_input().float().T * left).abs()
    assert apart.max() <= weight.largest[0] * 2**-9 and (apart > 0).float().mean() < 0.1
    assert (weight.dy_factors is not None) == (kind == "fp8, any scales")
    assert weight.num_bytes == (80 * 192 * 9 // 16 if kind == "nf4" else 80 * 192 + 80 * 4)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_gives_the_bits_of_its_twin(kind, transposed, scaled):
    """In float32 and float16: the interpreter rounds to 8 bits in a way of its own."""
    pytest.importorskip("triton")
    from kernel_tools import interpreted

    from fused_ops.lora.triton import unpack

    matrix, factors = stored(kind), torch.linspace(0.3, 2, 80) if scaled else None
    for dtype in (torch.float32, torch.float16):
        out = torch.full((192, 80) if transposed else (80, 192), float("nan"), dtype=dtype)
        with interpreted(unpack):
            unpack.unpack(matrix, factors, out, transposed)
        assert torch.equal(out, unpack_reference(matrix, factors, dtype, transposed))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("to", ["bf16", "fp8e4nv"])
def test_the_kernel_compiles_without_spills(nf4, transposed, to):
    pytest.importorskip("triton")
    from kernel_tools import compile_for_hopper

    from fused_ops.lora.triton.unpack import SIZES, _unpack_kernel

    rows, blocks = SIZES[transposed]
    absent = {} if nf4 else {"absmax_ptr": None, "table_ptr": None}
    types = {"values_ptr": "*u8" if nf4 else "*fp8e4nv", "absmax_ptr": "*fp32", "table_ptr": "*fp32", "factors_ptr": "*fp32"}
    report = compile_for_hopper(
        _unpack_kernel,
        arguments={k: v for k, v in types.items() if k not in absent} | {"out_ptr": f"*{to}", "num_rows": "i32", "num_cols": "i32"},
        constants={"NF4": nf4, "SCALED": True, "TRANSPOSED": transposed, "ROWS": rows, "BLOCKS": blocks, **absent},
        aligned=("num_rows", "num_cols"),
    )  # fmt: skip
    assert not report.spilled_bytes and "st.global.v4.b32" in report.ptx, (report.registers, report.spilled_bytes)


def test_the_scratch_serves_one_weight_at_a_time():
    scratch = Scratch()
    scratch.reserve(100)
    scratch.reserve(64)
    first, second = (scratch.take(4, 8, dtype, torch.device("cpu")) for dtype in (torch.bfloat16, DTYPE))
    assert first.data_ptr() == second.data_ptr() and scratch.num_bytes == 100 and first.dtype == torch.bfloat16
    assert len(CODES) == 16 and list(CODES) == sorted(CODES)
