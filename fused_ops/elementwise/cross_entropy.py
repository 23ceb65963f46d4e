"""Softmax cross-entropy over a chunk of logits z [C, V]: the sums that its losses need, then its gradient, written over the logits.

    softmax_sums            highest_t = max_v z_tv          total_t = sum_v exp(z_tv - highest_t)
    softmax_residual_       z_tv <- exp(z_tv - highest_t) / total_t - [v = label_t]          0 in a row without a label
    scatter_scaled          out[row_i] = g[row_i] grad_i, 0 in all other rows

The loss is log total_t - (z_t,label - highest_t). V may be one rank's range of a vocabulary, starting at `first_token`: the caller then
reduces highest and total over all ranks before it computes the residual. Rows are independent: a NaN in one does not reach another.

The kernels are bound by memory. Numbers moved per row: V for the sums, 2V for the residual. Arithmetic in float32, one rounding at the end;
no logit is kept in float32. A row's sums are combined from those of its blocks of BLOCK columns.
"""

import torch
from torch import Tensor

from fused_ops.launch.backend import backend_name
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.launch.shapes import cdiv

BLOCK = 4096
WARPS = 8


def softmax_sums_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (highest, total), fp32 [C]: the twin that CPU runs use."""
    highest = logits.amax(dim=1).float()
    return highest, (logits - highest[:, None]).exp_().sum(dim=1)


def softmax_residual_reference_(logits: Tensor, labels: Tensor, first_token: int, highest: Tensor, total: Tensor) -> Tensor:
    """Write softmax - onehot over the logits and return them."""
    values = logits.float()  # float32 logits themselves
    values.sub_(highest[:, None]).exp_().div_(total[:, None])
    column = labels - first_token
    owned = (column >= 0) & (column < logits.shape[1])
    values.scatter_add_(1, torch.where(owned, column, 0)[:, None], -owned.float()[:, None])
    values.masked_fill_((labels < 0)[:, None], 0.0)
    return logits.copy_(values)


def scatter_scaled_reference(grad: Tensor, scales: Tensor, rows: Tensor | None) -> Tensor:
    """Return the scaled rows at their positions, [T, H] in the dtype of `grad`."""
    scale = scales if rows is None else scales.index_select(0, rows)
    scaled = (grad * scale[:, None]).masked_fill_((scale == 0)[:, None], 0.0).to(grad.dtype)
    return scaled if rows is None else grad.new_zeros(len(scales), grad.shape[1]).index_copy_(0, rows, scaled)


# Halves and slices of one number a row begin anywhere, by the microbatch: their alignment would be a kernel each.
@triton.jit(do_not_specialize_on_alignment=["highest_ptr", "total_ptr"])
def _softmax_sums_kernel(logits_ptr, highest_ptr, total_ptr, num_cols, num_blocks, BLOCK: tl.constexpr):
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_z = tl.load(logits_ptr + i_row * num_cols + o_col, o_col < num_cols, float("-inf")).to(tl.float32)  # [BLOCK]
    highest = tl.max(b_z, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # a block may hold -inf alone
    tl.store(highest_ptr + tl.program_id(0), highest)
    tl.store(total_ptr + tl.program_id(0), tl.sum(tl.exp(b_z - shift), 0))


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=["label_ptr", "highest_ptr", "total_ptr"])
def _softmax_residual_kernel(
    logits_ptr, label_ptr, highest_ptr, total_ptr, num_cols, num_blocks, first_token, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    z_at = logits_ptr + i_row * num_cols + o_col
    label, highest, total = tl.load(label_ptr + i_row), tl.load(highest_ptr + i_row), tl.load(total_ptr + i_row)
    b_p = tl.exp(tl.load(z_at, m_col, 0.0).to(tl.float32) - highest) * (1.0 / total)  # [BLOCK]
    b_p -= tl.where(o_col == (label - first_token).to(tl.int32), 1.0, 0.0)
    tl.store(z_at, tl.where(label >= 0, b_p, 0.0).to(logits_ptr.dtype.element_ty), m_col)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "row_ptr"])
def _scatter_scaled_kernel(grad_ptr, scale_ptr, row_ptr, out_ptr, num_cols, num_blocks, ALL: tl.constexpr, BLOCK: tl.constexpr):
    i_grad = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    i_row = i_grad if ALL else tl.load(row_ptr + i_grad)
    scale = tl.load(scale_ptr + i_row)
    b_grad = tl.load(grad_ptr + i_grad * num_cols + o_col, m_col, 0.0).to(tl.float32)  # [BLOCK]
    b_grad = tl.where(scale == 0.0, 0.0, b_grad * scale)
    tl.store(out_ptr + i_row * num_cols + o_col, b_grad.to(out_ptr.dtype.element_ty), m_col)


def softmax_sums(logits: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (highest, total), fp32 [C], of logits [C, V] (contiguous, V > 0; else ValueError)."""
    _check(logits)
    if backend_name(logits.device, backend) == "reference":
        return softmax_sums_reference(logits)
    num_rows, num_cols = logits.shape
    num_blocks = cdiv(num_cols, BLOCK)
    highest, total = torch.empty(2, num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    _launch(_softmax_sums_kernel, num_rows, num_cols, logits, highest, total)
    top = highest.amax(dim=1)
    return top, (total * (highest - top[:, None]).exp_()).sum(dim=1)


def softmax_residual_(
    logits: Tensor, labels: Tensor, highest: Tensor, total: Tensor, first_token: int = 0, backend: str | None = None
) -> Tensor:
    """Write softmax - onehot over the logits [C, V] and return them.

    `labels` int64 [C] name columns from `first_token` on (another rank's: no column here; negative: the row becomes 0); `highest` and
    `total` fp32 [C] are those of the whole vocabulary. ValueError unless all are contiguous and as long as there are rows.
    """
    _check(logits)
    for each in (labels, highest, total):
        if each.shape != logits.shape[:1] or not each.is_contiguous():
            raise ValueError(f"{list(each.shape)} with strides {each.stride()} is not one number for each row of {list(logits.shape)}")
    if backend_name(logits.device, backend) == "reference":
        return softmax_residual_reference_(logits, labels, first_token, highest, total)
    _launch(_softmax_residual_kernel, len(logits), logits.shape[1], logits, labels, highest, total, first_token=first_token)
    return logits


def scatter_scaled(grad: Tensor, scales: Tensor, rows: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Return [T, H]: row rows[i] is grad[i] times scales[rows[i]], others are 0; a row scaled by 0 is 0 even if it holds NaN.

    `grad` [N, H], `scales` fp32 [T], `rows` int64 [N] without repetition, None for all (N = T). ValueError unless contiguous.
    """
    fits = len(grad) == len(scales if rows is None else rows)
    if not fits or not all(each is None or each.is_contiguous() for each in (grad, scales, rows)):
        raise ValueError(f"grad {list(grad.shape)} with strides {grad.stride()} does not fit its scales {list(scales.shape)} or rows")
    if backend_name(grad.device, backend) == "reference":
        return scatter_scaled_reference(grad, scales, rows)
    out = torch.empty_like(grad) if rows is None else grad.new_zeros(len(scales), grad.shape[1])
    _launch(_scatter_scaled_kernel, len(grad), grad.shape[1], grad, scales, rows, out, ALL=rows is None)
    return out


def _launch(kernel, num_rows: int, num_cols: int, *tensors: Tensor | None, **options: int) -> None:
    """Launch a program for each block of columns of each row."""
    num_blocks = cdiv(num_cols, BLOCK)
    if num_rows * num_blocks:
        kernel[(num_rows * num_blocks,)](*tensors, num_cols, num_blocks, **options, BLOCK=BLOCK, num_warps=WARPS)


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_contiguous():
        raise ValueError(f"logits {list(logits.shape)} with strides {logits.stride()} must be contiguous, with at least one column")
