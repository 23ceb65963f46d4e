"""The skinny products that make S and dS: out [T, r] = c' (M * V) L^T, one read of V.

S takes V = X and L = A; dS takes V = the module's columns of dY and L = B (only above rank 32, see lora_grad.py). A program owns up
to BM rows of one segment (`Route.items`), so no row of another job enters it, and goes over the inner dimension once for each
RANK rows of L. The inner dimension is cut among several programs, so that enough loads are in flight; the last one to arrive adds
their float32 partial sums in ascending order, whoever it is. Without dropout the modules of a slot are one (WIDE): their rows of A,
and their columns of S, lie side by side; with dropout each module masks its own copy of the tile, from one hash. Output columns
beyond a slot's width are not written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.adapters import SLOT_FIELDS, LoraGroup
from fused_ops.route import Route
from fused_ops.shapes import BLOCK_ROWS, inner_splits, rank_class
from fused_ops.triton_dropout import column_keys, hash_bits, keep

_FIELDS = tl.constexpr(SLOT_FIELDS)


@triton.jit
def _store_rows(out_ptr, o_row, m_row, out_stride, column, o_r, rank, b_acc):
    at = out_ptr + o_row.to(tl.int64)[:, None] * out_stride + (column + o_r)[None, :]
    tl.store(at, b_acc.to(out_ptr.dtype.element_ty), m_row[:, None] & (o_r < rank)[None, :])


@triton.jit
def _add_splits(out_ptr, partial_ptr, o_row, m_row, num_rows, stride, column, rank, scale, RANK: tl.constexpr):
    """Write out = scale * the sum of all splits, for one module's columns of S."""
    for o_rank in tl.range(0, rank, RANK, num_stages=1):
        o_r = o_rank + tl.arange(0, RANK)
        m_in = m_row[:, None] & (o_r < rank)[None, :]
        at = o_row.to(tl.int64)[:, None] * stride + (column + o_r)[None, :]
        b_sum = tl.load(partial_ptr + at, m_in, 0.0, cache_modifier=".cg")
        for i_split in tl.range(1, tl.num_programs(1), num_stages=1):
            b_sum += tl.load(partial_ptr + i_split * num_rows.to(tl.int64) * stride + at, m_in, 0.0, cache_modifier=".cg")
        tl.store(out_ptr + at, (b_sum * scale).to(out_ptr.dtype.element_ty), m_in)


@triton.jit
def _lora_rows(lora_ptr, lora_stride, row, o_r, rank, o_k, m_k):
    """Return L^T [BK, RANK]: rows row + o_r of L, zero beyond the rank."""
    at = lora_ptr + (row + o_r).to(tl.int64)[None, :] * lora_stride + o_k[:, None]
    return tl.load(at, m_k[:, None] & (o_r < rank)[None, :], 0.0)


