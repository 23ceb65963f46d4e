"""RMSNorm, rotary embedding and SwiGLU: kernels against their references, forward and backward, in the interpreter; compiled for sm_90."""

import pytest
import torch
from kernel_tools import compile_for_hopper, interpreted

from fused_ops.elementwise import rms_norm as rms_norm_file
from fused_ops.elementwise import rope as rope_file
from fused_ops.elementwise import swiglu as swiglu_file
from fused_ops.elementwise.rms_norm import rms_norm, rms_norm_reference
from fused_ops.elementwise.rope import rotate_qkv, rotate_qkv_reference
from fused_ops.elementwise.swiglu import swiglu, swiglu_reference
from fused_ops.lora import fp8 as fp8_file
from fused_ops.lora.fp8 import Rounded, quantise_rows
from fused_ops.lora.linear import multi_lora_linear
from fused_ops.lora.refill import Refill, wanted

EPS = 1e-5
IN_8_BITS = {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
HEADS = [  # query heads, key and value heads, head size, rotated pairs
    (1, 1, 8, 4),
    (1, 1, 8, 0),
    (9, 3, 12, 6),
    (9, 3, 12, 4),
    (7, 1, 64, 32),
    (40, 8, 128, 64),
    (24, 8, 128, 48),
]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """Fill new tensors with NaN, so that an element that a kernel leaves out is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with interpreted(rms_norm_file, rope_file, swiglu_file, fp8_file):
        yield request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table_of(rows, half, dtype):
    angles = random(rows, half, seed=9)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def compare(ours, reference, inputs, dtype):
    """Compare outputs and input gradients of two functions: `ours` in dtype, the reference in float64."""
    leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
    exact = [x.to(dtype).double().requires_grad_() for x in inputs]
    outputs, expected = ours(*leaves), reference(*exact)
    upstream = [random(*y.shape, seed=5 + i, dtype=dtype) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, [dy.double() for dy in upstream])
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    found = [*outputs, *(x.grad for x in leaves)]
    for value, truth in zip(found, [*expected, *(x.grad for x in exact)], strict=True):
        assert value.dtype == dtype and value.shape == truth.shape
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "with_residual"), [((1, 1), False), ((5, 1, 7), True), ((3, 576), False), ((2, 4100), True)])
def test_rms_norm(shape, with_residual, dtype, backend):
    weight = random(shape[-1], seed=3)
    inputs = [random(*shape, seed=i) for i in range(1 + with_residual)]
    compare(
        lambda x, r=None: rms_norm(x, weight.to(dtype), EPS, r, backend=backend),
        lambda x, r=None: rms_norm_reference(x, weight.to(dtype).double(), EPS, r),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "pairs"), HEADS)
def test_rotate_qkv(heads, kv_heads, head_dim, pairs, with_norms, dtype, backend):
    rows = 3
    table = table_of(rows, pairs, dtype)
    weights = [random(head_dim, seed=i, dtype=dtype) for i in (3, 4)]
    compare(
        lambda x: rotate_qkv(x, table, heads, kv_heads, (*weights, EPS) if with_norms else None, backend=backend),
        lambda x: rotate_qkv_reference(
            x, tuple(t.double() for t in table), heads, kv_heads, (*(w.double() for w in weights), EPS) if with_norms else None
        ),
        [random(rows, (heads + 2 * kv_heads) * head_dim)],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1, 34), (2, 4200)])
@pytest.mark.parametrize("gelu", [False, True])
def test_swiglu(shape, gelu, dtype, backend):
    compare(lambda x: (swiglu(x, backend=backend, gelu=gelu),), lambda x: (swiglu_reference(x, gelu),), [random(*shape) * 3], dtype)


def test_swiglu_needs_no_memory_for_its_gradients(backend):
    """The gradient lies over gate | up, and what a Refill wants over the output's gradient."""
    x, upstream, refill, seen = random(3, 40), random(3, 20, seed=1), Refill(), []
    gate_up, dy = x.clone().requires_grad_(), upstream.clone()
    y = swiglu(gate_up, refill, backend=backend)
    y.register_hook(lambda grad: refill.defer(lambda again: seen.append(again.clone())))
    (found,) = torch.autograd.grad(y, gate_up, dy)
    exact = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(swiglu_reference(exact), exact, upstream)
    torch.testing.assert_close(found, truth)
    assert found.data_ptr() == gate_up.data_ptr() and torch.equal(seen[0], y.detach())


@pytest.mark.parametrize("op", ["norm", "norm and residual", "swiglu"])
def test_what_is_made_again_is_what_was_made(op, backend):
    """The linear's input comes back with the same bits, after the linear's turn and before the producer's gradient leaves."""
    refill, seen = Refill(), []
    x = random(3, 1, 40).requires_grad_()
    if op == "swiglu":
        y = swiglu(x, refill, backend=backend)
    else:
        residual = random(3, 1, 40, seed=2) if "residual" in op else None
        y, _ = rms_norm(x, random(40, seed=1), EPS, residual, refill, backend=backend)
    y.register_hook(lambda grad: refill.defer(seen.append))
    assert not wanted(refill)
    y.sum().backward()
    assert torch.equal(seen[0], y.detach().flatten(0, 1)) and not wanted(refill)


@pytest.mark.parametrize("op", ["norm", "swiglu"])
def test_a_linear_computes_the_same_without_keeping_its_input(op, make_problem):
    """Same bits; with a Refill nothing is kept that is as wide as the linear's input, except what the producer keeps."""
    answers = []
    for refill in (None, Refill()):
        p = make_problem([9, 20], [4, 17], k=48, n=(24, 8), dropouts=[0.1, 0.0], gaps=2)
        source = random(len(p.x), 96 if op == "swiglu" else 48, seed=7).requires_grad_()
        kept = {}

        def note(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            x = swiglu(source, refill) if op == "swiglu" else rms_norm(source, random(48, seed=1), EPS, refill=refill)[0]
            y = multi_lora_linear(x, p.weight, None, p.group, p.route, refill=refill)
        y.backward(p.dy)
        assert sum(kept.values()) == source.nbytes + (x.nbytes if refill is None else 0)
        answers.append([y, source.grad, *p.grads])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True)) and all(g.any() for g in answers[0])


