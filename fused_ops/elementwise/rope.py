"""Rotary embedding of a merged q | k | v buffer (and RMSNorm of q and k heads where the model has it): one pass each way.

Feature pair (i, i + d/2) of a head is rotated by its row's angle (halves layout):
    forward     y_i = x_i cos - x_{i+d/2} sin      y_{i+d/2} = x_{i+d/2} cos + x_i sin
    backward    the same rotation by the negative angle
A table of p < d/2 pairs rotates a head's first 2 p features, as pairs (i, i + p), and leaves the others.
With head norms, x is first x rstd w over the head's d features (w of q or of k), and backward continues through that norm.

qkv [T, (heads + 2 kv heads) d] is read where the GEMM wrote it; q [T, heads, d], k and v [T, kv heads, d] come out contiguous, as
attention wants them; v is copied. Backward writes one [T, (heads + 2 kv heads) d] gradient, as the GEMM wants it. Numbers moved per row:
twice the width of qkv each way (three times backward with head norms). cos and sin [T, d/2] belong to the packed positions of the
microbatch and serve all layers. Arithmetic in float32, one rounding at the end. Keeps nothing, with head norms qkv.
"""

import torch
from torch import Tensor

from fused_ops.elementwise.rms_norm import normed
from fused_ops.launch.backend import backend_name, gradients
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.launch.shapes import cdiv, power_of_2

Table = tuple[Tensor, Tensor]  # cos and sin, [T, d/2]
HeadNorms = tuple[Tensor, Tensor, float]  # weights of q and of k [d], eps


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate the first 2 p features of x [T, heads, d] by the table [T, p], in x's dtype."""
    cos, sin = (part[:, None] for part in table)
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 2 * pairs :]), dim=-1)


