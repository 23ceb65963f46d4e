"""What LoRA adds to the pipeline of hopper/gemm.py: 16 ranks a step, loaded by the loading warp, multiplied by each warp group.

    add_owner      a tile of one adapter without dropout: the ranks are steps like any other, acc += S L
    add_product    a tile of one adapter with dropout or in 8 bits: the product of a quarter of the columns is computed, masked, and added
    add_masked     a tile of several adapters: the same for each segment, masked by its rows too

A step is 16 ranks of S [BM, 16] and of L [16, columns] in one stage of the ring. The ring is `(inputs, weights, full, empty)`: buffers in
shared memory, of inputs one for each warp group, and their barriers. What is loaded beyond a module's columns is zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, B_ROW, FIRST_A_ROW, LEVEL, LORA_RANK, MODULE_FIELDS, S_COLUMN, S_WIDTH
from fused_ops.lora.hopper.dropout import KEEPS_NONE, add_kept, level_of
from fused_ops.lora.hopper.gemm_tile import ADDED, BM, BN, HALF, LORA, LORA_PART, PART, QUARTER, RANK, STAGES, WM, S
from fused_ops.lora.hopper.names import as_block, async_load
from fused_ops.lora.hopper.ring import release_loaded
from fused_ops.lora.route import ADAPTER, END, FIRST, SEGMENT_FIELDS


@gluon.jit
def module_in_tile(adapters_ptr, adapter, i_col, start, stop, i_module: gl.constexpr, BACKWARD: gl.constexpr, WIDE: gl.constexpr):
    """Return (ranks, first row of L, first column of S, column of L) of an adapter's module in the tile at i_col; ranks 0: none."""
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    if WIDE:
        ranks, l_row, s_col = gl.load(adapter_ptr + S_WIDTH), gl.load(adapter_ptr + FIRST_A_ROW), 0
    else:
        module_ptr = adapter_ptr + i_module * MODULE_FIELDS
        ranks, s_col = gl.load(adapter_ptr + LORA_RANK), gl.load(module_ptr + S_COLUMN)
        l_row = gl.load(module_ptr + (A_ROW if BACKWARD else B_ROW))
    if BACKWARD:
        l_col = i_col
    else:
        l_col = i_col - start
        ranks = gl.where((i_col + BN > start) & (i_col < stop), ranks, 0)
    return gl.where(l_row >= 0, ranks, 0), l_row, s_col, l_col


@gluon.jit
def owner_ranks(adapters_ptr, owner, i_col, starts, stops, BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr):
    """Return how many ranks each module of the owner of the tile at i_col adds to it, and how many they add together."""
    found, total = (), 0
    for m in gl.static_range(MODULES):
        ranks, l_row, s_col, l_col = module_in_tile(adapters_ptr, max(owner, 0), i_col, starts[m], stops[m], m, BACKWARD, WIDE)
        found += (ranks,)
        total += ranks
    return found, total


