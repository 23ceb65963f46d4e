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

from fused_ops.lora.adapters import ADAPTER_FIELDS
from fused_ops.lora.hopper.dropout import KEEPS_NONE, add_kept, level_of, mix, pair_keys
from fused_ops.lora.hopper.layouts import shared
from fused_ops.lora.hopper.names import as_block, async_load

BM, BN, RANK = gl.constexpr(128), gl.constexpr(256), gl.constexpr(16)  # rows and columns of a tile, ranks of a step
WM, WARPS = gl.constexpr(64), gl.constexpr(4)  # rows and warps of a warp group
HALF, QUARTER = gl.constexpr(128), gl.constexpr(64)  # columns of one accumulator, and of a masked product
STAGES = gl.constexpr(4)  # buffers of the ring
_FIELDS = gl.constexpr(ADAPTER_FIELDS)


def product(columns: gl.constexpr, depth: int = 16) -> gl.constexpr:
    """Return the layout of a warp group's product of the given number of columns; an instruction sums over `depth`: 16, or 32 in 8 bits."""
    return gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS.value, 1], instr_shape=[16, columns.value, depth]))


S, LORA, LORA_PART = shared(WM, RANK), shared(RANK, HALF), shared(RANK, QUARTER)
PART = product(QUARTER)
ROWS, COLUMNS = gl.constexpr(gl.SliceLayout(1, PART.value)), gl.constexpr(gl.SliceLayout(0, PART.value))


@gluon.jit
def module_in_tile(adapters_ptr, adapter, i_col, start, stop, i_module: gl.constexpr, BACKWARD: gl.constexpr, WIDE: gl.constexpr):
    """Return (ranks, first row of L, first column of S, column of L) of an adapter's module in the tile at i_col; ranks 0: none."""
    adapter_ptr = adapters_ptr + adapter * _FIELDS
    if WIDE:
        ranks, l_row, s_col = gl.load(adapter_ptr + 2), gl.load(adapter_ptr + 3), 0
    else:
        ranks, s_col = gl.load(adapter_ptr), gl.load(adapter_ptr + 6 + 3 * i_module)
        l_row = gl.load(adapter_ptr + (4 if BACKWARD else 5) + 3 * i_module)
    if BACKWARD:
        l_col = i_col
    else:
        l_col = i_col - start
        ranks = gl.where((i_col + BN > start) & (i_col < stop), ranks, 0)
    return gl.where(l_row >= 0, ranks, 0), l_row, s_col, l_col


@gluon.jit
def owner_ranks(adapters_ptr, owner, i_col, starts, stops, BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr):
    """Return how many ranks each module of the owner of the tile at i_col adds to it, as three numbers."""
    adapter = max(owner, 0)
    ranks0, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[0], stops[0], 0, BACKWARD, WIDE)
    ranks1, ranks2 = ranks0 * 0, ranks0 * 0
    if MODULES > 1:
        ranks1, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[1], stops[1], 1, BACKWARD, WIDE)
    if MODULES > 2:
        ranks2, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[2], stops[2], 2, BACKWARD, WIDE)
    return ranks0, ranks1, ranks2


@gluon.jit
def load_ranks(ring, step, s_desc, l_desc, i_row, s_col, l_row, l_col, PARTS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Load 16 ranks of S, and of L in PARTS times COLUMNS columns from l_col on."""
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
        async_load(l_desc, [l_row, l_col + part * COLUMNS], full_bar, l_buf)
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
def mask_hash(b_keys, first_feature):
    """Return the hash x of every (row key, feature), features first_feature (even) and on; neighbours share it."""
    b_pairs = pair_keys(first_feature + gl.arange(0, QUARTER, COLUMNS))
    return mix(gl.expand_dims(b_keys, 1), gl.expand_dims(b_pairs, 0))


@gluon.jit
def adapter_level(adapters_ptr, adapter):
    """Return the level that an adapter's hashes must reach to be kept."""
    return level_of(gl.load(adapters_ptr + adapter * _FIELDS + 1))


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
        segment_ptr = segments_ptr + i_segment * 4
        m_keep = gl.expand_dims((o_row >= gl.load(segment_ptr)) & (o_row < gl.load(segment_ptr + 1)), 1)
        adapter = gl.load(segment_ptr + 2)
        for m in gl.static_range(1 if WIDE else MODULES):
            ranks, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[m], stops[m], m, BACKWARD, WIDE)
            b_product, step = _product(ring, step, ranks, GROUP)
            if DROPOUT:
                b_acc = add_kept(b_acc, b_product, b_hash, gl.where(m_keep, adapter_level(adapters_ptr, adapter), KEEPS_NONE), m)
            else:
                b_acc += gl.where(m_keep, b_product, 0.0)
    return b_acc, step
