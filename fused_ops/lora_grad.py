"""Sums over rows: dA = dS^T (M * X), dB = dY^T S, and dS = c' dY B with dB from one read of dY. Deterministic, no atomics.

Work is cut into items of some rows of one segment (`Route.items`) times blocks of columns. Each writes its partial sum once, in
float32; the last program of a sum to arrive adds the partials in ascending order, whoever it is, and adds the result to the gradient
arena. Rows beyond the item are masked in *both* operands, since 0 * NaN is NaN.

    grad_a          X once, all modules (without dropout as one, WIDE)
    grad_s_and_b    dY once for ranks up to 32 (lora_grad_sb.py); above that dS by `lora_down.down_module`, dB by the kernel of dA
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.adapters import SLOT_FIELDS, LoraGroup
from fused_ops.lora_down import arrive_last, down_module
from fused_ops.lora_grad_sb import MAX_FUSED_RANK, grad_s_and_b_fused
from fused_ops.route import Route
from fused_ops.shapes import item_rows, rank_class
from fused_ops.triton_dropout import column_keys, hash_bits, keep

_FIELDS = tl.constexpr(SLOT_FIELDS)


@triton.jit
def _s_rows(s_ptr, s_stride, o_row, m_row, column, o_r, rank):
    """Return S [BM, RANK] of rows o_row, zero beyond the item's rows and the slot's rank."""
    return tl.load(s_ptr + o_row.to(tl.int64)[:, None] * s_stride + (column + o_r)[None, :], m_row[:, None] & (o_r < rank)[None, :], 0.0)


@triton.jit
def _put_partial(partial_ptr, i_item, width, num_cols, column, o_r, rank, o_col, b_acc):
    at = partial_ptr + (i_item * width.to(tl.int64) + column + o_r)[:, None] * num_cols + o_col[None, :]
    tl.store(at, b_acc, (o_r < rank)[:, None] & (o_col < num_cols)[None, :])


@triton.jit(do_not_specialize=["first_feature", "width", "s_stride"])
def _rows_kernel(
    value_ptr, s_ptr, grad_ptr, partial_ptr, counters_ptr, items_ptr, slots_ptr, keys_ptr,
    num_cols, value_stride, s_stride, width, first_feature,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """partial [item, column of S, column] = sum over the item's rows of S^T (M * V); the last of a segment adds to grad [row, column]."""
    i_item = tl.program_id(1)
    item_ptr = items_ptr + i_item * 6
    first, end, slot = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
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
    i_low, i_high = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    if arrive_last(counters_ptr + tl.load(item_ptr + 3) * tl.num_programs(0) + tl.program_id(0), i_high - i_low):
        _add_to_grad(
            grad_ptr, partial_ptr, tl.load(slot_ptr + (3 if WIDE else ROW_FIELD)), i_low, i_high, width, column0, rank0, num_cols, o_col
        )
        if MODULES > 1:
            _add_to_grad(grad_ptr, partial_ptr, tl.load(slot_ptr + ROW_FIELD + 3), i_low, i_high, width, column1, rank1, num_cols, o_col)
        if MODULES > 2:
            _add_to_grad(grad_ptr, partial_ptr, tl.load(slot_ptr + ROW_FIELD + 6), i_low, i_high, width, column2, rank2, num_cols, o_col)


@triton.jit
def _add_to_grad(grad_ptr, partial_ptr, row, i_low, i_high, width, column, rank, num_cols, o_col):
    """grad [row + r, column] += the sum over a segment's items of partial [item, column of S + r, column], in ascending order."""
    for o_rank in tl.range(0, rank, 16, num_stages=1):
        o_r = o_rank + tl.arange(0, 16)
        m_in = (o_r < rank)[:, None] & (o_col < num_cols)[None, :]
        b_sum = tl.zeros([16, o_col.shape[0]], tl.float32)
        step = width.to(tl.int64) * num_cols
        for i_item in tl.range(i_low, i_high, 4, num_stages=1):
            at = partial_ptr + i_item * step + (column + o_r)[:, None] * num_cols + o_col[None, :]
            b_0 = tl.load(at, m_in, 0.0, cache_modifier=".cg")
            b_1 = tl.load(at + step, m_in & (i_item + 1 < i_high), 0.0, cache_modifier=".cg")
            b_2 = tl.load(at + 2 * step, m_in & (i_item + 2 < i_high), 0.0, cache_modifier=".cg")
            b_3 = tl.load(at + 3 * step, m_in & (i_item + 3 < i_high), 0.0, cache_modifier=".cg")
            b_sum += (b_0 + b_1) + (b_2 + b_3)
        grad_at = grad_ptr + (row + o_r).to(tl.int64)[:, None] * num_cols + o_col[None, :]
        tl.store(grad_at, tl.load(grad_at, m_in, 0.0) + b_sum, m_in)


def grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route) -> None:
    """Add dA = dS^T (M * X) into the group's gradients, all jobs and modules, reading X once."""
    wide = not group.has_dropout
    num_modules = 1 if wide else group.num_modules
    rank = rank_class(group.width if wide else group.max_padded_rank, limit=128 if num_modules == 1 else 32)
    _sum_rows(x_TK, ds_TR, group.grad_a_RK, group, route, 6, 4, num_modules, rank, group.has_dropout, wide, group.first_feature)


def grad_b_module(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route, module: int) -> None:
    """Add dB = dY^T S of one module into the group's gradients."""
    start, stop = group.columns[module]
    rank, field = rank_class(group.max_padded_rank, limit=128), 6 + 3 * module
    _sum_rows(dy_TN[:, start:stop], s_TR, group.grad_b_RN[module], group, route, field, field - 1, 1, rank, False, False, 0)


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients."""
    if group.max_padded_rank <= MAX_FUSED_RANK:
        return grad_s_and_b_fused(dy_TN, s_TR, group, route)
    ds_TR = torch.empty_like(s_TR)
    for module in range(group.num_modules):
        down_module(dy_TN, ds_TR, group, route, module)
        grad_b_module(dy_TN, s_TR, group, route, module)
    return ds_TR


def _sum_rows(value, s_TR, grad, group, route, column_field, row_field, num_modules, rank, dropout, wide, first_feature) -> None:
    block = 128 if rank * num_modules <= 64 else 64
    num_cols, width = value.shape[1], group.width
    num_blocks = triton.cdiv(num_cols, block)
    rows = item_rows(value.shape[0], num_blocks, value.device)
    num_items = route.num_items(rows)
    if not num_items:
        return
    partial = torch.empty(num_items, width, num_cols, dtype=torch.float32, device=value.device)
    _rows_kernel[(num_blocks, num_items)](
        value, s_TR, grad, partial, route.counters(num_blocks * len(route.segments)), route.items(rows), group.slot_table, route.row_keys,
        num_cols, value.stride(0), s_TR.stride(0), width, first_feature,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, BM=64, BC=block, RANK=rank,
        MODULES=num_modules, DROPOUT=dropout, WIDE=wide, NUM_STAGES=3, num_warps=4 if rank * num_modules <= 16 else 8,
    )  # fmt: skip
