"""SwiGLU over gate and up side by side: y = silu(gate) * up, with [gate | up] one buffer [T, 2F].

    forward     y = g s u                                      s = 1 / (1 + exp(-z)), z = g
    backward    dg = dy u s (1 + g (1 - s) z')  du = dy g s    (y recomputed for the linear that read it, where a Refill wants it)

With z = sqrt(8 / pi) (g + 0.044715 g^3) the activation g s is the GELU in its tanh form: Gemma's gate.

The kernels are bound by memory. Numbers moved per row: forward 3F; backward 5F, or 6F with y. Arithmetic in float32, one rounding at the
end. Keeps its input alone. No one else may read gate and up, or dy, after this backward: it writes their gradient over gate and up, and
y over dy, so that a layer's backward needs no memory beyond what its forward kept and dy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.launch.backend import backend_name, gradients
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.launch.shapes import cdiv, power_of_2
from fused_ops.lora.fp8 import Fp8Matrix, Rounded, empty_rows, magnitude, row_scale
from fused_ops.lora.refill import Refill, wanted

BLOCK = 2048
MOST_IN_REGISTERS = 16384  # columns of a row that is also rounded to 8 bits, for which it must be there as a whole


def swiglu_reference(gate_up: Tensor, gelu: bool = False) -> Tensor:
    """Return silu(gate) * up, or gelu(gate) * up, in the dtype of [..., gate | up]: the twin that CPU runs use."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


@triton.jit
def _gate_of(b_gate, GELU: tl.constexpr):
    """Return s and z'."""
    if GELU:
        b_square = b_gate * b_gate
        b_sigmoid = tl.sigmoid(1.5957691216057308 * b_gate * (1.0 + 0.044715 * b_square))
        b_slope = 1.5957691216057308 * (1.0 + 0.134145 * b_square)
    else:
        b_sigmoid, b_slope = tl.sigmoid(b_gate), 1.0
    return b_sigmoid, b_slope


@triton.jit
def _forward_kernel(x_ptr, y_ptr, values_ptr, scales_ptr, num_cols, num_blocks, GELU: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    x_at = x_ptr + i_row * 2 * num_cols + o_col
    b_gate = tl.load(x_at, m_col, 0.0).to(tl.float32)
    b_up = tl.load(x_at + num_cols, m_col, 0.0).to(tl.float32)
    b_sigmoid, _ = _gate_of(b_gate, GELU)
    b_y = (b_gate * b_sigmoid * b_up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i_row * num_cols + o_col, b_y, m_col)
    if FP8:
        scale, inverse = row_scale(tl.max(magnitude(b_y), 0))
        tl.store(scales_ptr + i_row, scale)
        tl.store(values_ptr + i_row * num_cols + o_col, (b_y.to(tl.float32) * inverse).to(values_ptr.dtype.element_ty), m_col)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, dx_ptr, y_ptr, values_ptr, scales_ptr, num_cols, num_blocks,
    REFILL: tl.constexpr, GELU: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    o_gate, o_y = i_row * 2 * num_cols + o_col, i_row * num_cols + o_col
    b_gate = tl.load(x_ptr + o_gate, m_col, 0.0).to(tl.float32)
    b_up = tl.load(x_ptr + o_gate + num_cols, m_col, 0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + o_y, m_col, 0.0).to(tl.float32)
    b_sigmoid, b_slope = _gate_of(b_gate, GELU)
    b_silu = b_gate * b_sigmoid
    b_dgate = (b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid) * b_slope)).to(dx_ptr.dtype.element_ty)
    b_dup = (b_dy * b_silu).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + o_gate, b_dgate, m_col)
    tl.store(dx_ptr + o_gate + num_cols, b_dup, m_col)
    if REFILL:
        tl.store(y_ptr + o_y, (b_silu * b_up).to(y_ptr.dtype.element_ty), m_col)
    if FP8:
        scale, inverse = row_scale(tl.max(tl.maximum(magnitude(b_dgate), magnitude(b_dup)), 0))
        tl.store(scales_ptr + i_row, scale)
        tl.store(values_ptr + o_gate, (b_dgate.to(tl.float32) * inverse).to(values_ptr.dtype.element_ty), m_col)
        tl.store(values_ptr + o_gate + num_cols, (b_dup.to(tl.float32) * inverse).to(values_ptr.dtype.element_ty), m_col)