@gluon.jit
def load_ranks(ring, step, s_desc, l_desc, i_row, s_col, l_row, l_cols, PARTS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Load 16 ranks of S, and of L in COLUMNS columns from each of PARTS l_cols on."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    stage = step % STAGES
    full_bar = full_bars.index(stage)
    mbarrier.wait(empty_bars.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full_bar, (BM + PARTS * COLUMNS) * RANK * 2)
    for group in gl.static_range(2):
        s_buf = as_block(a_bufs.index(2 * stage + group), WM, RANK, S)
        async_load(s_desc, [i_row + group * WM, s_col], full_bar, s_buf)
    for part in gl.static_range(PARTS):
        l_buf = as_block(b_bufs.index(2 * stage + part), RANK, COLUMNS, LAYOUT)
        async_load(l_desc, [l_row, l_cols[part]], full_bar, l_buf)
    return step + 1


@gluon.jit
def add_owner(ring, step, b_acc0, b_acc1, ranks, GROUP: gl.constexpr):
    """Return both halves of the accumulator plus S L of the one adapter that owns the tile."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    for _ in range(0, ranks, RANK):
        stage = step % STAGES
        mbarrier.wait(full_bars.index(stage), (step // STAGES) & 1)
        b_s = as_block(a_bufs.index(2 * stage + GROUP), WM, RANK, S)
        b_acc0 = warpgroup_mma(b_s, as_block(b_bufs.index(2 * stage), RANK, HALF, LORA), b_acc0, is_async=True)
        b_acc1 = warpgroup_mma(b_s, as_block(b_bufs.index(2 * stage + 1), RANK, HALF, LORA), b_acc1, is_async=True)
        b_acc0, b_acc1 = warpgroup_mma_wait(0, [b_acc0, b_acc1])
        mbarrier.arrive(empty_bars.index(stage), count=1)
        step += 1
    return b_acc0, b_acc1, step


@gluon.jit
def _product(ring, step, ranks, GROUP: gl.constexpr):
    """Return S L over `ranks` ranks of one module, in a quarter of the columns, [WM, QUARTER] float32."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    b_product = gl.zeros([WM, QUARTER], gl.float32, PART)
    for _ in range(0, ranks, RANK):
        stage = step % STAGES
        mbarrier.wait(full_bars.index(stage), (step // STAGES) & 1)
        b_s = as_block(a_bufs.index(2 * stage + GROUP), WM, RANK, S)
        b_product = warpgroup_mma(b_s, as_block(b_bufs.index(2 * stage), RANK, QUARTER, LORA_PART), b_product)
        mbarrier.arrive(empty_bars.index(stage), count=1)
        step += 1
    return b_product, step


@gluon.jit
def load_added(ring, step, added_desc, i_row, i_col):
    """Load a quarter of what is added to the output, for both warp groups."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    stage = step % STAGES
    full_bar = full_bars.index(stage)
    mbarrier.wait(empty_bars.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full_bar, BM * QUARTER * 2)
    for group in gl.static_range(2):
        async_load(added_desc, [i_row + group * WM, i_col], full_bar, as_block(a_bufs.index(2 * stage + group), WM, QUARTER, ADDED))
    return step + 1


@gluon.jit
def add_loaded(ring, step, b_acc, GROUP: gl.constexpr):
    """Return a quarter of the accumulator plus what was loaded for it, and the next step."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    stage = step % STAGES
    mbarrier.wait(full_bars.index(stage), (step // STAGES) & 1)
    b_added = as_block(a_bufs.index(2 * stage + GROUP), WM, QUARTER, ADDED).load(PART)
    release_loaded(empty_bars.index(stage))
    return b_acc + b_added.to(gl.float32), step + 1


@gluon.jit
def adapter_level(adapters_ptr, adapter):
    """Return the level that an adapter's hashes must reach to be kept."""
    return level_of(gl.load(adapters_ptr + adapter * ADAPTER_FIELDS + LEVEL))


@gluon.jit
def add_product(ring, step, b_acc, b_hash, ranks, level, MODULES: gl.constexpr, DROPOUT: gl.constexpr, GROUP: gl.constexpr):
    """Return a quarter of the accumulator plus the products of the one adapter that owns the tile, each masked by its dropout."""
    for m in gl.static_range(MODULES):
        b_product, step = _product(ring, step, ranks[m], GROUP)
        if DROPOUT:
            b_acc = add_kept(b_acc, b_product, b_hash, level, m)
        else:
            b_acc += b_product
    return b_acc, step


@gluon.jit
def add_masked(
    ring, step, b_acc, tables, i_low, i_high, b_hash, o_row, i_col, starts, stops,
    BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr, DROPOUT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Return a quarter of the accumulator plus the products of all segments, each masked by its rows and its dropout."""
    tiles_ptr, segments_ptr, adapters_ptr = tables
    for i_segment in range(i_low, i_high):
        segment_ptr = segments_ptr + i_segment * SEGMENT_FIELDS
        m_keep = gl.expand_dims((o_row >= gl.load(segment_ptr + FIRST)) & (o_row < gl.load(segment_ptr + END)), 1)
        adapter = gl.load(segment_ptr + ADAPTER)
        for m in gl.static_range(1 if WIDE else MODULES):
            ranks, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[m], stops[m], m, BACKWARD, WIDE)
            b_product, step = _product(ring, step, ranks, GROUP)
            if DROPOUT:
                b_acc = add_kept(b_acc, b_product, b_hash, gl.where(m_keep, adapter_level(adapters_ptr, adapter), KEEPS_NONE), m)
            else:
                b_acc += gl.where(m_keep, b_product, 0.0)
    return b_acc, step
