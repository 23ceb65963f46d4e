"""dS = c' dY B and dB = dY^T S from one read of dY, as triton/grad_sb.py, on Hopper, for ranks up to 64.

A program owns one item (some rows of one segment, `Route.items`) and two blocks of 256 columns of one module, and holds their B in shared
memory. One warp fills a ring of tiles of dY [64, 256] by TMA, with the rows' S beside the first tile of a row block. The other warp groups
compute both products of a tile from there:

    ds [64, ranks]    = sum over both tiles of dY B^T    this program's share of dS, written in float32, the adapter's own ranks alone
    db [256, ranks]  += dY^T S                           of each tile, in registers until the item ends

Up to rank 32 one warp group does all. Rank 64 takes two: each keeps db of its own tile, and half the ranks of ds, so that a share
still covers 512 columns. The last rows of an item, if they fill no block, are masked in shared memory in both operands of dB, since
0 * NaN is NaN. Columns beyond the module's meet zeros of B; ranks beyond the adapter's are computed and not written. A segment of one item
is added to the gradient arena directly; else each item writes its partial sum. A second kernel adds the shares of dS and the partial
sums of dB, each in ascending order.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import num_processors, rank_class
from fused_ops.lora.adapters import ADAPTER_FIELDS, LoraGroup
from fused_ops.lora.hopper.layouts import describe
from fused_ops.lora.hopper.names import async_load, thread_barrier
from fused_ops.lora.hopper.ring import ring_barriers
from fused_ops.lora.route import Route
from fused_ops.lora.triton.skinny_config import item_rows

MAX_HOPPER_RANK = 64
BM, BC, WARPS = gl.constexpr(64), gl.constexpr(256), gl.constexpr(4)  # rows and columns of a tile of dY, warps of a group
TILES = {16: 6, 32: 5, 64: 4}  # of the ring, by ranks: what 227 KB of shared memory hold beside B
SUM_ROWS, SUM_COLUMNS, SUM_RANKS = 32, 128, 16  # of a program of the second kernel: rows of dS; columns and ranks of dB
_FIELDS, _FIELDS_TL = gl.constexpr(ADAPTER_FIELDS), tl.constexpr(ADAPTER_FIELDS)
_BLOCK = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS.value, 1], [1, 0]))  # of B and dY between registers and shared memory
_BLOCK_ROWS, _BLOCK_COLUMNS = gl.constexpr(gl.SliceLayout(1, _BLOCK.value)), gl.constexpr(gl.SliceLayout(0, _BLOCK.value))


@gluon.jit
def _loader(ring, dy_desc, s_desc, extent, RANK: gl.constexpr, STAGES: gl.constexpr):
    """Load both tiles of every block of rows, and S with the first."""
    dy_bufs, s_bufs, full_bars, empty_bars = ring
    num_blocks, first, i_col, s_col = extent
    for i in range(num_blocks):
        i_row = first + i * BM
        for tile in gl.static_range(2):
            step = 2 * i + tile
            full_bar = full_bars.index(step % STAGES)
            mbarrier.wait(empty_bars.index(step % STAGES), ((step // STAGES) & 1) ^ 1)
            if tile == 0:  # a block's tiles are released together: when this stage is empty, so is its buffer of S
                mbarrier.expect(full_bar, (BC + RANK) * BM * 2)
                async_load(s_desc, [i_row, s_col], full_bar, s_bufs.index(i % ((STAGES + 1) // 2)))
            else:
                mbarrier.expect(full_bar, BC * BM * 2)
            async_load(dy_desc, [i_row, i_col + tile * BC], full_bar, dy_bufs.index(step % STAGES))


@gluon.jit
def _load_b(b_bufs, b_ptr, i_col, num_cols, rank, RANKS: gl.constexpr, GROUP: gl.constexpr):
    """Copy this group's ranks of B, of both tiles' columns, to shared memory; zeros beyond the adapter's ranks and the module's columns."""
    o_r, o_col = GROUP * RANKS + gl.arange(0, RANKS, _BLOCK_ROWS), i_col + gl.arange(0, BC, _BLOCK_COLUMNS)
    m_r, at = gl.expand_dims(o_r < rank, 1), gl.expand_dims(o_r.to(gl.int64), 1) * num_cols + gl.expand_dims(o_col, 0)
    b_b0 = gl.load(b_ptr + at, m_r & gl.expand_dims(o_col < num_cols, 0), 0.0)
    b_b1 = gl.load(b_ptr + at + BC, m_r & gl.expand_dims(o_col + BC < num_cols, 0), 0.0)
    b_bufs.index(2 * GROUP).store(b_b0)
    b_bufs.index(2 * GROUP + 1).store(b_b1)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _keep_rows(buf, num_rows, COLUMNS: gl.constexpr):
    """Put zeros into the rows of a block [BM, COLUMNS] in shared memory beyond its first num_rows, some columns at a time."""
    m_row = gl.expand_dims(gl.arange(0, BM, _BLOCK_ROWS) < num_rows, 1)
    for i in gl.static_range(0, COLUMNS, 64):
        part = buf.slice(i, min(COLUMNS, 64), dim=1)
        part.store(gl.where(m_row, part.load(_BLOCK), 0.0))


@gluon.jit
def _add_rows(
    ring, b_bufs, share_ptr, b_db0, b_db1, i, i_row, end, rank,
    RANK: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Return this group's sums of dB plus the products of block i of the rows, and write their share of dS.

    MASKED where the block may go beyond the item's end. Two groups may then both mask S: they write the same.
    """
    dy_bufs, s_bufs, full_bars, empty_bars = ring
    RANKS: gl.constexpr = RANK // GROUPS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, RANKS, 16])
    s_buf = s_bufs.index(i % ((STAGES + 1) // 2))
    b_ds = gl.zeros([BM, RANKS], gl.float32, LAYOUT)
    for tile in gl.static_range(2):
        step = 2 * i + tile
        dy_buf = dy_bufs.index(step % STAGES)
        mbarrier.wait(full_bars.index(step % STAGES), (step // STAGES) & 1)
        if MASKED:  # it is the last block: nothing more is loaded into these buffers
            if tile == 0:
                _keep_rows(s_buf, end - i_row, RANK)
            if GROUPS == 1 or tile == GROUP:
                _keep_rows(dy_buf, end - i_row, BC)
            fence_async_shared()
            thread_barrier()
        b_ds = warpgroup_mma(dy_buf, b_bufs.index(2 * GROUP + tile).permute((1, 0)), b_ds, is_async=True)
        if tile == GROUP:
            b_db0 = warpgroup_mma(dy_buf.permute((1, 0)), s_buf, b_db0, is_async=True)
        elif GROUPS == 1:
            b_db1 = warpgroup_mma(dy_buf.permute((1, 0)), s_buf, b_db1, is_async=True)
    if GROUPS == 1:
        b_ds, b_db0, b_db1 = warpgroup_mma_wait(0, [b_ds, b_db0, b_db1])
    else:
        b_ds, b_db0 = warpgroup_mma_wait(0, [b_ds, b_db0])
    mbarrier.arrive(empty_bars.index((2 * i) % STAGES), count=1)
    mbarrier.arrive(empty_bars.index((2 * i + 1) % STAGES), count=1)
    o_row, o_r = i_row + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)), GROUP * RANKS + gl.arange(0, RANKS, gl.SliceLayout(0, LAYOUT))
    m_in = gl.expand_dims(o_r < rank, 0)
    if MASKED:
        m_in = gl.expand_dims(o_row < end, 1) & m_in
    gl.store(share_ptr + gl.expand_dims(o_row.to(gl.int64), 1) * RANK + gl.expand_dims(o_r, 0), b_ds, m_in)
    return b_db0, b_db1


@gluon.jit
def _put(grad_ptr, partial_ptr, alone, partial_stride, i_col, num_cols, i_rank, rank, b_db, RANKS: gl.constexpr):
    """Add a segment's only item to grad [r, column]; write one of several to partial [r, column], whose columns begin at this block.

    At most 16 ranks at a time, for want of registers.
    """
    if RANKS > 16:
        HALF: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, RANKS // 2, 16])
        lower, upper = gl.split(gl.permute(gl.reshape(b_db, [BC, 2, RANKS // 2]), [0, 2, 1]))
        lower, upper = gl.convert_layout(lower, HALF, assert_trivial=True), gl.convert_layout(upper, HALF, assert_trivial=True)
        _put(grad_ptr, partial_ptr, alone, partial_stride, i_col, num_cols, i_rank, rank, lower, RANKS // 2)
        _put(grad_ptr, partial_ptr, alone, partial_stride, i_col, num_cols, i_rank + RANKS // 2, rank, upper, RANKS // 2)
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, RANKS, 16])
        o_col, o_r = gl.arange(0, BC, gl.SliceLayout(1, LAYOUT)), i_rank + gl.arange(0, RANKS, gl.SliceLayout(0, LAYOUT))
        m_in = gl.expand_dims(i_col + o_col < num_cols, 1) & gl.expand_dims(o_r < rank, 0)
        o_col, o_r = gl.expand_dims(o_col, 1), gl.expand_dims(o_r.to(gl.int64), 0)
        if alone:
            grad_at = grad_ptr + (o_r * num_cols + i_col + o_col)
            gl.store(grad_at, gl.load(grad_at, m_in, 0.0) + b_db, m_in)
        else:
            gl.store(partial_ptr + (o_r * partial_stride + o_col), b_db, m_in)


@gluon.jit
def _multiplier(common, RANK: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Multiply every block of the item's rows, and add or write the sums of dB."""
    ring, b_bufs, b_ptr, grad_ptr, share_ptr, partial_ptr, alone, partial_stride, first, end, rank, i_col, num_cols = common
    RANKS: gl.constexpr = RANK // GROUPS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, RANK, 16])
    _load_b(b_bufs, b_ptr, i_col, num_cols, rank, RANKS, GROUP)
    b_db0 = gl.zeros([BC, RANK], gl.float32, LAYOUT)
    b_db1 = b_db0
    num_full, num_blocks = (end - first) // BM, gl.cdiv(end - first, BM)
    for i in range(num_full):
        b_db0, b_db1 = _add_rows(
            ring, b_bufs, share_ptr, b_db0, b_db1, i, first + i * BM, end, rank, RANK, STAGES, GROUPS, GROUP, MASKED=False
        )
    if num_full < num_blocks:
        i_row = first + num_full * BM
        b_db0, b_db1 = _add_rows(
            ring, b_bufs, share_ptr, b_db0, b_db1, num_full, i_row, end, rank, RANK, STAGES, GROUPS, GROUP, MASKED=True
        )
    for tile in gl.static_range(2 // GROUPS):
        b_db = b_db0 if tile == 0 else b_db1
        o_col = (GROUP + tile) * BC
        _put(grad_ptr, partial_ptr + o_col, alone, partial_stride, i_col + o_col, num_cols, 0, rank, b_db, RANK)


@gluon.jit
def _of_module(values, i_module, MODULES: gl.constexpr):
    """Return the value of a module."""
    found = values[0]
    for m in gl.static_range(1, MODULES):
        found = gl.where(i_module >= m, values[m], found)
    return found


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_grad_sb_kernel(
    dy_desc, s_desc, b_ptrs, grad_ptrs, share_ptr, partial_ptr, items_ptr, adapters_ptr, starts, sizes, ends, num_rows,
    MODULES: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    dy_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BC], dy_desc.layout)
    s_bufs = gl.allocate_shared_memory(gl.bfloat16, [(STAGES + 1) // 2, BM, RANK], s_desc.layout)
    B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RANK // GROUPS, BC], gl.bfloat16)
    b_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * GROUPS, RANK // GROUPS, BC], B_LAYOUT)
    full_bars, empty_bars = ring_barriers(STAGES, GROUPS)
    ring = (dy_bufs, s_bufs, full_bars, empty_bars)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    i_block, i_item = gl.program_id(0), gl.program_id(1)
    item_ptr = items_ptr + i_item * 6
    first, end, adapter = gl.load(item_ptr), gl.load(item_ptr + 1), gl.load(item_ptr + 2)
    alone = gl.load(item_ptr + 5) - gl.load(item_ptr + 4) == 1
    # Which module these columns belong to: module m has the blocks from ends[m - 1] to ends[m].
    i_module, i_first = 0, 0
    for m in gl.static_range(1, MODULES):
        i_module, i_first = gl.where(i_block >= ends[m - 1], m, i_module), gl.where(i_block >= ends[m - 1], ends[m - 1], i_first)
    i_col, num_cols = (i_block - i_first) * (2 * BC), _of_module(sizes, i_module, MODULES)
    adapter_ptr = adapters_ptr + adapter * _FIELDS
    rank = gl.multiple_of(gl.load(adapter_ptr), 16)
    b_row, s_col = gl.load(adapter_ptr + 5 + 3 * i_module), gl.load(adapter_ptr + 6 + 3 * i_module)
    # An adapter that does not target the module has no rows here and writes nothing.
    rank, end = gl.where(b_row >= 0, rank, 0), gl.where(b_row >= 0, end, first)
    b_offset = b_row.to(gl.int64) * num_cols
    b_ptr, grad_ptr = _of_module(b_ptrs, i_module, MODULES) + b_offset, _of_module(grad_ptrs, i_module, MODULES) + b_offset
    partial_stride = gl.num_programs(0) * (2 * BC)
    partial_ptr += (i_item * RANK).to(gl.int64) * partial_stride + i_block * (2 * BC)
    share_ptr += i_block * num_rows.to(gl.int64) * RANK
    common = (ring, b_bufs, b_ptr, grad_ptr, share_ptr, partial_ptr, alone, partial_stride, first, end, rank, i_col, num_cols)
    i_dy = _of_module(starts, i_module, MODULES) + i_col
    extent = (gl.cdiv(end - first, BM), first, i_dy, s_col)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiplier, (common, RANK, STAGES, GROUPS, 0)),
                (_loader, (ring, dy_desc, s_desc, extent, RANK, STAGES)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiplier, (common, RANK, STAGES, GROUPS, 0)),
                (_multiplier, (common, RANK, STAGES, GROUPS, 1)),
                (_loader, (ring, dy_desc, s_desc, extent, RANK, STAGES)),
            ],
            [WARPS, 1],
            [240, 24],
        )


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
    item_ptr, i_module = items_ptr + i // MODULES * 6, i % MODULES
    first, end, adapter = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    rank, s_col = tl.load(adapters_ptr + adapter * _FIELDS_TL), tl.load(adapters_ptr + adapter * _FIELDS_TL + 6 + 3 * i_module)
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
    item_ptr = items_ptr + i_item * 6
    adapter_ptr = adapters_ptr + tl.load(item_ptr + 2) * _FIELDS_TL
    low, high = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    o_partial, i_rank = i_chunk // (RANK // RANKS) * COLUMNS, i_chunk % (RANK // RANKS) * RANKS
    grad_ptr, b_row, i_col, num_cols = grad_ptrs[0], tl.load(adapter_ptr + 5), o_partial, sizes[0]
    for m in tl.static_range(1, MODULES):
        if o_partial >= ends[m - 1] * BLOCK:
            grad_ptr, b_row, i_col, num_cols = grad_ptrs[m], tl.load(adapter_ptr + 5 + 3 * m), o_partial - ends[m - 1] * BLOCK, sizes[m]
    if (i_item == low) & (high - low > 1) & (b_row >= 0) & (i_rank < tl.load(adapter_ptr)):
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


def hopper_grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS and add dB, as grad_s_and_b in triton/grad.py: for dY [T, N] and S [T, width] that `suits_hopper`, and ranks up to 64."""
    ds_TR = torch.empty_like(s_TR)
    num_rows, device, modules = dy_TN.shape[0], dy_TN.device, group.num_modules
    rank, block = rank_class(group.max_padded_rank), 2 * BC.value
    starts, sizes = tuple(start for start, _ in group.columns), tuple(stop - start for start, stop in group.columns)
    ends = tuple(accumulate(triton.cdiv(size, block) for size in sizes))
    rows = item_rows(route.segments, ends[-1], num_processors(device))
    num_items = route.num_items(rows)
    if not num_items:
        return ds_TR
    several = num_items if num_items > len(route.segments) else 0
    share = torch.empty(ends[-1], num_rows, rank, dtype=torch.float32, device=device)
    partial = torch.empty(several, rank, ends[-1] * block, dtype=torch.float32, device=device)
    groups = 2 if rank == 64 else 1
    _hopper_grad_sb_kernel[(ends[-1], num_items)](
        describe(dy_TN, BM.value, BC.value), describe(s_TR, BM.value, rank), group.b_RN, group.grad_b_RN, share, partial,
        route.items(rows), group.adapter_table, starts, sizes, ends, num_rows,
        MODULES=modules, RANK=rank, STAGES=TILES[rank], GROUPS=groups, num_warps=WARPS.value, maxnreg=168 if groups == 2 else 128,
        **pdl(dy_TN),
    )  # fmt: skip
    num_sums = route.num_items(SUM_ROWS) * modules
    num_chunks = several * (ends[-1] * block // SUM_COLUMNS) * (rank // SUM_RANKS)
    _finish_kernel[(num_sums + num_chunks,)](
        ds_TR, group.grad_b_RN, share, partial, route.items(SUM_ROWS), route.items(rows), group.adapter_table, group.scale_table,
        sizes, ends, num_sums, num_rows, group.width,
        BM=SUM_ROWS, COLUMNS=SUM_COLUMNS, RANKS=SUM_RANKS, RANK=rank, MODULES=modules, BLOCK=block, AT_ONCE=8 if rank == 16 else 4,
        num_warps=4, **pdl(dy_TN),
    )  # fmt: skip
    return ds_TR
