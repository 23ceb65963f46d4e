"""dS = c' dY B and dB = dY^T S from one read of dY, for ranks up to 32 (above, partial sums cost more than a second read).

A program owns one item (some rows of one segment) and COLUMNS columns of one module. It holds its block of B, loads each tile of dY
once, writes the tile's share of dS [rows, r] to a float32 workspace and keeps dB [COLUMNS, r] in registers. Two counters say who is
last: over a segment's items (adds the shares of dB in ascending order to the gradient arena) and over an item's column blocks of one
module (adds the shares of dS). B and dB of the modules are addressed by offsets from the first one's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.adapters import SLOT_FIELDS, LoraGroup
from fused_ops.lora_down import arrive_last
from fused_ops.route import Route
from fused_ops.shapes import item_rows, rank_class

MAX_FUSED_RANK = 32
_FIELDS = tl.constexpr(SLOT_FIELDS)


@triton.jit(do_not_specialize=["num_rows", "width", "num_items"])
def _grad_sb_kernel(
    dy_ptr, s_ptr, ds_ptr, b_ptr, grad_ptr, share_s_ptr, share_b_ptr, counters_ptr, items_ptr, slots_ptr, scales_ptr,
    b_offset1, b_offset2, grad_offset1, grad_offset2, start0, start1, start2, cols0, cols1, cols2, blocks0, blocks1, blocks2,
    num_rows, num_items, dy_stride, width,
    MODULES: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    i_block, i_item = tl.program_id(0), tl.program_id(1)
    item_ptr = items_ptr + i_item * 6
    first, end, slot = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    slot_ptr = slots_ptr + slot * _FIELDS
    # Which module these columns belong to, and where it lies.
    i_module, i_first, start, num_cols, num_blocks = 0, 0, start0, cols0, blocks0
    b_offset, grad_offset = b_offset1 * 0, grad_offset1 * 0
    if MODULES > 1:
        second = i_block >= blocks0
        i_module, i_first = tl.where(second, 1, 0), tl.where(second, blocks0, 0)
        start, num_cols, num_blocks = tl.where(second, start1, start0), tl.where(second, cols1, cols0), tl.where(second, blocks1, blocks0)
        b_offset, grad_offset = tl.where(second, b_offset1, 0), tl.where(second, grad_offset1, 0)
    if MODULES > 2:
        third = i_block >= blocks0 + blocks1
        i_module, i_first = tl.where(third, 2, i_module), tl.where(third, blocks0 + blocks1, i_first)
        start, num_cols, num_blocks = tl.where(third, start2, start), tl.where(third, cols2, num_cols), tl.where(third, blocks2, num_blocks)
        b_offset, grad_offset = tl.where(third, b_offset2, b_offset), tl.where(third, grad_offset2, grad_offset)
    rank, b_row, s_col = tl.load(slot_ptr), tl.load(slot_ptr + 5 + 3 * i_module), tl.load(slot_ptr + 6 + 3 * i_module)
    if b_row >= 0:
        o_r = tl.arange(0, RANK)
        m_r = o_r < rank
        o_col = (i_block - i_first) * COLUMNS + tl.arange(0, COLUMNS)
        m_col = o_col < num_cols
        b_at = b_ptr + b_offset + (b_row + o_r).to(tl.int64)[:, None] * num_cols + o_col[None, :]
        b_b = tl.load(b_at, m_r[:, None] & m_col[None, :], 0.0)
        b_db = tl.zeros([COLUMNS, RANK], tl.float32)
        for i_row in tl.range(first, end, BM, num_stages=NUM_STAGES):
            o_row = i_row + tl.arange(0, BM)
            m_row = o_row < end
            dy_at = dy_ptr + o_row.to(tl.int64)[:, None] * dy_stride + (start + o_col)[None, :]
            b_dy = tl.load(dy_at, m_row[:, None] & m_col[None, :], 0.0)
            b_s = tl.load(s_ptr + o_row[:, None] * width + (s_col + o_r)[None, :], m_row[:, None] & m_r[None, :], 0.0)
            b_ds = tl.dot(b_dy, b_b.T, input_precision="ieee")
            share_at = share_s_ptr + ((i_block * num_rows.to(tl.int64)) + o_row)[:, None] * RANK + o_r[None, :]
            tl.store(share_at, b_ds, m_row[:, None])
            b_db = tl.dot(b_dy.T, b_s, b_db, input_precision="ieee")
        b_step = tl.num_programs(0).to(tl.int64) * COLUMNS * RANK
        o_share = i_block * (COLUMNS * RANK) + tl.arange(0, COLUMNS)[:, None] * RANK + o_r[None, :]
        tl.store(share_b_ptr + i_item * b_step + o_share, b_db)

        i_low, i_high = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
        if arrive_last(counters_ptr + 3 * num_items + tl.load(item_ptr + 3) * tl.num_programs(0) + i_block, i_high - i_low):
            b_sum = tl.zeros([COLUMNS, RANK], tl.float32)
            for i in tl.range(i_low, i_high, num_stages=1):
                b_sum += tl.load(share_b_ptr + i * b_step + o_share, cache_modifier=".cg")
            grad_at = grad_ptr + grad_offset + (b_row + o_r).to(tl.int64)[:, None] * num_cols + o_col[None, :]
            m_grad = m_r[:, None] & m_col[None, :]
            tl.store(grad_at, tl.load(grad_at, m_grad, 0.0) + b_sum.T, m_grad)
        if arrive_last(counters_ptr + 3 * i_item + i_module, num_blocks):
            scale = tl.load(scales_ptr + slot)
            for i_row in tl.range(first, end, BM, num_stages=1):
                o_row = i_row + tl.arange(0, BM)
                m_row = o_row < end
                b_sum = tl.zeros([BM, RANK], tl.float32)
                for i in tl.range(i_first, i_first + num_blocks, num_stages=1):
                    at = share_s_ptr + (i * num_rows.to(tl.int64) + o_row)[:, None] * RANK + o_r[None, :]
                    b_sum += tl.load(at, m_row[:, None], 0.0, cache_modifier=".cg")
                ds_at = ds_ptr + o_row.to(tl.int64)[:, None] * width + (s_col + o_r)[None, :]
                tl.store(ds_at, (b_sum * scale).to(ds_ptr.dtype.element_ty), m_row[:, None] & m_r[None, :])


def grad_s_and_b_fused(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients; rank <= 32."""
    ds_TR = torch.empty_like(s_TR)
    num_rows, device, rank = dy_TN.shape[0], dy_TN.device, rank_class(group.max_padded_rank)
    columns = 256
    sizes = [stop - start for start, stop in group.columns]
    blocks = [triton.cdiv(size, columns) for size in sizes]
    rows = item_rows(num_rows, sum(blocks), device)
    num_items = route.num_items(rows)
    if not num_items:
        return ds_TR
    share_s = torch.empty(sum(blocks), num_rows, rank, dtype=torch.float32, device=device)
    share_b = torch.empty(num_items, sum(blocks) * columns, rank, dtype=torch.float32, device=device)

    def offsets(tensors):
        return [(t.data_ptr() - tensors[0].data_ptr()) // t.element_size() for t in (*tensors[1:], *tensors[:1], *tensors[:1])][:2]

    def three(values):
        return [*values, 0, 0][:3]

    _grad_sb_kernel[(sum(blocks), num_items)](
        dy_TN, s_TR, ds_TR, group.b_RN[0], group.grad_b_RN[0], share_s, share_b,
        route.counters(3 * num_items + len(route.segments) * sum(blocks)), route.items(rows), group.slot_table, group.scale_table,
        *offsets(group.b_RN), *offsets(group.grad_b_RN), *three([start for start, _ in group.columns]), *three(sizes), *three(blocks),
        num_rows, num_items, dy_TN.stride(0), group.width,
        MODULES=group.num_modules, BM=64, COLUMNS=columns, RANK=rank, NUM_STAGES=3, num_warps=8,
    )  # fmt: skip
    return ds_TR
