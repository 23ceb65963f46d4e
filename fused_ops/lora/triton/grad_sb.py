"""dS = c' dY B and dB = dY^T S from one read of dY, for ranks up to 32 (above, partial sums cost more than a second read).

A program owns one item (some rows of one segment) and COLUMNS columns of one module. It holds its block of B, loads each tile of dY
once, writes the tile's share of dS [rows, r] to a float32 workspace and keeps dB [COLUMNS, r] in registers. Full blocks of rows come
through TMA. The item's last rows, and all rows where TMA cannot be used, are masked in both operands of dB. Columns beyond the module's
meet zeros of B. A segment of one item is added to the gradient arena directly; else the last program over a segment's items adds their
partial sums in ascending order. A second kernel, spread over all rows, adds the shares of dS (grad_sb_sums.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.launch.shapes import rank_class, uses_tma
from fused_ops.lora.adapters import ADAPTER_FIELDS, B_ROW, LORA_RANK, MODULE_FIELDS, S_COLUMN, LoraGroup
from fused_ops.lora.route import ADAPTER, END, END_ITEM, FIRST, FIRST_ITEM, ITEM_FIELDS, SEGMENT, Route
from fused_ops.lora.triton.grad_sb_sums import finish, make_sums
from fused_ops.lora.triton.parts import arrive_last, described
from fused_ops.lora.triton.skinny_config import shares_config

MAX_FUSED_RANK = 32


@triton.jit
def _add_rows(
    b_db, b_b, dy, s, share_ptr, i_row, end, i_col, i_end, s_col, rank, dy_stride, width,
    BM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dB [COLUMNS, RANK] plus the product of BM rows, and write their share of dS; MASKED where they may go beyond the end."""
    o_row, o_r = i_row + tl.arange(0, BM), tl.arange(0, RANK)
    m_row = o_row < end
    if TMA:
        b_dy, b_s = dy.load([i_row, i_col]), s.load([i_row, s_col])
        if MASKED:
            b_dy, b_s = tl.where(m_row[:, None], b_dy, 0.0), tl.where(m_row[:, None], b_s, 0.0)
    else:
        o_col = i_col + tl.arange(0, COLUMNS)
        dy_at = dy + o_row.to(tl.int64)[:, None] * dy_stride + o_col[None, :]
        b_dy = tl.load(dy_at, m_row[:, None] & (o_col < i_end)[None, :], 0.0)
        s_at = s + o_row.to(tl.int64)[:, None] * width + (s_col + o_r)[None, :]
        b_s = tl.load(s_at, m_row[:, None] & (o_r < rank)[None, :], 0.0)
    b_ds = tl.dot(b_dy, b_b, input_precision="ieee")
    b_db = tl.dot(b_dy.T, b_s, b_db, input_precision="ieee")
    share_at = share_ptr + o_row.to(tl.int64)[:, None] * RANK + o_r[None, :]
    tl.store(share_at, b_ds, m_row[:, None])
    return b_db


