"""dA = dS^T (M * X) with dropout, as triton/grad.py, on Hopper: masks are computed in the registers that the tensor cores read.

A program owns one item (some rows of one segment, `Route.items`), a block of columns and RANK columns of S for each module, and keeps its
sums in registers, as dA^T = (M * X)^T dS. One warp fills a ring of blocks of X and dS by TMA. The others read X transposed from there, so
that a register holds one feature of two rows, hash both, and mask a copy for each module. The item's last rows, if they fill no block, are
masked in both operands, since 0 * NaN is NaN. A segment of one item is added to the gradient arena directly; else each item writes its
partial sum in float32, and a second kernel adds them in ascending order.
With AHEAD the sums are computed beside dX's last tiles (early_launch.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import cdiv, num_processors, rank_class
from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, FIRST_A_ROW, LEVEL, LORA_RANK, MODULE_FIELDS, S_COLUMN, S_WIDTH, LoraGroup
from fused_ops.lora.hopper.dropout import drop_rows, half_of, level_of, mix, pair_keys
from fused_ops.lora.hopper.layouts import describe
from fused_ops.lora.hopper.masked import ACC_COLUMNS, ACC_ROWS, LEFT, LEFT_COLUMNS, LEFT_ROWS, RIGHT, RIGHT_ROWS, WARPS, first_ranks, zeros
from fused_ops.lora.hopper.names import async_load
from fused_ops.lora.hopper.ring import release_loaded, ring_barriers
from fused_ops.lora.route import ADAPTER, END, END_ITEM, FIRST, FIRST_ITEM, ITEM_FIELDS, Route

BM, STAGES = gl.constexpr(32), gl.constexpr(8)


@gluon.jit
def _loader(ring, descs, num_blocks, first, i_col, s_cols, BC: gl.constexpr, RANK: gl.constexpr, MODULES: gl.constexpr):
    """Load every block of X, and of dS for each module."""
    x_bufs, s_bufs, full_bars, empty_bars = ring
    x_desc, s_desc = descs
    for i in range(num_blocks):
        stage, i_row = i % STAGES, first + i * BM
        full_bar = full_bars.index(stage)
        mbarrier.wait(empty_bars.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full_bar, (BC + MODULES * RANK) * BM * 2)
        async_load(x_desc, [i_row, i_col], full_bar, x_bufs.index(stage))
        for m in gl.static_range(MODULES):
            async_load(s_desc, [i_row, s_cols[m]], full_bar, s_bufs.index(stage * MODULES + m))


@gluon.jit
def _keys(keys_ptr, i_row, num_rows):
    """Return the row keys of a block, [1, BM]."""
    o_row = min(i_row, num_rows - 1) + gl.arange(0, BM, LEFT_COLUMNS)
    return gl.expand_dims(gl.load(keys_ptr + o_row, o_row < num_rows, 0).to(gl.uint32, bitcast=True), 0)


@gluon.jit
def _add_block(ring, i, b_accs, b_keys, b_pairs, halves, level, i_row, end, MODULES: gl.constexpr, MASKED: gl.constexpr):
    """Return the accumulators [BC, RANK] plus the products of the program's block i; MASKED where it may go beyond the item's end."""
    x_bufs, s_bufs, full_bars, empty_bars = ring
    stage = i % STAGES
    b_hash = mix(b_keys, b_pairs)
    mbarrier.wait(full_bars.index(stage), (i // STAGES) & 1)
    b_x = x_bufs.index(stage).permute((1, 0)).load(LEFT)
    if MASKED:
        b_x = gl.where(gl.expand_dims(i_row + gl.arange(0, BM, LEFT_COLUMNS) < end, 0), b_x, 0.0)
    b_sums = ()
    for m in gl.static_range(MODULES):
        b_s = s_bufs.index(stage * MODULES + m).load(RIGHT)
        if MASKED:
            b_s = gl.where(gl.expand_dims(i_row + gl.arange(0, BM, RIGHT_ROWS) < end, 1), b_s, 0.0)
        b_sums += (mma_v2(drop_rows(b_x, b_hash, level, halves, m), b_s, b_accs[m]),)
    release_loaded(empty_bars.index(stage))
    return b_sums


@gluon.jit
def _put(
    grad_ptr, partial_ptr, i_item, alone, width, a_row, s_col, rank, i_rank, i_col, num_cols, b_acc, BC: gl.constexpr, RANK: gl.constexpr
):
    """Add a segment's only item to grad [row + r, column]; write one of several to partial [item, column of S + r, column]."""
    o_col, o_r = i_col + gl.arange(0, BC, ACC_ROWS), i_rank + gl.arange(0, RANK, ACC_COLUMNS)
    m_in = gl.expand_dims(o_col < num_cols, 1) & gl.expand_dims(o_r < rank, 0)
    at = gl.expand_dims(o_r.to(gl.int64), 0) * num_cols + gl.expand_dims(o_col, 1)
    if alone:
        grad_at = grad_ptr + a_row.to(gl.int64) * num_cols + at
        gl.store(grad_at, gl.load(grad_at, m_in, 0.0, cache_modifier=".cg") + b_acc, m_in)
    else:
        gl.store(partial_ptr + (i_item * width.to(gl.int64) + s_col) * num_cols + at, b_acc, m_in)