def rotate_qkv_reference(qkv: Tensor, table: Table, heads: int, kv_heads: int, norms: HeadNorms | None = None) -> tuple[Tensor, ...]:
    """Return q, k, v in the dtype of qkv [T, (heads + 2 kv heads) d]: the twin that CPU runs use."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q_weight, k_weight, eps = norms
        q, k = normed(q, q_weight, eps), normed(k, k_weight, eps)
    return rotate(q, table), rotate(k, table), v.contiguous()


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, dqkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, num_rows, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
    NORM: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: qkv to q, k, v. BACKWARD: gradients in q, k, v (and qkv, with NORM) to dqkv.

    A program handles HEADS heads of one of q, k and v, which are contiguous there in the order (row, head). Of a head's HALF pairs, the
    first PAIRS are rotated; the others are its further features, low and high halves of them.
    """
    q_blocks, kv_blocks = tl.cdiv(num_rows * Q_HEADS, HEADS), tl.cdiv(num_rows * KV_HEADS, HEADS)
    i_block = tl.program_id(0)
    is_q, is_v = i_block < q_blocks, i_block >= q_blocks + kv_blocks
    i_block -= tl.where(is_q, 0, q_blocks) + tl.where(is_v, kv_blocks, 0)
    num_heads = tl.where(is_q, Q_HEADS, KV_HEADS)
    first_head = tl.where(is_q, 0, Q_HEADS) + tl.where(is_v, KV_HEADS, 0)
    part_ptr = tl.multiple_of(tl.where(is_q, q_ptr, tl.where(is_v, v_ptr, k_ptr)), 16)
    o_unit, o_half = i_block * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF_BLOCK)
    o_row, m_half = o_unit // num_heads, o_half < HALF
    m = (o_row < num_rows)[:, None] & m_half[None, :]
    o_merged = o_row.to(tl.int64) * ((Q_HEADS + 2 * KV_HEADS) * 2 * HALF) + (first_head + o_unit % num_heads) * (2 * HALF)
    if PAIRS == HALF:
        o_low, o_high, m_table = o_half, o_half + HALF, m
    else:
        o_low, o_high = tl.where(o_half < PAIRS, o_half, o_half + PAIRS), tl.where(o_half < PAIRS, o_half + PAIRS, o_half + HALF)
        m_table = m & (o_half < PAIRS)[None, :]
    o_merged, o_part = o_merged[:, None], o_unit.to(tl.int64)[:, None] * (2 * HALF)
    o_merged_low, o_merged_high = o_merged + o_low[None, :], o_merged + o_high[None, :]
    o_part_low, o_part_high = o_part + o_low[None, :], o_part + o_high[None, :]
    o_table = o_row[:, None] * PAIRS + o_half[None, :]

    b_cos, b_sin = tl.load(cos_ptr + o_table, m_table, 1.0).to(tl.float32), tl.load(sin_ptr + o_table, m_table, 0.0).to(tl.float32)
    if NORM or not BACKWARD:
        b_x_low, b_x_high = tl.load(qkv_ptr + o_merged_low, m, 0.0).to(tl.float32), tl.load(qkv_ptr + o_merged_high, m, 0.0).to(tl.float32)
    if BACKWARD:
        b_low, b_high = tl.load(part_ptr + o_part_low, m, 0.0).to(tl.float32), tl.load(part_ptr + o_part_high, m, 0.0).to(tl.float32)
        b_sin = -b_sin
    else:
        b_low, b_high = b_x_low, b_x_high
    if NORM:
        weight_ptr = tl.where(is_q, q_weight_ptr, k_weight_ptr)
        b_low_w = tl.load(weight_ptr + o_low, m_half, 0.0).to(tl.float32)
        b_high_w = tl.load(weight_ptr + o_high, m_half, 0.0).to(tl.float32)
        b_squares = tl.sum(b_x_low * b_x_low, 1) + tl.sum(b_x_high * b_x_high, 1)  # pyright: ignore[reportOperatorIssue]  NORM: bound
        b_rstd = 1.0 / tl.sqrt_rn(b_squares / (2 * HALF) + eps)
        b_hat_low, b_hat_high = b_x_low * b_rstd[:, None], b_x_high * b_rstd[:, None]
        if not BACKWARD:
            b_low, b_high = tl.where(is_v, b_low, b_hat_low * b_low_w[None, :]), tl.where(is_v, b_high, b_hat_high * b_high_w[None, :])
    b_out_low = tl.where(is_v, b_low, b_low * b_cos - b_high * b_sin)
    b_out_high = tl.where(is_v, b_high, b_high * b_cos + b_low * b_sin)
    if BACKWARD:
        if NORM:
            b_g_low, b_g_high = b_out_low * b_low_w[None, :], b_out_high * b_high_w[None, :]
            b_mean = (tl.sum(b_g_low * b_hat_low, 1) + tl.sum(b_g_high * b_hat_high, 1)) / (2 * HALF)
            b_out_low = tl.where(is_v, b_low, b_rstd[:, None] * (b_g_low - b_hat_low * b_mean[:, None]))
            b_out_high = tl.where(is_v, b_high, b_rstd[:, None] * (b_g_high - b_hat_high * b_mean[:, None]))
        tl.store(dqkv_ptr + o_merged_low, b_out_low.to(dqkv_ptr.dtype.element_ty), m)
        tl.store(dqkv_ptr + o_merged_high, b_out_high.to(dqkv_ptr.dtype.element_ty), m)
    else:
        tl.store(part_ptr + o_part_low, b_out_low.to(q_ptr.dtype.element_ty), m)
        tl.store(part_ptr + o_part_high, b_out_high.to(q_ptr.dtype.element_ty), m)