def swiglu(
    gate_up: Tensor,
    refill: Refill | None = None,
    backend: str | None = None,
    rounded_up: Rounded | None = None,
    rounded_down: Rounded | None = None,
    gelu: bool = False,
) -> Tensor:
    """Return silu(gate) * up, with `gelu` gelu(gate) * up, [..., F] from [..., gate | up] (contiguous, last dimension 2F; else ValueError).

    With `refill` the output is recomputed in backward for the linear that holds the same Refill. With `rounded_down` kernels also give
    the output in 8 bits to the linear that holds it, and with `rounded_up` the gradient of [gate | up] to the linear that made these.
    Backward overwrites `gate_up`.
    """
    if gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate | up {list(gate_up.shape)} with strides {gate_up.stride()} must be contiguous, of even width")
    return _SwiGLU.apply(gate_up, refill, backend_name(gate_up.device, backend), rounded_up, rounded_down, gelu)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, refill, backend, rounded_up, rounded_down, gelu):
        ctx.save_for_backward(gate_up)
        ctx.refill, ctx.backend, ctx.rounded, ctx.gelu = refill, backend, rounded_up, gelu
        return forward(gate_up, rounded_down, gelu) if backend == "triton" else swiglu_reference(gate_up, gelu)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        refilling = wanted(ctx.refill)
        gate_up, dy = gate_up.detach(), dy.contiguous()
        if ctx.backend == "triton":
            y = backward(dy, gate_up, refilling, d_gate_up=gate_up, y=dy, rounded=ctx.rounded, gelu=ctx.gelu)
        else:
            (y,), (d_gate_up,) = gradients(lambda x: (swiglu_reference(x, ctx.gelu),), (gate_up,), (dy,))
            gate_up.copy_(d_gate_up)
        if refilling:
            ctx.refill.finish(y)
        return gate_up, None, None, None, None, None


def forward(gate_up: Tensor, rounded: Rounded | None = None, gelu: bool = False) -> Tensor:
    """Launch the forward kernel; with `rounded` the output is also rounded to 8 bits."""
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    x = _rounded_rows(y, y.shape[-1], rounded)
    if rounded is not None:
        rounded.x = x
    if y.numel():
        _launch(_forward_kernel, y, x, gate_up, y, GELU=gelu)
    return y


def backward(
    dy: Tensor, gate_up: Tensor, refill: bool, d_gate_up: Tensor, y: Tensor, rounded: Rounded | None = None, gelu: bool = False
) -> Tensor:
    """Launch the backward kernel: write d[gate | up], which may lie over gate | up, and with `refill` y, which may lie over dy.

    With `rounded` d[gate | up] is also rounded to 8 bits.
    """
    rows = _rounded_rows(d_gate_up, dy.shape[-1], rounded)
    if rounded is not None:
        rounded.dy = rows
    if dy.numel():
        _launch(_backward_kernel, dy, rows, dy, gate_up, d_gate_up, y, REFILL=refill, GELU=gelu)
    return y


def _rounded_rows(written: Tensor, num_cols: int, rounded: Rounded | None) -> Fp8Matrix | None:
    """Return where a kernel rounds what it writes, None if it does not: rows of `num_cols` have to fit into a program's registers."""
    return None if rounded is None or num_cols > MOST_IN_REGISTERS else empty_rows(written)


def _launch(kernel, y: Tensor, rows: Fp8Matrix | None, *tensors: Tensor, **flags: bool) -> None:
    """Launch a program for each block of a row of y, or for a whole row where it is rounded."""
    num_cols = y.shape[-1]
    block, warps = (BLOCK, 4) if rows is None else (size := power_of_2(max(num_cols, 16)), min(16, max(4, size // 512)))
    num_blocks = cdiv(num_cols, block)
    values, scales = (None, None) if rows is None else (rows.values, rows.scales)
    grid = (y.numel() // num_cols * num_blocks,)
    kernel[grid](*tensors, values, scales, num_cols, num_blocks, **flags, FP8=rows is not None, BLOCK=block, num_warps=warps)
