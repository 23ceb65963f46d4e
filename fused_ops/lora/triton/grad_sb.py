"""dS = c' dY B and dB = dY^T S from one read of dY, for ranks up to 32 (above, partial sums cost more than a second read).

A program owns one item (some rows of one segment) and COLUMNS columns of one module. It holds its block of B, loads each tile of dY
once, writes the tile's share of dS [rows, r] to a float32 workspace and keeps dB [COLUMNS, r] in registers. Full blocks of rows come
through TMA. The item's last rows, and all rows where TMA cannot be used, are masked in both operands of dB. Columns beyond the module's
meet zeros of B. A segment of one item is added to the gradient arena directly; else the last program over a segment's items adds their
partial sums in ascending order. A second kernel, spread over all rows, adds the shares of dS. B and dB of the modules are addressed by
offsets from the first one's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import num_processors, rank_class, uses_tma
from fused_ops.lora.adapters import ADAPTER_FIELDS, LoraGroup
from fused_ops.lora.route import Route
from fused_ops.lora.triton.down import arrive_last
from fused_ops.lora.triton.skinny_config import SharesConfig, item_rows, shares_config

MAX_FUSED_RANK = 32
_FIELDS = tl.constexpr(ADAPTER_FIELDS)


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
    dy, s, b_ptr, grad_ptr, share_s_ptr, share_b_ptr, counters_ptr, items_ptr, adapters_ptr,
    b_offset1, b_offset2, grad_offset1, grad_offset2, start0, start1, start2, cols0, cols1, cols2, blocks0, blocks1,
    num_rows, dy_stride, width,
    MODULES: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_block, i_item = tl.program_id(0), tl.program_id(1)
    item_ptr = items_ptr + i_item * 6
    first, end, adapter = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    adapter_ptr = adapters_ptr + adapter * _FIELDS
    # Which module these columns belong to, its first column and its offsets.
    i_module, i_first, start, num_cols = 0, 0, start0, cols0
    b_offset, grad_offset = b_offset1 * 0, grad_offset1 * 0
    if MODULES > 1:
        second = i_block >= blocks0
        i_module, i_first = tl.where(second, 1, 0), tl.where(second, blocks0, 0)
        start, num_cols = tl.where(second, start1, start0), tl.where(second, cols1, cols0)
        b_offset, grad_offset = tl.where(second, b_offset1, 0), tl.where(second, grad_offset1, 0)
    if MODULES > 2:
        third = i_block >= blocks0 + blocks1
        i_module, i_first = tl.where(third, 2, i_module), tl.where(third, blocks0 + blocks1, i_first)
        start, num_cols = tl.where(third, start2, start), tl.where(third, cols2, num_cols)
        b_offset, grad_offset = tl.where(third, b_offset2, b_offset), tl.where(third, grad_offset2, grad_offset)
    rank, b_row, s_col = tl.load(adapter_ptr), tl.load(adapter_ptr + 5 + 3 * i_module), tl.load(adapter_ptr + 6 + 3 * i_module)
    # An adapter that does not target the module has no rows here and writes nothing.
    rank = tl.where(b_row >= 0, rank, 0)
    end = tl.where(b_row >= 0, end, first)
    o_r = tl.arange(0, RANK)
    m_r = o_r < rank
    i_col = (i_block - i_first) * COLUMNS
    o_col = i_col + tl.arange(0, COLUMNS)
    m_col = o_col < num_cols
    at = o_r[:, None] * num_cols + o_col[None, :]
    b_b = tl.load(b_ptr + b_offset + b_row.to(tl.int64) * num_cols + at, m_r[:, None] & m_col[None, :], 0.0).T
    b_db = tl.zeros([COLUMNS, RANK], tl.float32)
    share_ptr = share_s_ptr + i_block * num_rows.to(tl.int64) * RANK
    full = first
    if TMA:
        full = first + (end - first) // BM * BM
        for i_row in tl.range(first, full, BM, num_stages=NUM_STAGES):
            b_db = _add_rows(
                b_db, b_b, dy, s, share_ptr, i_row, end, start + i_col, start + num_cols, s_col, rank, dy_stride, width,
                BM, COLUMNS, RANK, TMA, MASKED=False,
            )  # fmt: skip
    for i_row in tl.range(full, end, BM, num_stages=1 if TMA else NUM_STAGES):
        b_db = _add_rows(
            b_db, b_b, dy, s, share_ptr, i_row, end, start + i_col, start + num_cols, s_col, rank, dy_stride, width,
            BM, COLUMNS, RANK, TMA, MASKED=True,
        )  # fmt: skip

    i_low, i_high = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    grad_at = grad_ptr + grad_offset + b_row.to(tl.int64) * num_cols + o_r[None, :] * num_cols + o_col[:, None]
    m_grad = m_r[None, :] & m_col[:, None]
    if i_high - i_low == 1:
        tl.store(grad_at, tl.load(grad_at, m_grad, 0.0) + b_db, m_grad)
    else:
        step = tl.num_programs(0).to(tl.int64) * COLUMNS * RANK
        o_share = i_block * (COLUMNS * RANK) + tl.arange(0, COLUMNS)[:, None] * RANK + o_r[None, :]
        tl.store(share_b_ptr + i_item * step + o_share, b_db)
        if arrive_last(counters_ptr + tl.load(item_ptr + 3) * tl.num_programs(0) + i_block, i_high - i_low):
            b_sum = tl.zeros([COLUMNS, RANK], tl.float32)
            for i in tl.range(i_low, i_high, num_stages=1):
                b_sum += tl.load(share_b_ptr + i * step + o_share, cache_modifier=".cg")
            tl.store(grad_at, tl.load(grad_at, m_grad, 0.0) + b_sum, m_grad)


@triton.jit(do_not_specialize=["num_rows", "width", "blocks0", "blocks1", "blocks2"])
def _sum_shares_kernel(
    ds_ptr, share_s_ptr, items_ptr, adapters_ptr, scales_ptr, blocks0, blocks1, blocks2, num_rows, width,
    BM: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dS [rows, S column + r] = c' times the sum of the shares of one module's column blocks, in ascending order, four at a time."""
    item_ptr, i_module = items_ptr + tl.program_id(0) * 6, tl.program_id(1)
    first, end, adapter = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    rank, s_col = tl.load(adapters_ptr + adapter * _FIELDS), tl.load(adapters_ptr + adapter * _FIELDS + 6 + 3 * i_module)
    i_first = tl.where(i_module > 0, blocks0, 0) + tl.where(i_module > 1, blocks1, 0)
    i_end = i_first + tl.where(i_module == 0, blocks0, tl.where(i_module == 1, blocks1, blocks2))
    o_row, o_r = first + tl.arange(0, BM), tl.arange(0, RANK)
    m_in = (o_row < end)[:, None] & (o_r < rank)[None, :]
    scale = tl.load(scales_ptr + adapter)
    if PDL:  # tables do not change; the shares are complete after this
        gdc_wait()
        gdc_launch_dependents()
    if s_col >= 0:
        b_sum = tl.zeros([BM, RANK], tl.float32)
        for i in tl.range(i_first, i_end, 4, num_stages=1):
            step = num_rows.to(tl.int64) * RANK
            at = share_s_ptr + i * step + o_row.to(tl.int64)[:, None] * RANK + o_r[None, :]
            b_0, b_1 = tl.load(at, m_in, 0.0), tl.load(at + step, m_in & (i + 1 < i_end), 0.0)
            b_2, b_3 = tl.load(at + 2 * step, m_in & (i + 2 < i_end), 0.0), tl.load(at + 3 * step, m_in & (i + 3 < i_end), 0.0)
            b_sum += (b_0 + b_1) + (b_2 + b_3)
        ds_at = ds_ptr + o_row.to(tl.int64)[:, None] * width + (s_col + o_r)[None, :]
        tl.store(ds_at, (b_sum * scale).to(ds_ptr.dtype.element_ty), m_in)