def rotate_qkv(
    qkv: Tensor, table: Table, heads: int, kv_heads: int, norms: HeadNorms | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, heads, d], k and v [T, kv heads, d]: q and k (normed by head and) rotated, v unchanged.

    qkv [T, (heads + 2 kv heads) d] and cos, sin [T, p <= d/2] contiguous; norms = (weight of q [d], weight of k [d], eps), frozen.
    Raises ValueError where shapes do not fit.
    """
    half = qkv.shape[-1] // (heads + 2 * kv_heads) // 2
    if qkv.dim() != 2 or qkv.shape[1] != (heads + 2 * kv_heads) * 2 * half or not qkv.is_contiguous():
        raise ValueError(f"qkv {list(qkv.shape)} must be contiguous [T, ({heads} + 2 * {kv_heads}) heads of an even size]")
    pairs = table[0].shape[-1]
    if any(part.shape != (qkv.shape[0], pairs) or pairs > half or not part.is_contiguous() for part in table):
        raise ValueError(f"cos and sin {[list(part.shape) for part in table]} must be contiguous [{qkv.shape[0]}, at most {half}]")
    if norms is not None:
        if any(weight.shape != (2 * half,) for weight in norms[:2]):
            raise ValueError(f"weights of head norms {[list(weight.shape) for weight in norms[:2]]} must be [{2 * half}]")
        norms = (norms[0].detach(), norms[1].detach(), norms[2])
    return _RotateQkv.apply(qkv, table, heads, kv_heads, norms, backend_name(qkv.device, backend))


class _RotateQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, heads, kv_heads, norms, backend):
        ctx.save_for_backward(qkv if norms is not None else None)
        ctx.table, ctx.heads, ctx.kv_heads, ctx.norms, ctx.backend = table, heads, kv_heads, norms, backend
        if backend == "triton":
            return forward(qkv, table, heads, kv_heads, norms)
        return rotate_qkv_reference(qkv, table, heads, kv_heads, norms)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        (qkv,) = ctx.saved_tensors
        if ctx.backend == "triton":
            dqkv = backward(dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv, ctx.table, ctx.norms)
        elif ctx.norms is None:
            inverse = (ctx.table[0], -ctx.table[1])
            dqkv = torch.cat((rotate(dq, inverse), rotate(dk, inverse), dv), dim=1).flatten(1)
        else:
            _, (dqkv,) = gradients(lambda x: rotate_qkv_reference(x, ctx.table, ctx.heads, ctx.kv_heads, ctx.norms), (qkv,), (dq, dk, dv))
        return dqkv, None, None, None, None, None


def forward(qkv: Tensor, table: Table, heads: int, kv_heads: int, norms: HeadNorms | None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel forward."""
    shape = (qkv.shape[0], heads + 2 * kv_heads, qkv.shape[1] // (heads + 2 * kv_heads))
    q, k, v = (qkv.new_empty(shape[0], n, shape[2]) for n in (heads, kv_heads, kv_heads))
    _launch(qkv, (q, k, v), None, table, norms)
    return q, k, v


def backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, table: Table, norms: HeadNorms | None) -> Tensor:
    """Launch the kernel backward; qkv is needed with head norms alone. Returns the gradient of qkv."""
    dqkv = dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])
    _launch(qkv, (dq, dk, dv), dqkv, table, norms)
    return dqkv


def _launch(qkv: Tensor | None, parts: tuple[Tensor, ...], dqkv: Tensor | None, table: Table, norms: HeadNorms | None) -> None:
    q, k, v = parts
    num_rows, heads, kv_heads, head_dim = q.shape[0], q.shape[1], k.shape[1], q.shape[2]
    block = heads_per_program(head_dim)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    if num_rows:
        _rope_kernel[(cdiv(num_rows * heads, block) + 2 * cdiv(num_rows * kv_heads, block),)](
            qkv, q, k, v, dqkv, *table, q_weight, k_weight, num_rows, eps,
            Q_HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, PAIRS=table[0].shape[1],
            HEADS=block, HALF_BLOCK=power_of_2(head_dim // 2),
            NORM=norms is not None, BACKWARD=dqkv is not None, num_warps=4,
        )  # fmt: skip


def heads_per_program(head_dim: int) -> int:
    """Return how many heads a program handles: about 2048 numbers."""
    return max(1, 2048 // power_of_2(head_dim))
