"""What follows one read of dY, on every GPU: dS from its shares; and on Hopper dB from the partial sums of segments of several items.

The kernels before (both grad_sb.py) cut the columns of the modules into blocks. Each block has a share of dS, float32 [T, ranks], and each
item of a segment of several a partial sum of dB, float32 [ranks, columns of all blocks]. Both are added in ascending order.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import cdiv, num_processors, rank_class
from fused_ops.lora.adapters import ADAPTER_FIELDS, B_ROW, LORA_RANK, MODULE_FIELDS, S_COLUMN, LoraGroup
from fused_ops.lora.route import ADAPTER, END, END_ITEM, FIRST, FIRST_ITEM, ITEM_FIELDS, Route

SUM_ROWS, SUM_COLUMNS, SUM_RANKS = 32, 128, 16  # of a program: rows of dS; columns and ranks of dB


@triton.jit
def _sum(ptr, step, low, high, m_in, b_sum, AT_ONCE: tl.constexpr):
    """Return b_sum plus the blocks low to high at ptr, a step apart, in ascending order; AT_ONCE loads at a time."""
    for i in tl.range(low, high, AT_ONCE, num_stages=1):
        blocks = ()
        for j in tl.static_range(AT_ONCE):
            m_here = tl.full(b_sum.shape, i + j, tl.int32) < high  # a block: the interpreter makes no mask of a scalar
            blocks += (tl.load(ptr + (i + j) * step, m_in & m_here, 0.0),)
        for j in tl.static_range(AT_ONCE):
            b_sum += blocks[j]
    return b_sum


@triton.jit
def _sum_shares(
    i, ds_ptr, share_ptr, items_ptr, adapters_ptr, scales_ptr, ends, num_rows, width,
    BM: tl.constexpr, RANK: tl.constexpr, MODULES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dS [rows, S column + r] = c' times the sum of the shares of one module's blocks of columns."""
    item_ptr, i_module = items_ptr + i // MODULES * ITEM_FIELDS, i % MODULES
    first, end, adapter = tl.load(item_ptr + FIRST), tl.load(item_ptr + END), tl.load(item_ptr + ADAPTER)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    rank, s_col = tl.load(adapter_ptr + LORA_RANK), tl.load(adapter_ptr + S_COLUMN + i_module * MODULE_FIELDS)
    low, high = 0, ends[0]
    for m in tl.static_range(1, MODULES):
        low, high = tl.where(i_module == m, ends[m - 1], low), tl.where(i_module == m, ends[m], high)
    o_row, o_r = first + tl.arange(0, BM), tl.arange(0, RANK)
    m_in = (o_row < end)[:, None] & (o_r < tl.multiple_of(rank, 16))[None, :]
    if s_col >= 0:
        share_at = share_ptr + o_row.to(tl.int64)[:, None] * RANK + o_r[None, :]
        b_ds = _sum(share_at, num_rows.to(tl.int64) * RANK, low, high, m_in, tl.zeros([BM, RANK], tl.float32), AT_ONCE)
        ds_at = ds_ptr + o_row.to(tl.int64)[:, None] * tl.multiple_of(width, 16) + (tl.multiple_of(s_col, 16) + o_r)[None, :]
        tl.store(ds_at, (b_ds * tl.load(scales_ptr + adapter)).to(ds_ptr.dtype.element_ty), m_in)


