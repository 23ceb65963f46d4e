"""RMSNorm with the residual around it: one pass forward, one pass backward.

    forward     t = x (+ residual)      rstd = 1 / sqrt(mean(t^2) + eps)      y = t rstd w
    backward    g = dy w                dt = rstd (g - t rstd mean(g t rstd)) (+ dt')      (y recomputed where a Refill wants it)

`rms_norm` returns y and t. The residual stream continues with t, so that the gradient dt' of t comes back here and is added in the same
pass instead of in one of its own. With a residual, x and residual have the same gradient dt. The weight w is frozen: no dw.

Numbers moved per row of H: forward 2H, with residual 4H; backward 3H, with dt' 4H, with y one H more. Statistics and arithmetic in
float32; t is rounded to its dtype before it is normalised, since backward reads the rounded t. Keeps t (alive anyway) and rstd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.launch.backend import backend_name, gradients
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.launch.shapes import cdiv, power_of_2
from fused_ops.lora.fp8 import Rounded, empty_rows, magnitude, row_scale
from fused_ops.lora.refill import Refill, wanted

MAX_COLUMNS = 32768


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (y, t) in the dtype of x: the twin that CPU runs use."""
    total = x if residual is None else x + residual
    return normed(total, weight, eps), total


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of x in its dtype; beside x in 16 bits the weight may be in float32."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, values_ptr, scales_ptr, num_rows, num_cols, eps,
    ADD: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    o_row, o_col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    m_row, m_col = o_row < num_rows, o_col < num_cols
    m = m_row[:, None] & m_col[None, :]
    o = o_row.to(tl.int64)[:, None] * num_cols + o_col[None, :]
    b_x = tl.load(x_ptr + o, m, 0.0).to(tl.float32)  # [ROWS, COLS]
    if ADD:
        b_x += tl.load(residual_ptr + o, m, 0.0).to(tl.float32)
        b_total = b_x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + o, b_total, m)
        b_x = b_total.to(tl.float32)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) / num_cols + eps)  # [ROWS]
    tl.store(rstd_ptr + o_row, b_rstd, m_row)
    b_weight = tl.load(weight_ptr + o_col, m_col, 0.0).to(tl.float32)
    b_y = (b_x * b_rstd[:, None] * b_weight[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + o, b_y, m)
    if FP8:
        b_scale, b_inverse = row_scale(tl.max(magnitude(b_y), 1))
        tl.store(scales_ptr + o_row, b_scale, m_row)
        tl.store(values_ptr + o, (b_y.to(tl.float32) * b_inverse[:, None]).to(values_ptr.dtype.element_ty), m)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr, dtotal_ptr, total_ptr, weight_ptr, rstd_ptr, dx_ptr, y_ptr, num_rows, num_cols,
    ADD: tl.constexpr, REFILL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    o_row, o_col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    m_row, m_col = o_row < num_rows, o_col < num_cols
    m = m_row[:, None] & m_col[None, :]
    o = o_row.to(tl.int64)[:, None] * num_cols + o_col[None, :]
    b_weight = tl.load(weight_ptr + o_col, m_col, 0.0).to(tl.float32)
    b_rstd = tl.load(rstd_ptr + o_row, m_row, 0.0)
    b_hat = tl.load(total_ptr + o, m, 0.0).to(tl.float32) * b_rstd[:, None]  # [ROWS, COLS]
    b_g = tl.load(dy_ptr + o, m, 0.0).to(tl.float32) * b_weight[None, :]
    b_dx = b_rstd[:, None] * (b_g - b_hat * (tl.sum(b_g * b_hat, 1) / num_cols)[:, None])
    if ADD:
        b_dx += tl.load(dtotal_ptr + o, m, 0.0).to(tl.float32)
    tl.store(dx_ptr + o, b_dx.to(dx_ptr.dtype.element_ty), m)
    if REFILL:
        tl.store(y_ptr + o, (b_hat * b_weight[None, :]).to(y_ptr.dtype.element_ty), m)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    refill: Refill | None = None,
    backend: str | None = None,
    rounded: Rounded | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, t): t = x (+ residual) and its RMSNorm over the last dimension; weight [H] is frozen.

    x, residual [..., H] contiguous, of one shape and dtype; H at most 32768 (else ValueError). With `refill` y is recomputed in backward
    for the linear that holds the same Refill. With `rounded` kernels also give y in 8 bits to the linear that holds the same Rounded.
    """
    if x.shape[-1:] != weight.shape or x.shape[-1] > MAX_COLUMNS or not x.is_contiguous():
        raise ValueError(f"x {list(x.shape)} with strides {x.stride()} must be contiguous, as wide as its weight {list(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()):
        raise ValueError(f"residual {residual.dtype} {list(residual.shape)} does not fit x {x.dtype} {list(x.shape)}, or is not contiguous")
    return _RmsNorm.apply(x, residual, weight.detach(), eps, refill, backend_name(x.device, backend), rounded)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, refill, backend, rounded):
        ctx.set_materialize_grads(False)
        rstd = None
        if backend == "triton":
            y, total, rstd = forward(x, residual, weight, eps, rounded)
        else:
            y, total = rms_norm_reference(x, weight, eps, residual)
        ctx.save_for_backward(total, rstd)
        ctx.has_residual, ctx.weight, ctx.eps, ctx.refill, ctx.backend = residual is not None, weight, eps, refill, backend
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, rstd = ctx.saved_tensors
        refilling = wanted(ctx.refill)
        assert dy is not None, "y was not used"
        if ctx.backend == "triton":
            dtotal = None if dtotal is None else dtotal.contiguous()
            dx, y = backward(dy.contiguous(), dtotal, total, ctx.weight, rstd, refilling)
        else:
            (y, _), (dx,) = gradients(lambda t: rms_norm_reference(t, ctx.weight, ctx.eps), (total,), (dy, dtotal))
        if refilling:
            ctx.refill.finish(y)
        return dx, dx if ctx.has_residual else None, None, None, None, None, None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounded: Rounded | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; return y, t and rstd fp32 [rows]. With `rounded` y is also rounded to 8 bits."""
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if rounded is not None:
        rounded.x = empty_rows(y)
    values, scales = (None, None) if rounded is None or rounded.x is None else (rounded.x.values, rounded.x.scales)
    if num_rows:
        rows, cols, warps = _tile(num_cols)
        _forward_kernel[(cdiv(num_rows, rows),)](
            x, residual, weight, y, total, rstd, values, scales, num_rows, num_cols, eps,
            ADD=residual is not None, FP8=values is not None, ROWS=rows, COLS=cols, num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


def backward(dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, refill: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernel; return dt and, with `refill`, y."""
    num_cols = total.shape[-1]
    num_rows = total.numel() // num_cols
    dx, y = torch.empty_like(total), torch.empty_like(total) if refill else None
    if num_rows:
        rows, cols, warps = _tile(num_cols)
        _backward_kernel[(cdiv(num_rows, rows),)](
            dy, dtotal, total, weight, rstd, dx, y, num_rows, num_cols,
            ADD=dtotal is not None, REFILL=refill, ROWS=rows, COLS=cols, num_warps=warps,
        )  # fmt: skip
    return dx, y


def _tile(num_cols: int) -> tuple[int, int, int]:
    """Return rows and columns of a program's tile and its warps: about 16 numbers per thread and tensor."""
    cols = power_of_2(num_cols)
    rows = max(1, 2048 // cols)
    return rows, cols, min(16, max(4, rows * cols // 512))