def test_a_refill_serves_one_linear():
    refill = Refill()
    refill.defer(print)
    with pytest.raises(AssertionError, match="serves a linear already"):
        refill.defer(print)


def test_a_rows_nan_stays_in_its_row(backend):
    x = random(3, 2 * 8 + 4 * 8).requires_grad_()
    poisoned = x.detach().clone()
    poisoned[1] = float("nan")
    poisoned.requires_grad_()
    others = torch.tensor([0, 2])
    weight, table = random(48), table_of(3, 4, torch.float32)
    for function in (
        lambda v: rms_norm(v, weight, EPS, backend=backend)[0],
        lambda v: torch.cat([part.flatten(1) for part in rotate_qkv(v, table, 2, 2, (weight[:8], weight[8:16], EPS), backend=backend)], 1),
        lambda v: swiglu(v, backend=backend),
    ):
        x.grad = poisoned.grad = None
        clean, dirty = function(x), function(poisoned)
        clean.sum().backward()
        dirty.sum().backward()
        assert dirty[1].isnan().any()
        assert torch.equal(clean[others], dirty[others]) and torch.equal(x.grad[others], poisoned.grad[others])


def test_an_inf_in_v_stays_itself(backend):
    qkv = random(1, 3 * 8)
    qkv[0, 20] = float("inf")
    _, _, v = rotate_qkv(qkv, table_of(1, 4, torch.float32), 1, 1, backend=backend)
    assert torch.equal(v.flatten(), qkv[0, 16:])


def test_frozen_weights_get_no_gradient(backend):
    weight = torch.nn.Parameter(random(8))
    x = random(2, 8).requires_grad_()
    rms_norm(x, weight, EPS, backend=backend)[0].sum().backward()
    assert weight.grad is None and x.grad is not None


def test_no_rows(backend):
    assert rms_norm(random(0, 8), random(8), EPS, backend=backend)[0].shape == (0, 8)
    assert swiglu(random(0, 8), backend=backend).shape == (0, 4)
    assert [x.shape[1] for x in rotate_qkv(random(0, 32), table_of(0, 4, torch.float32), 2, 1, backend=backend)] == [2, 1, 1]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="as wide as its weight"):
        rms_norm(random(2, 8), random(6), EPS)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(random(2, 8), random(8), EPS, random(1, 8))
    with pytest.raises(ValueError, match="even width"):
        swiglu(random(2, 7))
    with pytest.raises(ValueError, match="heads of an even size"):
        rotate_qkv(random(2, 30), table_of(2, 4, torch.float32), 2, 1)
    with pytest.raises(ValueError, match="cos and sin"):
        rotate_qkv(random(2, 32), table_of(1, 4, torch.float32), 2, 1)
    with pytest.raises(ValueError, match="neither 'reference' nor 'triton'"):
        swiglu(random(2, 8), backend="cuda")


