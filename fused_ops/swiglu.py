"""SwiGLU over gate and up side by side: y = silu(gate) * up, with [gate | up] one buffer [T, 2F].

    forward     y = g s u                                      s = 1 / (1 + exp(-g))
    backward    dg = dy u s (1 + g (1 - s))     du = dy g s    (y recomputed for the linear that read it, where a Refill wants it)

The kernels are bound by memory. Numbers moved per row: forward 3F; backward 5F, or 6F with y. Arithmetic in float32, one rounding at the
end. Keeps its input alone. No one else may read gate and up, or dy, after this backward: it writes their gradient over gate and up, and
y over dy, so that a layer's backward needs no memory beyond what its forward kept and dy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.backend import backend_name, gradients
from fused_ops.optional_triton import tl, triton
from fused_ops.refill import Refill, wanted

BLOCK = 2048


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up in the dtype of [..., gate | up]: the twin that CPU runs use."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(x_ptr, y_ptr, num_cols, num_blocks, BLOCK: tl.constexpr):
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    x_at = x_ptr + i_row * 2 * num_cols + o_col
    b_gate = tl.load(x_at, m_col, 0.0).to(tl.float32)
    b_up = tl.load(x_at + num_cols, m_col, 0.0).to(tl.float32)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(y_ptr + i_row * num_cols + o_col, b_y.to(y_ptr.dtype.element_ty), m_col)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, y_ptr, num_cols, num_blocks, REFILL: tl.constexpr, BLOCK: tl.constexpr):
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    o_gate, o_y = i_row * 2 * num_cols + o_col, i_row * num_cols + o_col
    b_gate = tl.load(x_ptr + o_gate, m_col, 0.0).to(tl.float32)
    b_up = tl.load(x_ptr + o_gate + num_cols, m_col, 0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + o_y, m_col, 0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    tl.store(dx_ptr + o_gate, b_dgate.to(dx_ptr.dtype.element_ty), m_col)
    tl.store(dx_ptr + o_gate + num_cols, (b_dy * b_silu).to(dx_ptr.dtype.element_ty), m_col)
    if REFILL:
        tl.store(y_ptr + o_y, (b_silu * b_up).to(y_ptr.dtype.element_ty), m_col)


def swiglu(gate_up: Tensor, refill: Refill | None = None, backend: str | None = None) -> Tensor:
    """Return silu(gate) * up, [..., F] from [..., gate | up] (contiguous, last dimension 2F; else ValueError).

    With `refill` the output is recomputed in backward for the linear that holds the same Refill. Backward overwrites `gate_up`.
    """
    if gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate | up {list(gate_up.shape)} with strides {gate_up.stride()} must be contiguous, of even width")
    return _SwiGLU.apply(gate_up, refill, backend_name(gate_up.device, backend))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, refill, backend):
        ctx.save_for_backward(gate_up)
        ctx.refill, ctx.backend = refill, backend
        return forward(gate_up) if backend == "triton" else swiglu_reference(gate_up)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        refilling = wanted(ctx.refill)
        gate_up, dy = gate_up.detach(), dy.contiguous()
        if ctx.backend == "triton":
            y = backward(dy, gate_up, refilling, d_gate_up=gate_up, y=dy)
        else:
            (y,), (d_gate_up,) = gradients(lambda x: (swiglu_reference(x),), (gate_up,), (dy,))
            gate_up.copy_(d_gate_up)
        if refilling:
            ctx.refill.finish(y)
        return gate_up, None, None


def forward(gate_up: Tensor) -> Tensor:
    """Launch the forward kernel."""
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    num_blocks = triton.cdiv(y.shape[-1], BLOCK)
    if y.numel():
        _forward_kernel[(y.numel() // y.shape[-1] * num_blocks,)](gate_up, y, y.shape[-1], num_blocks, BLOCK=BLOCK, num_warps=4)
    return y


def backward(dy: Tensor, gate_up: Tensor, refill: bool, d_gate_up: Tensor, y: Tensor) -> Tensor:
    """Launch the backward kernel: write d[gate | up], which may lie over gate | up, and with `refill` y, which may lie over dy."""
    num_blocks = triton.cdiv(dy.shape[-1], BLOCK)
    if dy.numel():
        grid = (dy.numel() // dy.shape[-1] * num_blocks,)
        _backward_kernel[grid](dy, gate_up, d_gate_up, y, dy.shape[-1], num_blocks, REFILL=refill, BLOCK=BLOCK, num_warps=4)
    return y