@triton.jit(do_not_specialize=["num_rows", "width"])
def _grad_sb_kernel(
    dy, s, b_ptrs, grad_ptrs, share_ptr, partial_ptr, counters_ptr, items_ptr, adapters_ptr, starts, sizes, ends,
    num_rows, dy_stride, width,
    MODULES: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_block, i_item = tl.program_id(0), tl.program_id(1)
    item_ptr = items_ptr + i_item * ITEM_FIELDS
    first, end, adapter = tl.load(item_ptr + FIRST), tl.load(item_ptr + END), tl.load(item_ptr + ADAPTER)
    # Which module these columns belong to: module m has the blocks from ends[m - 1] to ends[m].
    i_module, i_first, start, num_cols, b_ptr, grad_ptr = 0, 0, starts[0], sizes[0], b_ptrs[0], grad_ptrs[0]
    for m in tl.static_range(1, MODULES):
        later = i_block >= ends[m - 1]
        i_module, i_first = tl.where(later, m, i_module), tl.where(later, ends[m - 1], i_first)
        start, num_cols = tl.where(later, starts[m], start), tl.where(later, sizes[m], num_cols)
        b_ptr, grad_ptr = tl.where(later, b_ptrs[m], b_ptr), tl.where(later, grad_ptrs[m], grad_ptr)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    module_ptr = adapter_ptr + i_module * MODULE_FIELDS
    rank, b_row, s_col = tl.load(adapter_ptr + LORA_RANK), tl.load(module_ptr + B_ROW), tl.load(module_ptr + S_COLUMN)
    # An adapter that does not target the module has no rows here and writes nothing.
    rank = tl.where(b_row >= 0, rank, 0)
    end = tl.where(b_row >= 0, end, first)
    o_r = tl.arange(0, RANK)
    i_col = (i_block - i_first) * COLUMNS
    o_col = i_col + tl.arange(0, COLUMNS)
    at = b_row.to(tl.int64) * num_cols + o_r[:, None] * num_cols + o_col[None, :]
    m_r, m_col = o_r < rank, o_col < num_cols
    b_b = tl.load(b_ptr + at, m_r[:, None] & m_col[None, :], 0.0).T
    b_db = tl.zeros([COLUMNS, RANK], tl.float32)
    share_ptr += i_block * num_rows.to(tl.int64) * RANK
    full = first
    if TMA:
        full = first + (end - first) // BM * BM
    for masked in tl.static_range(0 if TMA else 1, 2):
        low, high = (full, end) if masked else (first, full)
        for i_row in tl.range(low, high, BM, num_stages=1 if TMA and masked else NUM_STAGES):
            b_db = _add_rows(
                b_db, b_b, dy, s, share_ptr, i_row, end, start + i_col, start + num_cols, s_col, rank, dy_stride, width,
                BM, COLUMNS, RANK, TMA, masked,
            )  # fmt: skip

    i_low, i_high = tl.load(item_ptr + FIRST_ITEM), tl.load(item_ptr + END_ITEM)
    grad_at = grad_ptr + b_row.to(tl.int64) * num_cols + o_r[None, :] * num_cols + o_col[:, None]
    m_grad = m_r[None, :] & m_col[:, None]
    if i_high - i_low == 1:
        tl.store(grad_at, tl.load(grad_at, m_grad, 0.0) + b_db, m_grad)
    else:
        step = tl.num_programs(0).to(tl.int64) * COLUMNS * RANK
        o_partial = i_block * (COLUMNS * RANK) + tl.arange(0, COLUMNS)[:, None] * RANK + o_r[None, :]
        tl.store(partial_ptr + i_item * step + o_partial, b_db)
        if arrive_last(counters_ptr + tl.load(item_ptr + SEGMENT) * tl.num_programs(0) + i_block, i_high - i_low):
            b_sum = tl.zeros([COLUMNS, RANK], tl.float32)
            for i in tl.range(i_low, i_high, num_stages=1):
                b_sum += tl.load(partial_ptr + i * step + o_partial, cache_modifier=".cg")
            tl.store(grad_at, tl.load(grad_at, m_grad, 0.0) + b_sum, m_grad)


def grad_s_and_b_fused(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients; rank <= 32."""
    ds_TR, rank, starts = torch.empty_like(s_TR), rank_class(group.max_padded_rank), tuple(start for start, _ in group.columns)
    tma = uses_tma(dy_TN, s_TR) and all(start * dy_TN.element_size() % 16 == 0 for start in starts)
    config = shares_config(dy_TN.shape[1], rank, dy_TN.element_size(), tma)
    sums = make_sums(dy_TN, group, route, config.columns)
    if not sums.num_items:
        return ds_TR
    _grad_sb_kernel[(sums.ends[-1], sums.num_items)](
        *described(tma, (dy_TN, config.rows, config.columns), (s_TR, config.rows, rank)), group.b_RN, group.grad_b_RN,
        sums.shares, sums.partials, route.counters(len(route.segments) * sums.ends[-1]), route.items(sums.item_rows),
        group.adapter_table, starts, sums.sizes, sums.ends, len(dy_TN), dy_TN.stride(0), group.width,
        MODULES=group.num_modules, BM=config.rows, COLUMNS=config.columns, RANK=rank, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps,
    )  # fmt: skip
    finish(sums, ds_TR, group, route)
    return ds_TR
