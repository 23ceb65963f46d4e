"""dS = c' dY B and dB = dY^T S from one read of dY, as triton/grad_sb.py, on Hopper, for ranks up to 64.

A program owns one item (some rows of one segment, `Route.items`) and two blocks of 256 columns of one module, and holds their B in shared
memory. One warp fills a ring of tiles of dY [64, 256] by TMA, with the rows' S beside the first tile of a row block. The other warp groups
compute both products of a tile from there:

    ds [64, ranks]    = sum over both tiles of dY B^T    this program's share of dS, written in float32, the adapter's own ranks alone
    db [256, ranks]  += dY^T S                           of each tile, in registers until the item ends

Up to rank 32 one warp group does all. Rank 64 takes two: each keeps db of its own tile, and half the ranks of ds, so that a share
still covers 512 columns. The last rows of an item, if they fill no block, are masked in shared memory in both operands of dB, since
0 * NaN is NaN. Columns beyond the module's meet zeros of B; ranks beyond the adapter's are computed and not written. A segment of one item
is added to the gradient arena directly; else each item writes its partial sum (triton/grad_sb_sums.py).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.lora.adapters import ADAPTER_FIELDS, B_ROW, LORA_RANK, MODULE_FIELDS, S_COLUMN, LoraGroup
from fused_ops.lora.hopper.layouts import describe
from fused_ops.lora.hopper.names import async_load, thread_barrier
from fused_ops.lora.hopper.ring import ring_barriers
from fused_ops.lora.route import ADAPTER, END, END_ITEM, FIRST, FIRST_ITEM, ITEM_FIELDS, Route
from fused_ops.lora.triton.grad_sb_sums import finish, make_sums

MAX_HOPPER_RANK = 64
BM, BC, WARPS = gl.constexpr(64), gl.constexpr(256), gl.constexpr(4)  # rows and columns of a tile of dY, warps of a group
TILES = {16: 6, 32: 5, 64: 4}  # of the ring, by ranks: what 227 KB of shared memory hold beside B
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
    item_ptr = items_ptr + i_item * ITEM_FIELDS
    first, end, adapter = gl.load(item_ptr + FIRST), gl.load(item_ptr + END), gl.load(item_ptr + ADAPTER)
    alone = gl.load(item_ptr + END_ITEM) - gl.load(item_ptr + FIRST_ITEM) == 1
    # Which module these columns belong to: module m has the blocks from ends[m - 1] to ends[m].
    i_module, i_first = 0, 0
    for m in gl.static_range(1, MODULES):
        i_module, i_first = gl.where(i_block >= ends[m - 1], m, i_module), gl.where(i_block >= ends[m - 1], ends[m - 1], i_first)
    i_col, num_cols = (i_block - i_first) * (2 * BC), _of_module(sizes, i_module, MODULES)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    rank = gl.multiple_of(gl.load(adapter_ptr + LORA_RANK), 16)
    module_ptr = adapter_ptr + i_module * MODULE_FIELDS
    b_row, s_col = gl.load(module_ptr + B_ROW), gl.load(module_ptr + S_COLUMN)
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
            [(_multiplier, (common, RANK, STAGES, GROUPS, 0)), (_loader, (ring, dy_desc, s_desc, extent, RANK, STAGES))], [1], [24]
        )
    else:
        gl.warp_specialize(
            [
                (_multiplier, (common, RANK, STAGES, GROUPS, 0)), (_multiplier, (common, RANK, STAGES, GROUPS, 1)),
                (_loader, (ring, dy_desc, s_desc, extent, RANK, STAGES)),
            ], [WARPS, 1], [240, 24],
        )  # fmt: skip


def hopper_grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS and add dB, as grad_s_and_b in triton/grad.py: for dY [T, N] and S [T, width] that `suits_hopper`, and ranks up to 64."""
    ds_TR, sums = torch.empty_like(s_TR), make_sums(dy_TN, group, route, 2 * BC.value)
    if not sums.num_items:
        return ds_TR
    rank, starts = sums.rank, tuple(start for start, _ in group.columns)
    groups = 2 if rank == 64 else 1
    _hopper_grad_sb_kernel[(sums.ends[-1], sums.num_items)](
        describe(dy_TN, BM.value, BC.value), describe(s_TR, BM.value, rank), group.b_RN, group.grad_b_RN, sums.shares, sums.partials,
        route.items(sums.item_rows), group.adapter_table, starts, sums.sizes, sums.ends, len(dy_TN),
        MODULES=group.num_modules, RANK=rank, STAGES=TILES[rank], GROUPS=groups, num_warps=WARPS.value,
        maxnreg=168 if groups == 2 else 128, **pdl(dy_TN),
    )  # fmt: skip
    finish(sums, ds_TR, group, route, partials=True)
    return ds_TR
