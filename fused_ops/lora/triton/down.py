"""The skinny products that make S and dS: out [T, r] = c' (M * V) L^T, one read of V.

S takes V = X and L = A; dS takes V = the module's columns of dY and L = B (high ranks only, see triton/grad.py). A program owns up
to BM rows of one segment (`Route.items`) and RANK rows of L. Rows of V do not mix, nor do rows of L: TMA loads complete blocks,
neighbours' rows included, and only what belongs to the item and the adapter is written. Where few rows would leave multiprocessors
idle, the inner dimension is cut among several programs; the last one to arrive adds all float32 partial sums in ascending order.
Without dropout the modules of an adapter count as one (WIDE): their rows of A, and their columns of S, are adjacent. With dropout each
module masks its own copy of the tile, from one hash.
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
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.skinny_config import DownConfig, down_config, splits

_FIELDS = tl.constexpr(ADAPTER_FIELDS)


@triton.jit
def _put(out_ptr, partial_ptr, first, m_row, num_rows, stride, column, o_r, rank, scale, b_acc, BM: tl.constexpr):
    """Write one module's columns: of the output where the inner dimension is not cut, else of this split's partial sums."""
    at = tl.arange(0, BM)[:, None] * stride + (column + o_r)[None, :]
    m_in = m_row[:, None] & (o_r < rank)[None, :]
    if tl.num_programs(1) == 1:
        tl.store(out_ptr + first * stride + at, (b_acc * scale).to(out_ptr.dtype.element_ty), m_in)
    else:
        tl.store(partial_ptr + (tl.program_id(1) * num_rows.to(tl.int64) + first) * stride + at, b_acc, m_in)


@triton.jit
def _add_splits(out_ptr, partial_ptr, first, m_row, num_rows, stride, column, o_r, rank, scale, BM: tl.constexpr):
    """Write out = scale * the sum of all splits, for one module's columns of S."""
    at = tl.arange(0, BM)[:, None] * stride + (column + o_r)[None, :]
    m_in = m_row[:, None] & (o_r < rank)[None, :]
    b_sum = tl.load(partial_ptr + first * stride + at, m_in, 0.0, cache_modifier=".cg")
    for i_split in tl.range(1, tl.num_programs(1), num_stages=1):
        b_sum += tl.load(partial_ptr + (i_split * num_rows.to(tl.int64) + first) * stride + at, m_in, 0.0, cache_modifier=".cg")
    tl.store(out_ptr + first * stride + at, (b_sum * scale).to(out_ptr.dtype.element_ty), m_in)


@triton.jit
def _lora_rows(lora, lora_stride, row, o_r, rank, i_rank, i_k, num_inner, BK: tl.constexpr, TMA: tl.constexpr):
    """Return L^T [BK, RANK]: rows row + o_r of L. Those beyond the rank are zero, or with TMA what the tensor holds there."""
    if TMA:
        return lora.load([max(row, 0) + i_rank, i_k]).T
    else:
        o_k = i_k + tl.arange(0, BK)
        at = lora + (row + o_r).to(tl.int64)[None, :] * lora_stride + o_k[:, None]
        return tl.load(at, (o_k < num_inner)[:, None] & (o_r < rank)[None, :], 0.0)


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
    value, lora, out_ptr, partial_ptr, counters_ptr, items_ptr, adapters_ptr, scales_ptr, keys_ptr,
    num_rows, num_inner, split_blocks, value_stride, lora_stride, out_stride, first_feature,
    ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item_ptr = items_ptr + tl.program_id(0) * 6
    first, end, adapter = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    first_row = first.to(tl.int64)
    adapter_ptr = adapters_ptr + adapter * _FIELDS
    rank, column0, row0 = tl.load(adapter_ptr + (2 if WIDE else 0)), 0, tl.load(adapter_ptr + (3 if WIDE else ROW_FIELD))
    if not WIDE:
        column0 = tl.load(adapter_ptr + COLUMN_FIELD)
    column1, column2, row1, row2 = column0, column0, row0, row0
    if MODULES > 1:
        row1, column1 = tl.load(adapter_ptr + ROW_FIELD + 3), tl.load(adapter_ptr + COLUMN_FIELD + 3)
    if MODULES > 2:
        row2, column2 = tl.load(adapter_ptr + ROW_FIELD + 6), tl.load(adapter_ptr + COLUMN_FIELD + 6)
    rank0, rank1, rank2 = tl.where(row0 >= 0, rank, 0), tl.where(row1 >= 0, rank, 0), tl.where(row2 >= 0, rank, 0)
    i_rank = tl.program_id(2) * RANK
    o_r = i_rank + tl.arange(0, RANK)
    first_block = tl.program_id(1) * split_blocks
    end_block = min(first_block + split_blocks, tl.cdiv(num_inner, BK))
    end_block = tl.where(i_rank < rank, end_block, first_block)
    scale = tl.load(scales_ptr + adapter)
    o_row = first + tl.arange(0, BM)
    m_row = o_row < end
    if DROPOUT:
        b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
        threshold = tl.load(adapter_ptr + 1).to(tl.uint32)
    b_acc0 = tl.zeros([BM, RANK], tl.float32)
    if MODULES > 1:
        b_acc1 = tl.zeros([BM, RANK], tl.float32)
    if MODULES > 2:
        b_acc2 = tl.zeros([BM, RANK], tl.float32)
    for i_block in tl.range(first_block, end_block, num_stages=NUM_STAGES):
        i_k = i_block * BK
        o_k = i_k + tl.arange(0, BK)
        if TMA:
            b_v = value.load([first, i_k])
        else:
            at = value + o_row.to(tl.int64)[:, None] * value_stride + o_k[None, :]
            b_v = tl.load(at, m_row[:, None] & (o_k < num_inner)[None, :], 0.0)
        b_v0, b_v1, b_v2 = b_v, b_v, b_v
        if DROPOUT:
            b_hash = hash_bits(b_keys, column_keys(tl.arange(0, BK), first_feature + i_k))
            b_v0 = tl.where(keep(b_hash, threshold, 0), b_v, 0.0)
            if MODULES > 1:
                b_v1 = tl.where(keep(b_hash, threshold, 1), b_v, 0.0)
            if MODULES > 2:
                b_v2 = tl.where(keep(b_hash, threshold, 2), b_v, 0.0)
        b_l0 = _lora_rows(lora, lora_stride, row0, o_r, rank0, i_rank, i_k, num_inner, BK, TMA)
        b_acc0 = tl.dot(b_v0, b_l0, b_acc0, input_precision="ieee")
        if MODULES > 1:
            b_l1 = _lora_rows(lora, lora_stride, row1, o_r, rank1, i_rank, i_k, num_inner, BK, TMA)
            b_acc1 = tl.dot(b_v1, b_l1, b_acc1, input_precision="ieee")
        if MODULES > 2:
            b_l2 = _lora_rows(lora, lora_stride, row2, o_r, rank2, i_rank, i_k, num_inner, BK, TMA)
            b_acc2 = tl.dot(b_v2, b_l2, b_acc2, input_precision="ieee")
    _put(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column0, o_r, rank0, scale, b_acc0, BM)
    if MODULES > 1:
        _put(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column1, o_r, rank1, scale, b_acc1, BM)
    if MODULES > 2:
        _put(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column2, o_r, rank2, scale, b_acc2, BM)
    if tl.num_programs(1) > 1:  # noqa: SIM102  Triton's `and` calls both sides
        if arrive_last(counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1)):
            _add_splits(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column0, o_r, rank0, scale, BM)
            if MODULES > 1:
                _add_splits(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column1, o_r, rank1, scale, BM)
            if MODULES > 2:
                _add_splits(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, column2, o_r, rank2, scale, BM)


