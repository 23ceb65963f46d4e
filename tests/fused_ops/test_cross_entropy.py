"""Softmax sums, residual and scatter: kernels in the interpreter and references against float64; compiled for sm_90."""

import pytest
import torch
from kernel_tools import compile_for_hopper, interpreted

from fused_ops.elementwise import cross_entropy as file
from fused_ops.elementwise.cross_entropy import scatter_scaled, softmax_residual_, softmax_sums

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Either twin, with small blocks; new tensors hold NaN, so that an element that a kernel leaves out is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(file, "BLOCK", 64)
    torch.use_deterministic_algorithms(True)
    with interpreted(file):
        yield request.param
    torch.use_deterministic_algorithms(False)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def whole(logits, labels, backend, first_token=0):
    """Return the sums and the residual of logits that hold the whole vocabulary, and leave them as they are."""
    highest, total = softmax_sums(logits, backend)
    assert highest.dtype == total.dtype == torch.float32
    return highest, total, softmax_residual_(logits.clone(), labels, highest, total, first_token, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 1), (3, 64), (5, 61), (2, 300), (4, 65)])
def test_sums_and_residual(num_rows, num_cols, dtype, backend):
    logits = random(num_rows, num_cols, dtype=dtype) * 20
    labels = torch.arange(num_rows) * 37 % num_cols
    labels[num_rows // 2 :] = -100
    labels[-1] = num_cols - 1
    highest, total, residual = whole(logits, labels, backend)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    losses.sum().backward()
    assert residual.dtype == dtype and torch.equal(highest, logits.amax(1).float())
    close(residual, exact.grad, TOLERANCE[dtype])
    found = total.log() - (logits.float().gather(1, labels.clamp(min=0)[:, None]).squeeze(1) - highest)
    close(found.where(labels >= 0, 0.0), losses, 2e-6)
    assert not residual[labels < 0].any()


def test_ranges_of_a_vocabulary_make_the_whole(backend):
    """Sums of two ranges are put together as ranks do; each range's residual is its part of the whole one."""
    logits, labels = random(6, 200) * 30, torch.tensor([0, 99, 100, 199, -100, 150])
    highest, _, residual = whole(logits, labels, backend)
    parts = [logits[:, :100].contiguous(), logits[:, 100:].contiguous()]
    sums = [softmax_sums(part, backend) for part in parts]
    assert torch.equal(torch.maximum(sums[0][0], sums[1][0]), highest)
    total = sum(own * (top - highest).exp() for top, own in sums)
    found = [softmax_residual_(part, labels, highest, total, 100 * i, backend) for i, part in enumerate(parts)]
    close(torch.cat(found, 1), residual, 1e-6)


def test_large_logits_and_infinities(backend):
    logits = random(4, 130) * 1e4
    logits[1, :64] = float("-inf")  # a whole block
    labels = torch.tensor([3, 100, 5, 6])
    _, _, residual = whole(logits, labels, backend)
    expected = logits.double().softmax(1) - torch.nn.functional.one_hot(labels, 130)
    close(residual, expected, 1e-6)
    logits[2, 7] = float("inf")
    assert whole(logits, labels, backend)[2][2].isnan().any()


@pytest.mark.parametrize("where", [slice(None), slice(70, 71), slice(0, 64)])
def test_a_rows_nan_stays_in_its_row(where, backend):
    logits, labels = random(3, 150), torch.tensor([1, 2, 3])
    poisoned = logits.clone()
    poisoned[1, where] = float("nan")
    others = torch.tensor([0, 2])
    for clean, dirty in zip(whole(logits, labels, backend)[1:], whole(poisoned, labels, backend)[1:], strict=True):
        assert torch.equal(clean[others], dirty[others]) and dirty[1].isnan().all()
    labels[1] = -100
    assert not whole(poisoned, labels, backend)[2][1].any(), "a row without a label has no gradient, whatever it holds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [None, [], [4], [0, 2, 3, 6], [5, 1]])
def test_scatter(rows, dtype, backend):
    scales = torch.tensor([0.5, 2.0, 0.0, -1.0, 3.0, 0.25, 1.0])
    listed = list(range(7)) if rows is None else rows
    grad = random(len(listed), 70, dtype=dtype)
    expected = torch.zeros(7, 70, dtype=dtype)
    for i, row in enumerate(listed):
        expected[row] = (grad[i].float() * scales[row]).to(dtype)
        if row == 2:
            grad[i] = float("nan")
    out = scatter_scaled(grad, scales, None if rows is None else torch.tensor(rows, dtype=torch.int64), backend)
    assert out.dtype == dtype and torch.equal(out, expected)


def test_no_rows(backend):
    highest, total, residual = whole(random(0, 8), torch.zeros(0, dtype=torch.int64), backend)
    assert highest.shape == total.shape == (0,) and residual.shape == (0, 8)
    assert scatter_scaled(random(0, 8), random(0), backend=backend).shape == (0, 8)


def test_what_does_not_fit_is_named():
    logits, labels = random(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one column"):
        softmax_sums(random(4, 0))
    with pytest.raises(ValueError, match="contiguous"):
        softmax_sums(logits.t())
    with pytest.raises(ValueError, match="one number for each row"):
        softmax_residual_(logits, labels[:3], *softmax_sums(logits))
    with pytest.raises(ValueError, match="does not fit its scales"):
        scatter_scaled(logits, random(6))
    with pytest.raises(ValueError, match="neither 'reference' nor 'triton'"):
        softmax_sums(logits, "cuda")


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_softmax_compiles_without_spills(dtype):
    arguments = {"logits_ptr": dtype, "highest_ptr": "*fp32", "total_ptr": "*fp32", "num_cols": "i32", "num_blocks": "i32"}
    block = {"BLOCK": file.BLOCK}
    check(compiled(file._softmax_sums_kernel, arguments, block), stores=0)
    check(compiled(file._softmax_residual_kernel, {**arguments, "label_ptr": "*i64", "first_token": "i32"}, block), stores=1)


@pytest.mark.parametrize("every_row", [False, True])
def test_scatter_compiles_without_spills(every_row):
    arguments = {"grad_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*bf16", "num_cols": "i32", "num_blocks": "i32"}
    rows = ({}, {"row_ptr": None}) if every_row else ({"row_ptr": "*i64"}, {})
    constants = {"ALL": every_row, "BLOCK": file.BLOCK, **rows[1]}
    check(compiled(file._scatter_scaled_kernel, {**arguments, **rows[0]}, constants), stores=1)


def compiled(kernel, arguments, constants):
    return compile_for_hopper(kernel, arguments=arguments, constants=constants, aligned=("num_cols",), num_warps=file.WARPS)


def check(report, stores):
    """No spills, few enough registers for all warps of a multiprocessor's half; rows are read and written 16 bytes at a time."""
    assert report.spilled_bytes == 0 and report.registers <= 64, report.registers
    assert report.ptx.count("ld.global.v4.b32") >= 1
    assert report.ptx.count("st.global.v4.b32") >= stores