@triton.jit
def _add_partials(
    i, grad_ptrs, partial_ptr, items_ptr, adapters_ptr, sizes, ends,
    COLUMNS: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, MODULES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [B row + r, column] += the sum over a segment's several items of partial [item, r, column of all modules' blocks]."""
    stride = ends[MODULES - 1] * BLOCK
    num_chunks = stride // COLUMNS * (RANK // RANKS)
    i_item, i_chunk = i // num_chunks, i % num_chunks
    item_ptr = items_ptr + i_item * ITEM_FIELDS
    adapter_ptr = adapters_ptr + tl.load(item_ptr + ADAPTER) * ADAPTER_FIELDS
    low, high = tl.load(item_ptr + FIRST_ITEM), tl.load(item_ptr + END_ITEM)
    o_partial, i_rank = i_chunk // (RANK // RANKS) * COLUMNS, i_chunk % (RANK // RANKS) * RANKS
    grad_ptr, b_row, i_col, num_cols = grad_ptrs[0], tl.load(adapter_ptr + B_ROW), o_partial, sizes[0]
    for m in tl.static_range(1, MODULES):
        if o_partial >= ends[m - 1] * BLOCK:
            grad_ptr, b_row = grad_ptrs[m], tl.load(adapter_ptr + B_ROW + m * MODULE_FIELDS)
            i_col, num_cols = o_partial - ends[m - 1] * BLOCK, sizes[m]
    if (i_item == low) & (high - low > 1) & (b_row >= 0) & (i_rank < tl.load(adapter_ptr + LORA_RANK)):
        o_r, o_col = i_rank + tl.arange(0, RANKS).to(tl.int64)[:, None], tl.arange(0, COLUMNS)[None, :]
        m_in = tl.broadcast_to(i_col + o_col < num_cols, [RANKS, COLUMNS])
        grad_at = grad_ptr + b_row.to(tl.int64) * num_cols + o_r * num_cols + i_col + o_col
        b_grad = tl.load(grad_at, m_in, 0.0)
        at = partial_ptr + o_r * stride + o_partial + o_col
        b_sum = _sum(at, stride.to(tl.int64) * RANK, low, high, m_in, tl.zeros([RANKS, COLUMNS], tl.float32), 4)
        tl.store(grad_at, b_grad + b_sum, m_in)


@triton.jit(do_not_specialize=["num_sums", "num_rows", "width"])
def _finish_kernel(
    ds_ptr, grad_ptrs, share_ptr, partial_ptr, sum_items_ptr, items_ptr, adapters_ptr, scales_ptr, sizes, ends, num_sums, num_rows, width,
    BM: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, MODULES: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first num_sums programs make dS, further ones add the partial sums of dB to the gradients."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0)
    if i < num_sums:
        _sum_shares(
            i, ds_ptr, share_ptr, sum_items_ptr, adapters_ptr, scales_ptr, ends, num_rows, width, BM, RANK, MODULES, AT_ONCE
        )  # fmt: skip
    else:
        _add_partials(i - num_sums, grad_ptrs, partial_ptr, items_ptr, adapters_ptr, sizes, ends, COLUMNS, RANKS, RANK, MODULES, BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """How dY is cut: ranks of the kernels, columns of each module, blocks before the end of each, items; and room for what is summed."""

    block: int
    rank: int
    sizes: tuple[int, ...]
    ends: tuple[int, ...]
    item_rows: int
    num_items: int
    shares: Tensor
    partials: Tensor  # of no item, where every segment has but one


def make_sums(dy_TN: Tensor, group: LoraGroup, route: Route, block: int) -> Sums:
    """Return how to cut dY [T, N] into items and blocks of `block` columns."""
    sizes, rank, empty = tuple(stop - start for start, stop in group.columns), rank_class(group.max_padded_rank), dy_TN.new_empty
    ends = tuple(accumulate(cdiv(size, block) for size in sizes))
    item_rows = route.item_rows(ends[-1], num_processors(dy_TN.device))
    num_items = route.num_items(item_rows)
    several = num_items if num_items > len(route.segments) else 0
    shares, partials = (empty(*n, dtype=torch.float32) for n in ((ends[-1], len(dy_TN), rank), (several, rank, ends[-1] * block)))
    return Sums(
        block=block, rank=rank, sizes=sizes, ends=ends, item_rows=item_rows, num_items=num_items, shares=shares, partials=partials
    )  # fmt: skip


def finish(sums: Sums, ds_TR: Tensor, group: LoraGroup, route: Route, partials: bool = False) -> None:
    """Write dS, and with `partials` add those of dB to the group's gradients."""
    num_sums = route.num_items(SUM_ROWS) * group.num_modules
    num_chunks = len(sums.partials) * (sums.ends[-1] * sums.block // SUM_COLUMNS) * (sums.rank // SUM_RANKS) if partials else 0
    _finish_kernel[(num_sums + num_chunks,)](
        ds_TR, group.grad_b_RN, sums.shares, sums.partials, route.items(SUM_ROWS), route.items(sums.item_rows), group.adapter_table,
        group.scale_table, sums.sizes, sums.ends, num_sums, len(ds_TR), group.width,
        BM=SUM_ROWS, COLUMNS=SUM_COLUMNS, RANKS=SUM_RANKS, RANK=sums.rank, MODULES=group.num_modules, BLOCK=sums.block,
        AT_ONCE=8 if sums.rank == 16 else 4, num_warps=4, **pdl(ds_TR),
    )  # fmt: skip
