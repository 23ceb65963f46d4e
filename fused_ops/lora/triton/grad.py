"""Sums over rows: dA = dS^T (M * X), and dB = dY^T S of ranks too high for one read of dY. Deterministic, no atomics.

A program owns one item (some rows of one segment, `Route.items`), a block of columns and RANK columns of S, and keeps its sum in
registers. Full blocks of rows come through TMA. The item's last rows, and all rows where TMA cannot be used, are masked in *both*
operands, since 0 * NaN is NaN. Columns of S beyond the adapter's own do not mix with them and are not written. A segment of one item is
added to the gradient arena directly; else each item writes its partial sum in float32, and the last program of a sum to arrive adds all
of them in ascending order.

    grad_a          X once, all modules (without dropout as one, WIDE); AHEAD: beside dX's last tiles (early_launch.py)
    grad_s_and_b    dY once for ranks up to 32 (triton/grad_sb.py); above that dS by `down_module`, dB by the kernel of dA
                    (on Hopper fused.py takes hopper/grad_sb.py up to rank 64)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import rank_class, uses_tma
from fused_ops.lora.adapters import ADAPTER_FIELDS, LoraGroup
from fused_ops.lora.route import Route
from fused_ops.lora.triton.down import arrive_last, down_module
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.grad_sb import MAX_FUSED_RANK, grad_s_and_b_fused
from fused_ops.lora.triton.skinny_config import RowsConfig, rows_config

_FIELDS = tl.constexpr(ADAPTER_FIELDS)


@triton.jit
def _product(b_v, b_s, b_acc, BY_COLUMN: tl.constexpr):
    """Return b_acc + V^T S [BC, RANK], or S^T V [RANK, BC]."""
    if BY_COLUMN:
        return tl.dot(b_v.T, b_s, b_acc, input_precision="ieee")
    else:
        return tl.dot(b_s.T, b_v, b_acc, input_precision="ieee")


@triton.jit
def _s_rows(s, s_stride, i_row, o_row, m_row, column, o_r, rank, TMA: tl.constexpr, MASKED: tl.constexpr):
    """Return S [BM, RANK] of rows o_row; columns beyond the rank are zero, or with TMA what the tensor holds there."""
    if TMA:
        b_s = s.load([i_row, column])
        if MASKED:
            b_s = tl.where(m_row[:, None], b_s, 0.0)
    else:
        at = s + o_row.to(tl.int64)[:, None] * s_stride + (column + o_r)[None, :]
        b_s = tl.load(at, m_row[:, None] & (o_r < rank)[None, :], 0.0)
    return b_s


@triton.jit
def _add_rows(
    b_acc0, b_acc1, b_acc2, value, s, keys_ptr, i_row, end, i_col, num_cols, value_stride, s_stride, columns, ranks, i_rank,
    threshold, first_feature, BM: tl.constexpr, BC: tl.constexpr, BLOCK_RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, BY_COLUMN: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the accumulators plus the products of BM rows from i_row on; MASKED where they may go beyond the item's end."""
    o_row, o_col, o_r = i_row + tl.arange(0, BM), i_col + tl.arange(0, BC), tl.arange(0, BLOCK_RANK)
    m_row = o_row < end
    if TMA:
        b_v = value.load([i_row, i_col])
        if MASKED:
            b_v = tl.where(m_row[:, None], b_v, 0.0)
    else:
        at = value + o_row.to(tl.int64)[:, None] * value_stride + o_col[None, :]
        b_v = tl.load(at, m_row[:, None] & (o_col < num_cols)[None, :], 0.0)
    b_v0, b_v1, b_v2 = b_v, b_v, b_v
    if DROPOUT:
        b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
        b_hash = hash_bits(b_keys, column_keys(tl.arange(0, BC), first_feature + i_col))
        b_v0 = tl.where(keep(b_hash, threshold, 0), b_v, 0.0)
        if MODULES > 1:
            b_v1 = tl.where(keep(b_hash, threshold, 1), b_v, 0.0)
        if MODULES > 2:
            b_v2 = tl.where(keep(b_hash, threshold, 2), b_v, 0.0)
    b_s0 = _s_rows(s, s_stride, i_row, o_row, m_row, max(columns[0], 0) + i_rank, o_r, ranks[0], TMA, MASKED)
    b_acc0 = _product(b_v0, b_s0, b_acc0, BY_COLUMN)
    if MODULES > 1:
        b_s1 = _s_rows(s, s_stride, i_row, o_row, m_row, max(columns[1], 0) + i_rank, o_r, ranks[1], TMA, MASKED)
        b_acc1 = _product(b_v1, b_s1, b_acc1, BY_COLUMN)
    if MODULES > 2:
        b_s2 = _s_rows(s, s_stride, i_row, o_row, m_row, max(columns[2], 0) + i_rank, o_r, ranks[2], TMA, MASKED)
        b_acc2 = _product(b_v2, b_s2, b_acc2, BY_COLUMN)
    return b_acc0, b_acc1, b_acc2