@pytest.mark.parametrize("num_cols", [576, 4096, 5120, 8192])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm_compiles_without_spills(num_cols, add):
    rows, cols, warps = rms_norm_file._tile(num_cols)
    pointers = {"weight_ptr": "*bf16", "rstd_ptr": "*fp32", "y_ptr": "*bf16", "total_ptr": "*bf16", "num_rows": "i32", "num_cols": "i32"}
    tile = {"ADD": add, "ROWS": rows, "COLS": cols}
    for fp8 in (False, True):
        report = compile_for_hopper(
            rms_norm_file._forward_kernel,
            arguments={**pointers, **IN_8_BITS, "x_ptr": "*bf16", "residual_ptr": "*bf16", "eps": "fp32"},
            constants={**tile, "FP8": fp8},
            aligned=("num_cols",),
            num_warps=warps,
        )
        check(report, 1 + add, 1 + add)
    for again in (False, True):
        report = compile_for_hopper(
            rms_norm_file._backward_kernel,
            arguments={**pointers, "dy_ptr": "*bf16", "dtotal_ptr": "*bf16", "dx_ptr": "*bf16"},
            constants={**tile, "REFILL": again},
            aligned=("num_cols",),
            num_warps=warps,
        )
        check(report, 2 + add, 1 + again)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (64, 8, 80)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_rope_compiles_without_spills(heads, kv_heads, head_dim, norm, backward):
    names = ("qkv_ptr", "q_ptr", "k_ptr", "v_ptr", "dqkv_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr")
    constants = {
        "Q_HEADS": heads, "KV_HEADS": kv_heads, "HALF": head_dim // 2, "HEADS": rope_file.heads_per_program(head_dim),
        "PAIRS": head_dim // 2, "HALF_BLOCK": 1 << (head_dim // 2 - 1).bit_length(), "NORM": norm, "BACKWARD": backward,
    }  # fmt: skip
    arguments = {**dict.fromkeys(names, "*bf16"), "num_rows": "i32", "eps": "fp32"}
    check(compile_for_hopper(rope_file._rope_kernel, arguments=arguments, constants=constants), 4 + 2 * (norm and backward), 2)


@pytest.mark.parametrize("again", [None, False, True])
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_swiglu_compiles_without_spills(again, in_8_bits, gelu):
    arguments = {"x_ptr": "*bf16", "y_ptr": "*bf16", "num_cols": "i32", "num_blocks": "i32", **IN_8_BITS}
    block = swiglu_file.MOST_IN_REGISTERS if in_8_bits else swiglu_file.BLOCK
    kernel, constants = swiglu_file._forward_kernel, {"BLOCK": block, "GELU": gelu, "FP8": in_8_bits}
    if again is not None:
        kernel, constants = swiglu_file._backward_kernel, {**constants, "REFILL": again}
        arguments |= {"dy_ptr": "*bf16", "dx_ptr": "*bf16"}
    check(
        compile_for_hopper(kernel, arguments=arguments, constants=constants, aligned=("num_cols",), num_warps=16 if in_8_bits else 4),
        2 + (again is not None),
        1 + (again is not None) + (again or 0),
        spilled=64 if in_8_bits and again else 0,  # behind the last load
    )


def check(report, loads, stores, spilled=0):
    """No spills; each of `loads` and `stores` tensors is read or written 16 bytes at a time."""
    assert report.spilled_bytes <= spilled and report.registers <= 128, report.registers
    assert report.ptx.count("ld.global.v4.b32") >= loads
    assert report.ptx.count("st.global.v4.b32") >= stores


# ---- rows given in 8 bits to the linear beside ----


def same_bits(ours, rows):
    """Compare with what the linear would have made of the rows; both are interpreted, whose rounding is not a GPU's."""
    with interpreted(fp8_file):
        expected = quantise_rows(rows.flatten(0, -2), "triton")
    torch.testing.assert_close(ours.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.values.float(), expected.values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norm_rounds_what_it_writes(with_residual):
    x = random(37, 1, 200, dtype=torch.float16)
    x[3], x[5, 0, 7] = 0.0, float("inf")
    residual, rounded = random(37, 1, 200, seed=2, dtype=torch.float16) if with_residual else None, Rounded()
    with interpreted(rms_norm_file, fp8_file):
        y, _ = rms_norm(x, random(200, seed=1, dtype=torch.float16), EPS, residual, backend="triton", rounded=rounded)
    same_bits(rounded.take_x(), y)
    assert rounded.take_x() is None


@pytest.mark.parametrize("cols", [48, 4100])
def test_swiglu_rounds_its_output_and_its_gradient(cols):
    gate_up, up, down = random(19, 1, 2 * cols, dtype=torch.float16).requires_grad_(), Rounded(), Rounded()
    plain = gate_up.detach().clone().requires_grad_()
    with interpreted(swiglu_file, fp8_file):
        y = swiglu(gate_up, backend="triton", rounded_up=up, rounded_down=down)
        dy = random(19, 1, cols, seed=3, dtype=torch.float16)
        dy[4, 0, 5] = float("nan")
        y.backward(dy.clone())
        swiglu(plain, backend="triton").backward(dy.clone())
    same_bits(down.take_x(), y.detach())
    same_bits(up.take_dy(), gate_up.grad)
    torch.testing.assert_close(gate_up.grad, plain.grad, rtol=0, atol=0, equal_nan=True)


def test_a_row_that_does_not_fit_into_registers_is_rounded_by_the_linear(monkeypatch):
    monkeypatch.setattr(swiglu_file, "MOST_IN_REGISTERS", 64)
    rounded = Rounded()
    with interpreted(swiglu_file, fp8_file):
        swiglu(random(5, 2 * 65, dtype=torch.float16), backend="triton", rounded_down=rounded)
    assert rounded.take_x() is None