def grad_s_and_b_fused(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route, config: SharesConfig | None = None) -> Tensor:
    """Return dS [T, width] in dY's dtype (unwritten where there is no adapter), and add dB into the group's gradients; rank <= 32."""
    ds_TR = torch.empty_like(s_TR)
    num_rows, device, rank = dy_TN.shape[0], dy_TN.device, rank_class(group.max_padded_rank)
    tma = uses_tma(dy_TN, s_TR) and all(start * dy_TN.element_size() % 16 == 0 for start, _ in group.columns)
    config = config or shares_config(dy_TN.shape[1], rank, dy_TN.element_size(), tma)
    sizes = [stop - start for start, stop in group.columns]
    blocks = [triton.cdiv(size, config.columns) for size in sizes]
    rows = item_rows(route.segments, sum(blocks), num_processors(device))
    num_items = route.num_items(rows)
    if not num_items:
        return ds_TR
    several = num_items if num_items > len(route.segments) else 0
    share_s = torch.empty(sum(blocks), num_rows, rank, dtype=torch.float32, device=device)
    share_b = torch.empty(several, sum(blocks) * config.columns, rank, dtype=torch.float32, device=device)
    tensors = (dy_TN, s_TR)
    if tma:
        boxes = ([config.rows, config.columns], [config.rows, rank])
        tensors = tuple(TensorDescriptor.from_tensor(t, box) for t, box in zip(tensors, boxes, strict=True))

    def offsets(tensors):
        return [(t.data_ptr() - tensors[0].data_ptr()) // t.element_size() for t in (*tensors[1:], *tensors[:1], *tensors[:1])][:2]

    def three(values):
        return [*values, 0, 0][:3]

    _grad_sb_kernel[(sum(blocks), num_items)](
        *tensors, group.b_RN[0], group.grad_b_RN[0], share_s, share_b,
        route.counters(len(route.segments) * sum(blocks)), route.items(rows), group.adapter_table,
        *offsets(group.b_RN), *offsets(group.grad_b_RN), *three([start for start, _ in group.columns]), *three(sizes), *three(blocks)[:2],
        num_rows, dy_TN.stride(0), group.width,
        MODULES=group.num_modules, BM=config.rows, COLUMNS=config.columns, RANK=rank, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps,
    )  # fmt: skip
    _sum_shares_kernel[(route.num_items(config.sum_rows), group.num_modules)](
        ds_TR, share_s, route.items(config.sum_rows), group.adapter_table, group.scale_table, *three(blocks), num_rows, group.width,
        BM=config.sum_rows, RANK=rank, num_warps=config.sum_warps, **pdl(dy_TN),
    )  # fmt: skip
    return ds_TR