@triton.jit
def _put(grad_ptr, partial_ptr, i_item, i_low, i_high, width, row, column, rank, num_cols, o_r, o_col, b_acc, BY_COLUMN: tl.constexpr):
    """Add a segment's only item to grad [row + r, column]; write one of several to partial [item, column of S + r, column]."""
    if BY_COLUMN:
        b_acc = b_acc.T
    m_in = (o_r < rank)[:, None] & (o_col < num_cols)[None, :]
    at = o_r[:, None] * num_cols + o_col[None, :]
    if i_high - i_low == 1:
        grad_at = grad_ptr + row.to(tl.int64) * num_cols + at
        tl.store(grad_at, tl.load(grad_at, m_in, 0.0, cache_modifier=".cg") + b_acc, m_in)
    else:
        tl.store(partial_ptr + (i_item * width.to(tl.int64) + column) * num_cols + at, b_acc, m_in)


@triton.jit
def _add_items(grad_ptr, partial_ptr, i_low, i_high, width, row, column, rank, num_cols, o_r, o_col):
    """grad [row + r, column] += the sum over a segment's items of partial [item, column of S + r, column], in ascending order."""
    m_in = (o_r < rank)[:, None] & (o_col < num_cols)[None, :]
    at = o_r[:, None] * num_cols + o_col[None, :]
    b_sum = tl.zeros([o_r.shape[0], o_col.shape[0]], tl.float32)
    for i_item in tl.range(i_low, i_high, num_stages=1):
        b_sum += tl.load(partial_ptr + (i_item * width.to(tl.int64) + column) * num_cols + at, m_in, 0.0, cache_modifier=".cg")
    grad_at = grad_ptr + row.to(tl.int64) * num_cols + at
    tl.store(grad_at, tl.load(grad_at, m_in, 0.0) + b_sum, m_in)


@triton.jit(do_not_specialize=["first_feature", "width", "s_stride"])
def _rows_kernel(
    value, s, grad_ptr, partial_ptr, counters_ptr, items_ptr, adapters_ptr, keys_ptr,
    num_cols, value_stride, s_stride, width, first_feature,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, BY_COLUMN: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if PDL and not AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    i_item = tl.program_id(1)
    item_ptr = items_ptr + i_item * 6
    first, end, adapter = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    adapter_ptr = adapters_ptr + adapter * _FIELDS
    rank, column0 = tl.load(adapter_ptr + (2 if WIDE else 0)), 0
    if not WIDE:
        column0 = tl.load(adapter_ptr + COLUMN_FIELD)
    column1, column2 = column0, column0
    if MODULES > 1:
        column1 = tl.load(adapter_ptr + COLUMN_FIELD + 3)
    if MODULES > 2:
        column2 = tl.load(adapter_ptr + COLUMN_FIELD + 6)
    i_rank = tl.program_id(2) * RANK
    o_r = i_rank + tl.arange(0, BLOCK_RANK)
    # What this program writes: the adapter's ranks, RANK of them at most.
    stop = min(rank, i_rank + RANK)
    rank0, rank1, rank2 = tl.where(column0 >= 0, stop, 0), tl.where(column1 >= 0, stop, 0), tl.where(column2 >= 0, stop, 0)
    i_col = tl.program_id(0) * BC
    o_col = i_col + tl.arange(0, BC)
    threshold = tl.load(adapter_ptr + 1).to(tl.uint32)
    end = tl.where(i_rank < rank, end, first)
    # Full blocks of rows need no mask. What a rank block holds beyond `stop` is not written, so S needs masks in rows alone.
    full = first
    if TMA:
        full = first + (end - first) // BM * BM
    columns, ranks = (column0, column1, column2), (rank0 - i_rank, rank1 - i_rank, rank2 - i_rank)
    b_acc0 = tl.zeros([BC, BLOCK_RANK] if BY_COLUMN else [BLOCK_RANK, BC], tl.float32)
    b_acc1, b_acc2 = b_acc0, b_acc0
    if TMA:
        for i_row in tl.range(first, full, BM, num_stages=NUM_STAGES):
            b_acc0, b_acc1, b_acc2 = _add_rows(
                b_acc0, b_acc1, b_acc2, value, s, keys_ptr, i_row, end, i_col, num_cols, value_stride, s_stride, columns, ranks, i_rank,
                threshold, first_feature, BM, BC, BLOCK_RANK, MODULES, DROPOUT, BY_COLUMN, TMA, MASKED=False,
            )  # fmt: skip
    for i_row in tl.range(full, end, BM, num_stages=1 if TMA else NUM_STAGES):
        b_acc0, b_acc1, b_acc2 = _add_rows(
            b_acc0, b_acc1, b_acc2, value, s, keys_ptr, i_row, end, i_col, num_cols, value_stride, s_stride, columns, ranks, i_rank,
            threshold, first_feature, BM, BC, BLOCK_RANK, MODULES, DROPOUT, BY_COLUMN, TMA, MASKED=True,
        )  # fmt: skip

    i_low, i_high = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    if PDL and AHEAD:
        # No other kernel uses the gradients, so that a segment's only item is added now; the last program waits for all.
        is_last = (tl.program_id(0) == tl.num_programs(0) - 1) & (i_item == tl.num_programs(1) - 1)
        if (i_high - i_low > 1) | is_last:
            gdc_wait()
    a_row0 = tl.load(adapter_ptr + (3 if WIDE else ROW_FIELD))
    _put(grad_ptr, partial_ptr, i_item, i_low, i_high, width, a_row0, column0, rank0, num_cols, o_r, o_col, b_acc0, BY_COLUMN)
    a_row1, a_row2 = a_row0, a_row0
    if MODULES > 1:
        a_row1 = tl.load(adapter_ptr + ROW_FIELD + 3)
        _put(grad_ptr, partial_ptr, i_item, i_low, i_high, width, a_row1, column1, rank1, num_cols, o_r, o_col, b_acc1, BY_COLUMN)
    if MODULES > 2:
        a_row2 = tl.load(adapter_ptr + ROW_FIELD + 6)
        _put(grad_ptr, partial_ptr, i_item, i_low, i_high, width, a_row2, column2, rank2, num_cols, o_r, o_col, b_acc2, BY_COLUMN)
    if i_high - i_low > 1:
        i_sum = (tl.program_id(2) * tl.num_programs(1) + tl.load(item_ptr + 3)) * tl.num_programs(0) + tl.program_id(0)
        if arrive_last(counters_ptr + i_sum, i_high - i_low):
            o_rank = i_rank + tl.arange(0, RANK)
            _add_items(grad_ptr, partial_ptr, i_low, i_high, width, a_row0, column0, rank0, num_cols, o_rank, o_col)
            if MODULES > 1:
                _add_items(grad_ptr, partial_ptr, i_low, i_high, width, a_row1, column1, rank1, num_cols, o_rank, o_col)
            if MODULES > 2:
                _add_items(grad_ptr, partial_ptr, i_low, i_high, width, a_row2, column2, rank2, num_cols, o_rank, o_col)


def grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, after_dx: bool = False, config: RowsConfig | None = None) -> None:
    """Add dA = dS^T (M * X) into the group's gradients, all jobs and modules, reading X once.

    With `after_dx` it runs beside the last tiles of dX. The caller launched dX after X and dS, and in between nothing that lets others
    start early.
    """
    wide = not group.has_dropout
    num_modules = 1 if wide else group.num_modules
    largest_rank = group.width if wide else group.max_padded_rank
    limit = 128 if num_modules == 1 else 32
    columns = (4, 6, num_modules, largest_rank, limit, group.has_dropout, wide, group.first_feature)
    _sum_rows(x_TK, ds_TR, group.grad_a_RK, group, route, *columns, config, after_dx)


