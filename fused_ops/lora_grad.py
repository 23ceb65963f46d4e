"""Sums over rows: dA = dS^T (M * X), dB = dY^T S, and dS = c' dY B with dB from one read of dY. Deterministic, no atomics.

Work is cut into items of at most ROWS rows of one segment (`Route.items`) times blocks of columns. Each writes its partial sum once,
in float32; a second kernel adds the partials of a segment in ascending order and adds the result to the gradient arena. Rows beyond
the item are masked in *both* operands, since 0 * NaN is NaN.

    grad_a          X once, all modules (without dropout as one, WIDE)
    grad_s_and_b    dY once for ranks up to 32; above that dS by `lora_down.down_module` and dB by the same kernel as dA
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.adapters import SLOT_FIELDS, LoraGroup
from fused_ops.lora_down import down_module
from fused_ops.route import Route
from fused_ops.shapes import rank_class
from fused_ops.triton_dropout import column_keys, hash_bits, keep

_FIELDS = tl.constexpr(SLOT_FIELDS)


@triton.jit
def _s_rows(s_ptr, s_stride, o_row, m_row, column, o_r, rank):
    """Return S [BM, RANK] of rows o_row, zero beyond the item's rows and the slot's rank."""
    return tl.load(s_ptr + o_row.to(tl.int64)[:, None] * s_stride + (column + o_r)[None, :], m_row[:, None] & (o_r < rank)[None, :], 0.0)


@triton.jit
def _put_partial(partial_ptr, i_item, width, num_cols, column, o_r, rank, o_col, b_acc):
    at = partial_ptr + (i_item.to(tl.int64) * width + column + o_r)[:, None] * num_cols + o_col[None, :]
    tl.store(at, b_acc, (o_r < rank)[:, None] & (o_col < num_cols)[None, :])


@triton.jit(do_not_specialize=["first_feature", "width", "s_stride"])
def _rows_kernel(
    value_ptr, s_ptr, partial_ptr, items_ptr, slots_ptr, keys_ptr, num_cols, value_stride, s_stride, width, first_feature,
    COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """partial [item, column of S, column] = sum over the item's rows of S^T (M * V)."""
    i_item = tl.program_id(1)
    first, end, slot = tl.load(items_ptr + i_item * 4), tl.load(items_ptr + i_item * 4 + 1), tl.load(items_ptr + i_item * 4 + 2)
    slot_ptr = slots_ptr + slot * _FIELDS
    rank, column0 = tl.load(slot_ptr + (2 if WIDE else 0)), 0
    if not WIDE:
        column0 = tl.load(slot_ptr + COLUMN_FIELD)
    column1, column2 = column0, column0
    if MODULES > 1:
        column1 = tl.load(slot_ptr + COLUMN_FIELD + 3)
    if MODULES > 2:
        column2 = tl.load(slot_ptr + COLUMN_FIELD + 6)
    rank0, rank1, rank2 = tl.where(column0 >= 0, rank, 0), tl.where(column1 >= 0, rank, 0), tl.where(column2 >= 0, rank, 0)
    o_col = tl.program_id(0) * BC + tl.arange(0, BC)
    m_col = o_col < num_cols
    if DROPOUT:
        b_columns = column_keys(first_feature + o_col)
        threshold = tl.load(slot_ptr + 1).to(tl.uint32)
    for o_rank in tl.range(0, rank, RANK, num_stages=1):
        o_r = o_rank + tl.arange(0, RANK)
        b_acc0 = tl.zeros([RANK, BC], tl.float32)
        if MODULES > 1:
            b_acc1 = tl.zeros([RANK, BC], tl.float32)
        if MODULES > 2:
            b_acc2 = tl.zeros([RANK, BC], tl.float32)
        for i_row in tl.range(first, end, BM, num_stages=NUM_STAGES):
            o_row = i_row + tl.arange(0, BM)
            m_row = o_row < end
            b_v = tl.load(value_ptr + o_row.to(tl.int64)[:, None] * value_stride + o_col[None, :], m_row[:, None] & m_col[None, :], 0.0)
            b_v0, b_v1, b_v2 = b_v, b_v, b_v
            if DROPOUT:
                b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
                b_hash = hash_bits(b_keys, b_columns, MODULES)
                b_v0 = tl.where(keep(b_hash, threshold, 0), b_v, 0.0)
                if MODULES > 1:
                    b_v1 = tl.where(keep(b_hash, threshold, 1), b_v, 0.0)
                if MODULES > 2:
                    b_v2 = tl.where(keep(b_hash, threshold, 2), b_v, 0.0)
            b_acc0 = tl.dot(_s_rows(s_ptr, s_stride, o_row, m_row, column0, o_r, rank0).T, b_v0, b_acc0, input_precision="ieee")
            if MODULES > 1:
                b_acc1 = tl.dot(_s_rows(s_ptr, s_stride, o_row, m_row, column1, o_r, rank1).T, b_v1, b_acc1, input_precision="ieee")
            if MODULES > 2:
                b_acc2 = tl.dot(_s_rows(s_ptr, s_stride, o_row, m_row, column2, o_r, rank2).T, b_v2, b_acc2, input_precision="ieee")
        _put_partial(partial_ptr, i_item, width, num_cols, column0, o_r, rank0, o_col, b_acc0)
        if MODULES > 1:
            _put_partial(partial_ptr, i_item, width, num_cols, column1, o_r, rank1, o_col, b_acc1)
        if MODULES > 2:
            _put_partial(partial_ptr, i_item, width, num_cols, column2, o_r, rank2, o_col, b_acc2)


