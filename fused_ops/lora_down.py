"""The skinny products that make S and dS: out [T, r] = c' (M * V) L^T, one read of V.

S takes V = X and L = A; dS takes V = the module's columns of dY and L = B (only above rank 32, see lora_grad.py). A program owns up
to BM rows of one segment (`Route.items`), so no row of another job enters it, and goes over the inner dimension once for each
RANK rows of L. Without dropout the modules of a slot are one (WIDE): their rows of A, and their columns of S, lie side by side; with
dropout each module masks its own copy of the tile, from one hash. Output columns beyond a slot's width are not written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.adapters import SLOT_FIELDS, LoraGroup
from fused_ops.route import Route
from fused_ops.shapes import rank_class, row_block
from fused_ops.triton_dropout import column_keys, hash_bits, keep

_FIELDS = tl.constexpr(SLOT_FIELDS)


@triton.jit
def _store_rows(out_ptr, o_row, m_row, out_stride, column, o_r, rank, b_acc, scale):
    at = out_ptr + o_row.to(tl.int64)[:, None] * out_stride + (column + o_r)[None, :]
    tl.store(at, (b_acc * scale).to(out_ptr.dtype.element_ty), m_row[:, None] & (o_r < rank)[None, :])


@triton.jit
def _lora_rows(lora_ptr, lora_stride, row, o_r, rank, o_k, m_k):
    """Return L^T [BK, RANK]: rows row + o_r of L, zero beyond the rank."""
    at = lora_ptr + (row + o_r).to(tl.int64)[None, :] * lora_stride + o_k[:, None]
    return tl.load(at, m_k[:, None] & (o_r < rank)[None, :], 0.0)


@triton.jit(do_not_specialize=["first_feature"])
def _down_kernel(
    value_ptr, lora_ptr, out_ptr, items_ptr, slots_ptr, scales_ptr, keys_ptr, num_inner, value_stride, lora_stride, out_stride, first_feature,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 4
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
    scale = tl.load(scales_ptr + slot)
    o_row = first + tl.arange(0, BM)
    m_row = o_row < end
    if DROPOUT:
        b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
        threshold = tl.load(slot_ptr + 1).to(tl.uint32)
    for o_rank in tl.range(0, rank, RANK, num_stages=1):
        o_r = o_rank + tl.arange(0, RANK)
        rank0, rank1, rank2 = tl.where(row0 >= 0, rank, 0), tl.where(row1 >= 0, rank, 0), tl.where(row2 >= 0, rank, 0)
        b_acc0 = tl.zeros([BM, RANK], tl.float32)
        if MODULES > 1:
            b_acc1 = tl.zeros([BM, RANK], tl.float32)
        if MODULES > 2:
            b_acc2 = tl.zeros([BM, RANK], tl.float32)
        for i_k in tl.range(0, tl.cdiv(num_inner, BK), num_stages=NUM_STAGES):
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
        _store_rows(out_ptr, o_row, m_row, out_stride, column0, o_r, rank0, b_acc0, scale)
        if MODULES > 1:
            _store_rows(out_ptr, o_row, m_row, out_stride, column1, o_r, rank1, b_acc1, scale)
        if MODULES > 2:
            _store_rows(out_ptr, o_row, m_row, out_stride, column2, o_r, rank2, b_acc2, scale)


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
    block = row_block(value.shape[0], value.device)
    if not route.num_items(block):
        return
    _down_kernel[(route.num_items(block),)](
        value, lora, out, route.items(block), group.slot_table, group.scale_table, route.row_keys,
        value.shape[1], value.stride(0), lora.stride(0), out.stride(0), first_feature,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, BM=block, BK=128 if rank <= 64 and not dropout else 64, RANK=rank,
        MODULES=num_modules, DROPOUT=dropout, WIDE=wide, NUM_STAGES=4, num_warps=4 if rank <= 64 else 8,
    )  # fmt: skip
