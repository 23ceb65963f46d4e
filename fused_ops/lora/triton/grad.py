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

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import cdiv, rank_class, uses_tma
from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, B_ROW, LEVEL, LORA_RANK, S_WIDTH, LoraGroup
from fused_ops.lora.route import ADAPTER, END, END_ITEM, FIRST, FIRST_ITEM, ITEM_FIELDS, SEGMENT, Route
from fused_ops.lora.term import LoraTerm, term_of_a, term_of_module
from fused_ops.lora.triton.down import down_module
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.grad_sb import MAX_FUSED_RANK, grad_s_and_b_fused
from fused_ops.lora.triton.parts import arrive_last, described, module_fields, zeros
from fused_ops.lora.triton.skinny_config import rows_config


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
    b_accs, value, s, keys_ptr, i_row, end, i_col, num_cols, value_stride, s_stride, columns, ranks, i_rank, level, first_feature,
    BM: tl.constexpr, BC: tl.constexpr, BLOCK_RANK: tl.constexpr,
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
    if DROPOUT:
        b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
        b_hash = hash_bits(b_keys, column_keys(tl.arange(0, BC), first_feature + i_col))
    b_kept, b_sums = (), ()
    for m in tl.static_range(MODULES):
        b_kept += (tl.where(keep(b_hash, level, m), b_v, 0.0) if DROPOUT else b_v,)
    for m in tl.static_range(MODULES):
        b_s = _s_rows(s, s_stride, i_row, o_row, m_row, max(columns[m], 0) + i_rank, o_r, ranks[m] - i_rank, TMA, MASKED)
        b_sums += (_product(b_kept[m], b_s, b_accs[m], BY_COLUMN),)
    return b_sums


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
    ROW_FIELD: tl.constexpr, MODULE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, BY_COLUMN: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if PDL and not AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    i_item = tl.program_id(1)
    item_ptr = items_ptr + i_item * ITEM_FIELDS
    first, end, adapter = tl.load(item_ptr + FIRST), tl.load(item_ptr + END), tl.load(item_ptr + ADAPTER)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    rank, i_rank = tl.load(adapter_ptr + (S_WIDTH if WIDE else LORA_RANK)), tl.program_id(2) * RANK
    # What this program writes: the adapter's ranks, RANK of them at most.
    rows, columns, ranks = module_fields(adapter_ptr, min(rank, i_rank + RANK), ROW_FIELD, MODULE, MODULES, WIDE)
    i_col = tl.program_id(0) * BC
    level = tl.load(adapter_ptr + LEVEL).to(tl.uint32)
    end = tl.where(i_rank < rank, end, first)
    # Full blocks of rows need no mask. What a rank block holds beyond the ranks is not written, so S needs masks in rows alone.
    full = first
    if TMA:
        full = first + (end - first) // BM * BM
    b_accs = zeros(MODULES, BC if BY_COLUMN else BLOCK_RANK, BLOCK_RANK if BY_COLUMN else BC)
    for masked in tl.static_range(0 if TMA else 1, 2):
        low, high = (full, end) if masked else (first, full)
        for i_row in tl.range(low, high, BM, num_stages=1 if TMA and masked else NUM_STAGES):
            b_accs = _add_rows(
                b_accs, value, s, keys_ptr, i_row, end, i_col, num_cols, value_stride, s_stride, columns, ranks, i_rank, level,
                first_feature, BM, BC, BLOCK_RANK, MODULES, DROPOUT, BY_COLUMN, TMA, masked,
            )  # fmt: skip

    i_low, i_high = tl.load(item_ptr + FIRST_ITEM), tl.load(item_ptr + END_ITEM)
    if PDL and AHEAD:
        # No other kernel uses the gradients, so that a segment's only item is added now; the last program waits for all.
        is_last = (tl.program_id(0) == tl.num_programs(0) - 1) & (i_item == tl.num_programs(1) - 1)
        if (i_high - i_low > 1) | is_last:
            gdc_wait()
    o_r, o_col = i_rank + tl.arange(0, BLOCK_RANK), i_col + tl.arange(0, BC)
    for m in tl.static_range(MODULES):
        _put(grad_ptr, partial_ptr, i_item, i_low, i_high, width, rows[m], columns[m], ranks[m], num_cols, o_r, o_col, b_accs[m], BY_COLUMN)
    if i_high - i_low > 1:
        i_sum = (tl.program_id(2) * tl.num_programs(1) + tl.load(item_ptr + SEGMENT)) * tl.num_programs(0) + tl.program_id(0)
        if arrive_last(counters_ptr + i_sum, i_high - i_low):
            o_rank = i_rank + tl.arange(0, RANK)
            for m in tl.static_range(MODULES):
                _add_items(grad_ptr, partial_ptr, i_low, i_high, width, rows[m], columns[m], ranks[m], num_cols, o_rank, o_col)


def grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, after_dx: bool = False) -> None:
    """Add dA = dS^T (M * X) into the group's gradients, all jobs and modules, reading X once.

    With `after_dx` it runs beside the last tiles of dX. The caller launched dX after X and dS, and in between nothing that lets others
    start early.
    """
    _sum_rows(x_TK, ds_TR, group.grad_a_RK, group, route, term_of_a(group), A_ROW.value, after_dx)


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients."""
    if group.max_padded_rank <= MAX_FUSED_RANK:
        return grad_s_and_b_fused(dy_TN, s_TR, group, route)
    ds_TR = torch.empty_like(s_TR)
    for module, columns in enumerate(group.columns):
        down_module(dy_TN, ds_TR, group, route, module)
        term = term_of_module(group, module)
        _sum_rows(dy_TN[:, slice(*columns)], s_TR, group.grad_b_RN[module], group, route, term, B_ROW.value)
    return ds_TR


def _sum_rows(
    value: Tensor, s_TR: Tensor, grad: Tensor, group: LoraGroup, route: Route, term: LoraTerm, row_field: int, ahead: bool = False
) -> None:
    rank, tma = rank_class(term.width, 128 if term.num_modules == 1 else 32), uses_tma(value, s_TR)
    num_cols, width = value.shape[1], group.width
    config = rows_config(rank, term.num_modules, term.dropout, value.element_size(), tma)
    num_blocks, num_ranks = cdiv(num_cols, config.columns), cdiv(term.width, rank)
    num_items = route.num_items(config.item_rows)
    if not num_items:
        return
    block_rank = max(rank, config.min_rank)
    partial = torch.empty(num_items if num_items > len(route.segments) else 0, width, num_cols, dtype=torch.float32, device=value.device)
    _rows_kernel[(num_blocks, num_items, num_ranks)](
        *described(tma, (value, config.rows, config.columns), (s_TR, config.rows, block_rank)), grad, partial,
        route.counters(num_blocks * num_items * num_ranks), route.items(config.item_rows),
        group.adapter_table, route.row_keys, num_cols, value.stride(0), s_TR.stride(0), width, group.first_feature,
        ROW_FIELD=row_field, MODULE=term.first_module, BM=config.rows, BC=config.columns, RANK=rank, BLOCK_RANK=block_rank,
        MODULES=term.num_modules, DROPOUT=term.dropout, WIDE=term.wide, BY_COLUMN=config.by_column, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps, **pdl(value), AHEAD=ahead and tma,
    )  # fmt: skip