@triton.jit(do_not_specialize=["width"])
def _add_partials_kernel(
    partial_ptr, grad_ptr, ranges_ptr, slots_ptr, num_cols, width,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, RANK_FIELD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad [row + r, column] += partial [item, s_column + r, column], summed over a segment's items in ascending order."""
    range_ptr = ranges_ptr + tl.program_id(2) * 3
    slot_ptr = slots_ptr + tl.load(range_ptr + 2) * _FIELDS
    rank, row = tl.load(slot_ptr + RANK_FIELD), tl.load(slot_ptr + ROW_FIELD)
    column = 0
    if COLUMN_FIELD >= 0:
        column = tl.load(slot_ptr + COLUMN_FIELD)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    if (row >= 0) & (tl.program_id(1) * BR < rank):
        o_col = tl.program_id(0) * BC + tl.arange(0, BC)
        m_in = (o_r < rank)[:, None] & (o_col < num_cols)[None, :]
        b_sum = tl.zeros([BR, BC], tl.float32)
        for i_item in tl.range(tl.load(range_ptr), tl.load(range_ptr + 1), num_stages=1):
            at = partial_ptr + (i_item * width.to(tl.int64) + column + o_r)[:, None] * num_cols + o_col[None, :]
            b_sum += tl.load(at, m_in, 0.0)
        grad_at = grad_ptr + (row + o_r).to(tl.int64)[:, None] * num_cols + o_col[None, :]
        tl.store(grad_at, tl.load(grad_at, m_in, 0.0) + b_sum, m_in)


def grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route) -> None:
    """Add dA = dS^T (M * X) into the group's gradients, all jobs and modules, reading X once."""
    wide = not group.has_dropout
    num_modules = 1 if wide else group.num_modules
    rank = rank_class(group.width if wide else group.max_padded_rank, limit=128 if num_modules == 1 else 32)
    _sum_rows(x_TK, ds_TR, group.grad_a_RK, group, route, 6, 3, -1, 2, num_modules, rank, group.has_dropout, wide, group.first_feature)


def grad_b_module(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route, module: int) -> None:
    """Add dB = dY^T S of one module into the group's gradients."""
    start, stop = group.columns[module]
    rank, field = rank_class(group.max_padded_rank, limit=128), 6 + 3 * module
    _sum_rows(dy_TN[:, start:stop], s_TR, group.grad_b_RN[module], group, route, field, field - 1, field, 0, 1, rank, False, False, 0)


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients."""
    ds_TR = torch.empty_like(s_TR)
    for module in range(group.num_modules):
        down_module(dy_TN, ds_TR, group, route, module)
        grad_b_module(dy_TN, s_TR, group, route, module)
    return ds_TR


def _sum_rows(
    value, s_TR, grad, group, route, s_field, row_field, column_field, rank_field, num_modules, rank, dropout, wide, first_feature
) -> None:
    rows, num_cols, width = _item_rows(value), value.shape[1], group.width
    num_items = route.num_items(rows)
    if not num_items:
        return
    partial = torch.empty(num_items, width, num_cols, dtype=torch.float32, device=value.device)
    block = 128 if rank <= 64 else 64
    _rows_kernel[(triton.cdiv(num_cols, block), num_items)](
        value, s_TR, partial, route.items(rows), group.slot_table, route.row_keys,
        num_cols, value.stride(0), s_TR.stride(0), width, first_feature,
        COLUMN_FIELD=s_field, BM=64, BC=block, RANK=rank, MODULES=num_modules, DROPOUT=dropout, WIDE=wide, NUM_STAGES=4, num_warps=4 if rank * num_modules <= 16 else 8,
    )  # fmt: skip
    ranks = triton.cdiv(width if wide or column_field < 0 else group.max_padded_rank, 16)
    _add_partials_kernel[(triton.cdiv(num_cols, 128), ranks, len(route.segments))](
        partial, grad, route.item_ranges(rows), group.slot_table, num_cols, width,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, RANK_FIELD=rank_field, BR=16, BC=128, num_warps=4,
    )  # fmt: skip


def _item_rows(value: Tensor) -> int:
    """Return the rows per item: enough items for a few waves, few partial sums."""
    return 1024 if value.shape[0] * value.shape[1] >= 1 << 24 else 256
