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

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import cdiv, num_processors, rank_class, uses_tma
from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, B_ROW, LEVEL, LORA_RANK, S_WIDTH, LoraGroup
from fused_ops.lora.route import ADAPTER, END, FIRST, ITEM_FIELDS, Route
from fused_ops.lora.term import LoraTerm, term_of_a, term_of_module
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.parts import arrive_last, described, module_fields, zeros
from fused_ops.lora.triton.skinny_config import down_config, splits


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


@triton.jit(do_not_specialize=["first_feature", "num_rows", "split_blocks", "out_stride"])
def _down_kernel(
    value, lora, out_ptr, partial_ptr, counters_ptr, items_ptr, adapters_ptr, scales_ptr, keys_ptr,
    num_rows, num_inner, split_blocks, value_stride, lora_stride, out_stride, first_feature,
    ROW_FIELD: tl.constexpr, MODULE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
    MODULES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, NUM_STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item_ptr = items_ptr + tl.program_id(0) * ITEM_FIELDS
    first, end, adapter = tl.load(item_ptr + FIRST), tl.load(item_ptr + END), tl.load(item_ptr + ADAPTER)
    first_row = first.to(tl.int64)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    rank = tl.load(adapter_ptr + (S_WIDTH if WIDE else LORA_RANK))
    rows, columns, ranks = module_fields(adapter_ptr, rank, ROW_FIELD, MODULE, MODULES, WIDE)
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
        level = tl.load(adapter_ptr + LEVEL).to(tl.uint32)
    b_accs = zeros(MODULES, BM, RANK)
    for i_block in tl.range(first_block, end_block, num_stages=NUM_STAGES):
        i_k = i_block * BK
        o_k = i_k + tl.arange(0, BK)
        if TMA:
            b_v = value.load([first, i_k])
        else:
            at = value + o_row.to(tl.int64)[:, None] * value_stride + o_k[None, :]
            b_v = tl.load(at, m_row[:, None] & (o_k < num_inner)[None, :], 0.0)
        if DROPOUT:
            b_hash = hash_bits(b_keys, column_keys(tl.arange(0, BK), first_feature + i_k))
        b_kept, b_sums = (), ()
        for m in tl.static_range(MODULES):
            b_kept += (tl.where(keep(b_hash, level, m), b_v, 0.0) if DROPOUT else b_v,)
        for m in tl.static_range(MODULES):
            b_l = _lora_rows(lora, lora_stride, rows[m], o_r, ranks[m], i_rank, i_k, num_inner, BK, TMA)
            b_sums += (tl.dot(b_kept[m], b_l, b_accs[m], input_precision="ieee"),)
        b_accs = b_sums
    for m in tl.static_range(MODULES):
        _put(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, columns[m], o_r, ranks[m], scale, b_accs[m], BM)
    if tl.num_programs(1) > 1:  # noqa: SIM102  Triton's `and` calls both sides
        if arrive_last(counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1)):
            for m in tl.static_range(MODULES):
                _add_splits(out_ptr, partial_ptr, first_row, m_row, num_rows, out_stride, columns[m], o_r, ranks[m], scale, BM)


def down(x_TK: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return S [T, width] in x's dtype; rows and columns that belong to no adapter are not written."""
    s_TR = torch.empty(x_TK.shape[0], group.width, dtype=x_TK.dtype, device=x_TK.device)
    _launch(x_TK, s_TR, group, route, term_of_a(group), A_ROW.value)
    return s_TR


def down_module(dy_TN: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, module: int) -> None:
    """Write dS = c' dY B of one module into its columns of ds_TR."""
    _launch(dy_TN[:, slice(*group.columns[module])], ds_TR, group, route, term_of_module(group, module), B_ROW.value)


def _launch(value: Tensor, out: Tensor, group: LoraGroup, route: Route, term: LoraTerm, row_field: int) -> None:
    (lora,), (num_rows, num_inner) = term.factors, value.shape
    rank, tma = rank_class(term.width, 128 if term.num_modules == 1 else 64), uses_tma(value, lora)
    config = down_config(rank, term.num_modules, term.dropout, value.element_size(), tma)
    num_items, num_ranks = route.num_items(config.rows), cdiv(term.width, rank)
    if not num_items:
        return
    num_splits = splits(num_rows, num_inner, config, num_processors(value.device))
    split_blocks = cdiv(num_inner, num_splits * config.inner)
    num_splits = cdiv(num_inner, split_blocks * config.inner)
    partial = torch.empty(num_splits if num_splits > 1 else 0, *out.shape, dtype=torch.float32, device=value.device)
    _down_kernel[(num_items, num_splits, num_ranks)](
        *described(tma, (value, config.rows, config.inner), (lora, rank, config.inner)), out, partial,
        route.counters(num_items * num_ranks), route.items(config.rows), group.adapter_table, group.scale_table, route.row_keys,
        num_rows, num_inner, split_blocks, value.stride(0), lora.stride(0), out.stride(0), group.first_feature,
        ROW_FIELD=row_field, MODULE=term.first_module, BM=config.rows, BK=config.inner, RANK=rank,
        MODULES=term.num_modules, DROPOUT=term.dropout, WIDE=term.wide, NUM_STAGES=config.stages, TMA=tma,
        num_warps=config.warps, **pdl(value),
    )  # fmt: skip