@gluon.jit
def _multiplier(
    ring, grad_ptr, partial_ptr, item_ptr, adapter_ptr, keys_ptr, num_rows, num_cols, width, first_feature, first, end, i_col, i_rank,
    BC: gl.constexpr, RANK: gl.constexpr, MODULES: gl.constexpr, PDL: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Multiply every block, and add or write the sums."""
    rank, level = gl.load(adapter_ptr + LORA_RANK), level_of(gl.load(adapter_ptr + LEVEL))
    o_feature = gl.arange(0, BC, LEFT_ROWS)
    b_pairs = gl.expand_dims(pair_keys(first_feature + i_col + o_feature), 1)
    halves = gl.expand_dims(half_of(o_feature), 1)
    num_full, num_blocks = (end - first) // BM, gl.cdiv(end - first, BM)
    b_accs = zeros(MODULES, BC, RANK)
    b_keys = _keys(keys_ptr, first, num_rows)
    for i in range(num_full):
        i_row = first + i * BM
        b_next = _keys(keys_ptr, i_row + BM, num_rows)
        b_accs = _add_block(ring, i, b_accs, b_keys, b_pairs, halves, level, i_row, end, MODULES, MASKED=False)
        b_keys = b_next
    for i in range(num_full, num_blocks):
        i_row = first + i * BM
        b_last = _keys(keys_ptr, i_row, num_rows)
        b_accs = _add_block(ring, i, b_accs, b_last, b_pairs, halves, level, i_row, end, MODULES, MASKED=True)
    alone = gl.load(item_ptr + END_ITEM) - gl.load(item_ptr + FIRST_ITEM) == 1
    if PDL and AHEAD:
        # No other kernel uses the gradients, so that a segment's only item is added now; the last program waits for all.
        is_last = (gl.program_id(0) == gl.num_programs(0) - 1) & (gl.program_id(1) == gl.num_programs(1) - 1)
        if (not alone) | is_last:
            gdc_wait()
    for m in gl.static_range(MODULES):
        module_ptr = adapter_ptr + m * MODULE_FIELDS
        a_row, s_col = gl.load(module_ptr + A_ROW), gl.load(module_ptr + S_COLUMN)
        ranks = gl.where((s_col >= 0) & (first < end), rank, 0)
        _put(
            grad_ptr, partial_ptr, gl.program_id(1), alone, width, a_row, s_col, ranks, i_rank, i_col, num_cols, b_accs[m], BC, RANK
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "width", "first_feature"])
def _hopper_rows_kernel(
    x_desc, s_desc, grad_ptr, partial_ptr, items_ptr, adapters_ptr, keys_ptr, num_rows, num_cols, width, first_feature,
    BC: gl.constexpr, RANK: gl.constexpr, MODULES: gl.constexpr, PDL: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BC], x_desc.layout)
    s_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * MODULES, BM, RANK], s_desc.layout)
    full_bars, empty_bars = ring_barriers(STAGES, 1)
    ring = (x_bufs, s_bufs, full_bars, empty_bars)
    if PDL and not AHEAD:
        gdc_wait()
        gdc_launch_dependents()

    item_ptr = items_ptr + gl.program_id(1) * ITEM_FIELDS
    first, end, adapter = gl.load(item_ptr + FIRST), gl.load(item_ptr + END), gl.load(item_ptr + ADAPTER)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    i_col, i_rank = gl.program_id(0) * BC, gl.program_id(2) * RANK
    end = gl.where(i_rank < gl.load(adapter_ptr + LORA_RANK), end, first)
    s_cols = first_ranks(adapter_ptr, i_rank, S_COLUMN, MODULES)
    gl.warp_specialize(
        [
            (_multiplier, (
                ring, grad_ptr, partial_ptr, item_ptr, adapter_ptr, keys_ptr, num_rows, num_cols, width, first_feature,
                first, end, i_col, i_rank, BC, RANK, MODULES, PDL, AHEAD,
            )),
            (_loader, (ring, (x_desc, s_desc), gl.cdiv(end - first, BM), first, i_col, s_cols, BC, RANK, MODULES)),
        ], [1], [24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["width"])
def _add_items_kernel(
    grad_ptr, partial_ptr, items_ptr, adapters_ptr, num_cols, width, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """grad [first A row + c, column] += the sum over a segment's items of partial [item, c, column], in ascending order; c: of S."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item_ptr = items_ptr + tl.program_id(1) * ITEM_FIELDS
    adapter_ptr = adapters_ptr + tl.load(item_ptr + ADAPTER) * ADAPTER_FIELDS
    i_low, i_high = tl.load(item_ptr + FIRST_ITEM), tl.load(item_ptr + END_ITEM)
    if (tl.program_id(1) == i_low) & (i_high - i_low > 1):
        o_r, o_col = tl.program_id(2) * RANKS + tl.arange(0, RANKS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        m_in = (o_r < tl.load(adapter_ptr + S_WIDTH))[:, None] & (o_col < num_cols)[None, :]
        at = o_r.to(tl.int64)[:, None] * num_cols + o_col[None, :]
        b_sum = tl.zeros([RANKS, COLUMNS], tl.float32)
        for i_item in tl.range(i_low, i_high, num_stages=1):
            b_sum += tl.load(partial_ptr + i_item * width.to(tl.int64) * num_cols + at, m_in, 0.0)
        grad_at = grad_ptr + tl.load(adapter_ptr + FIRST_A_ROW).to(tl.int64) * num_cols + at
        tl.store(grad_at, tl.load(grad_at, m_in, 0.0) + b_sum, m_in)


def hopper_grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, after_dx: bool = False) -> None:
    """Add dA into the group's gradients, as triton/grad.py's grad_a: for X [T, K] and dS [T, width] that `suits_hopper`, and dropout."""
    num_rows, num_cols = x_TK.shape
    modules, width = group.num_modules, group.width
    rank = rank_class(group.max_padded_rank, 64 if modules == 1 else 32)
    columns = 128 if modules * rank <= 64 else 64
    num_blocks, num_ranks = cdiv(num_cols, columns), cdiv(group.max_padded_rank, rank)
    rows = route.item_rows(num_blocks, 2 * num_processors(x_TK.device))
    num_items = route.num_items(rows)
    if not num_items:
        return
    several = num_items > len(route.segments)
    partial = torch.empty(num_items if several else 0, width, num_cols, dtype=torch.float32, device=x_TK.device)
    _hopper_rows_kernel[(num_blocks, num_items, num_ranks)](
        describe(x_TK, BM.value, columns), describe(ds_TR, BM.value, rank),
        group.grad_a_RK, partial, route.items(rows), group.adapter_table, route.row_keys, num_rows, num_cols, width, group.first_feature,
        BC=columns, RANK=rank, MODULES=modules, num_warps=WARPS.value, maxnreg=128, **pdl(x_TK), AHEAD=after_dx,
    )  # fmt: skip
    if several:
        _add_items_kernel[(cdiv(num_cols, 256), num_items, cdiv(width, 16))](
            group.grad_a_RK, partial, route.items(rows), group.adapter_table, num_cols, width,
            COLUMNS=256, RANKS=16, num_warps=4, **pdl(x_TK),
        )  # fmt: skip