def grad_b_module(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route, module: int, config: RowsConfig | None = None) -> None:
    """Add dB = dY^T S of one module into the group's gradients."""
    start, stop = group.columns[module]
    field = 5 + 3 * module
    columns = (field, field + 1, 1, group.max_padded_rank, 128, False, False, 0)
    _sum_rows(dy_TN[:, start:stop], s_TR, group.grad_b_RN[module], group, route, *columns, config)


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients."""
    if group.max_padded_rank <= MAX_FUSED_RANK:
        return grad_s_and_b_fused(dy_TN, s_TR, group, route)
    ds_TR = torch.empty_like(s_TR)
    for module in range(group.num_modules):
        down_module(dy_TN, ds_TR, group, route, module)
        grad_b_module(dy_TN, s_TR, group, route, module)
    return ds_TR


def _sum_rows(
    value, s_TR, grad, group, route, row_field, column_field, num_modules, largest_rank, limit, dropout, wide, first_feature, config,
    ahead=False,
):  # fmt: skip
    rank, tma = rank_class(largest_rank, limit), uses_tma(value, s_TR)
    num_cols, width = value.shape[1], group.width
    config = config or rows_config(value.shape[0], num_cols, rank, num_modules, dropout, value.element_size(), tma)
    num_blocks, num_ranks = triton.cdiv(num_cols, config.columns), triton.cdiv(largest_rank, rank)
    num_items = route.num_items(config.item_rows)
    if not num_items:
        return
    block_rank = max(rank, config.min_rank)
    partial = torch.empty(num_items if num_items > len(route.segments) else 0, width, num_cols, dtype=torch.float32, device=value.device)
    tensors = (value, s_TR)
    if tma:
        boxes = ([config.rows, config.columns], [config.rows, block_rank])
        tensors = tuple(TensorDescriptor.from_tensor(t, box) for t, box in zip(tensors, boxes, strict=True))
    _rows_kernel[(num_blocks, num_items, num_ranks)](
        *tensors, grad, partial, route.counters(num_blocks * num_items * num_ranks), route.items(config.item_rows),
        group.adapter_table, route.row_keys, num_cols, value.stride(0), s_TR.stride(0), width, first_feature,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, BM=config.rows, BC=config.columns, RANK=rank, BLOCK_RANK=block_rank,
        MODULES=num_modules, DROPOUT=dropout, WIDE=wide, BY_COLUMN=config.by_column, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps, **pdl(value), AHEAD=ahead and tma,
    )  # fmt: skip