@triton.jit
def arrive_last(counter_ptr, num_programs):
    """Count this program in; return whether it was the last of num_programs, whose stores it then sees, and reset the counter."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit(do_not_specialize=["first_feature", "num_rows", "split_blocks", "out_stride"])
def _down_kernel(
    value_ptr, lora_ptr, out_ptr, partial_ptr, counters_ptr, items_ptr, slots_ptr, scales_ptr, keys_ptr,
    num_rows, num_inner, split_blocks, value_stride, lora_stride, out_stride, first_feature,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 6
    first, end, slot = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    slot_ptr = slots_ptr + slot * _FIELDS
    rank, column0, row0 = tl.load(slot_ptr + (2 if WIDE else 0)), 0, tl.load(slot_ptr + (3 if WIDE else ROW_FIELD))
    if not WIDE:
        column0 = tl.load(slot_ptr + COLUMN_FIELD)
    column1, column2, row1, row2 = column0, column0, row0, row0
    if MODULES > 1:
        row1, column1 = tl.load(slot_ptr + ROW_FIELD + 3), tl.load(slot_ptr + COLUMN_FIELD + 3)
    if MODULES > 2:
        row2, column2 = tl.load(slot_ptr + ROW_FIELD + 6), tl.load(slot_ptr + COLUMN_FIELD + 6)
    rank0, rank1, rank2 = tl.where(row0 >= 0, rank, 0), tl.where(row1 >= 0, rank, 0), tl.where(row2 >= 0, rank, 0)
    first_block = tl.program_id(1) * split_blocks
    end_block = min(first_block + split_blocks, tl.cdiv(num_inner, BK))
    # The partial sums of one split have the rows and the stride of the output.
    put_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * num_rows * out_stride
    scale = tl.load(scales_ptr + slot)
    o_row = first + tl.arange(0, BM)
    m_row = o_row < end
    if DROPOUT:
        b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
        threshold = tl.load(slot_ptr + 1).to(tl.uint32)
    for o_rank in tl.range(0, rank, RANK, num_stages=1):
        o_r = o_rank + tl.arange(0, RANK)
        b_acc0 = tl.zeros([BM, RANK], tl.float32)
        if MODULES > 1:
            b_acc1 = tl.zeros([BM, RANK], tl.float32)
        if MODULES > 2:
            b_acc2 = tl.zeros([BM, RANK], tl.float32)
        for i_k in tl.range(first_block, end_block, num_stages=NUM_STAGES):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < num_inner
            b_v = tl.load(value_ptr + o_row.to(tl.int64)[:, None] * value_stride + o_k[None, :], m_row[:, None] & m_k[None, :], 0.0)
            b_v0, b_v1, b_v2 = b_v, b_v, b_v
            if DROPOUT:
                b_hash = hash_bits(b_keys, column_keys(first_feature + o_k), MODULES)
                b_v0 = tl.where(keep(b_hash, threshold, 0), b_v, 0.0)
                if MODULES > 1:
                    b_v1 = tl.where(keep(b_hash, threshold, 1), b_v, 0.0)
                if MODULES > 2:
                    b_v2 = tl.where(keep(b_hash, threshold, 2), b_v, 0.0)
            b_acc0 = tl.dot(b_v0, _lora_rows(lora_ptr, lora_stride, row0, o_r, rank0, o_k, m_k), b_acc0, input_precision="ieee")
            if MODULES > 1:
                b_acc1 = tl.dot(b_v1, _lora_rows(lora_ptr, lora_stride, row1, o_r, rank1, o_k, m_k), b_acc1, input_precision="ieee")
            if MODULES > 2:
                b_acc2 = tl.dot(b_v2, _lora_rows(lora_ptr, lora_stride, row2, o_r, rank2, o_k, m_k), b_acc2, input_precision="ieee")
        _store_rows(put_ptr, o_row, m_row, out_stride, column0, o_r, rank0, b_acc0)
        if MODULES > 1:
            _store_rows(put_ptr, o_row, m_row, out_stride, column1, o_r, rank1, b_acc1)
        if MODULES > 2:
            _store_rows(put_ptr, o_row, m_row, out_stride, column2, o_r, rank2, b_acc2)
    if arrive_last(counters_ptr + tl.program_id(0), tl.num_programs(1)):
        _add_splits(out_ptr, partial_ptr, o_row, m_row, num_rows, out_stride, column0, rank0, scale, RANK)
        if MODULES > 1:
            _add_splits(out_ptr, partial_ptr, o_row, m_row, num_rows, out_stride, column1, rank1, scale, RANK)
        if MODULES > 2:
            _add_splits(out_ptr, partial_ptr, o_row, m_row, num_rows, out_stride, column2, rank2, scale, RANK)


def down(x_TK: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return S [T, width] in x's dtype; rows and columns that belong to no adapter are not written."""
    s_TR = torch.empty(x_TK.shape[0], group.width, dtype=x_TK.dtype, device=x_TK.device)
    wide = not group.has_dropout
    num_modules = 1 if wide else group.num_modules
    rank = rank_class(group.width if wide else group.max_padded_rank, limit=256 if num_modules == 1 else 64)
    _launch(x_TK, group.a_RK, s_TR, group, route, 4, 6, num_modules, rank, group.has_dropout, wide, group.first_feature)
    return s_TR


def down_module(dy_TN: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, module: int) -> None:
    """Write dS = c' dY B of one module into its columns of ds_TR."""
    start, stop = group.columns[module]
    rank = rank_class(group.max_padded_rank, limit=256)
    _launch(dy_TN[:, start:stop], group.b_RN[module], ds_TR, group, route, 5 + 3 * module, 6 + 3 * module, 1, rank, False, False, 0)


def _launch(value, lora, out, group, route, row_field, column_field, num_modules, rank, dropout, wide, first_feature) -> None:
    num_rows, num_inner = value.shape
    num_items = route.num_items(BLOCK_ROWS)
    if not num_items:
        return
    inner_block = 64
    splits = inner_splits(num_rows, num_inner, value.device)
    split_blocks = triton.cdiv(num_inner, splits * inner_block)
    splits = triton.cdiv(num_inner, split_blocks * inner_block)
    partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=value.device)
    _down_kernel[(num_items, splits)](
        value, lora, out, partial, route.counters(num_items), route.items(BLOCK_ROWS), group.slot_table, group.scale_table, route.row_keys,
        num_rows, num_inner, split_blocks, value.stride(0), lora.stride(0), out.stride(0), first_feature,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, BM=BLOCK_ROWS, BK=inner_block, RANK=rank,
        MODULES=num_modules, DROPOUT=dropout, WIDE=wide, NUM_STAGES=3, num_warps=4 if rank <= 64 else 8,
        maxnreg=128 if rank * num_modules <= 16 else None,
    )  # fmt: skip