def down(x_TK: Tensor, group: LoraGroup, route: Route, config: DownConfig | None = None) -> Tensor:
    """Return S [T, width] in x's dtype; rows and columns that belong to no adapter are not written."""
    s_TR = torch.empty(x_TK.shape[0], group.width, dtype=x_TK.dtype, device=x_TK.device)
    wide = not group.has_dropout
    num_modules = 1 if wide else group.num_modules
    largest_rank = group.width if wide else group.max_padded_rank
    limit = 128 if num_modules == 1 else 64
    _launch(
        x_TK, group.a_RK, s_TR, group, route, 4, 6, num_modules, largest_rank, limit, group.has_dropout, wide, group.first_feature, config
    )
    return s_TR


def down_module(dy_TN: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, module: int, config: DownConfig | None = None) -> None:
    """Write dS = c' dY B of one module into its columns of ds_TR."""
    start, stop = group.columns[module]
    row, column, largest_rank = 5 + 3 * module, 6 + 3 * module, group.max_padded_rank
    _launch(dy_TN[:, start:stop], group.b_RN[module], ds_TR, group, route, row, column, 1, largest_rank, 128, False, False, 0, config)


def _launch(
    value, lora, out, group, route, row_field, column_field, num_modules, largest_rank, limit, dropout, wide, first_feature, config
):
    num_rows, num_inner = value.shape
    rank, tma = rank_class(largest_rank, limit), uses_tma(value, lora)
    config = config or down_config(num_rows, num_inner, rank, num_modules, dropout, value.element_size(), tma)
    num_items, num_ranks = route.num_items(config.rows), triton.cdiv(largest_rank, rank)
    if not num_items:
        return
    num_splits = splits(num_rows, num_inner, config, num_processors(value.device))
    split_blocks = triton.cdiv(num_inner, num_splits * config.inner)
    num_splits = triton.cdiv(num_inner, split_blocks * config.inner)
    partial = torch.empty(num_splits if num_splits > 1 else 0, *out.shape, dtype=torch.float32, device=value.device)
    tensors = (value, lora)
    if tma:
        boxes = ([config.rows, config.inner], [rank, config.inner])
        tensors = tuple(TensorDescriptor.from_tensor(t, box) for t, box in zip(tensors, boxes, strict=True))
    _down_kernel[(num_items, num_splits, num_ranks)](
        *tensors, out, partial, route.counters(num_items * num_ranks), route.items(config.rows), group.adapter_table,
        group.scale_table, route.row_keys,
        num_rows, num_inner, split_blocks, value.stride(0), lora.stride(0), out.stride(0), first_feature,
        ROW_FIELD=row_field, COLUMN_FIELD=column_field, BM=config.rows, BK=config.inner, RANK=rank,
        MODULES=num_modules, DROPOUT=dropout, WIDE=wide, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps, **pdl(value),
    )  # fmt: skip
