"""The frozen GEMM with LoRA, as triton/gemm.py, written for Hopper's warp groups: Y = X W^T (+ bias) + S B^T, dX = dY W + M * (dS A).

Programs are persistent, one for each multiprocessor. Each takes every n-th tile of [BM, BN], for n programs. One warp loads: it goes
through a tile's steps in order and fills a ring of STAGES buffers in shared memory by TMA, up to tiles ahead of the two warp groups that
multiply, each half of a tile's rows. The two wait for the ring alone, not for each other: while one masks and stores its half, the other
keeps the tensor cores busy. LoRA has no epilogue; its products are further steps of the same ring, 16 ranks each, after those of the
frozen weight:

    a tile of one adapter, no dropout     the ranks are steps like any other: acc += S L
    other tiles, dropout, and 8 bits      a quarter of the columns at a time: for each segment and module, the product S L is
                                          computed, masked by rows and dropout, and added

In 8 bits (fp8.py) both directions read the copy of W whose rows are outputs. A quarter of the columns is multiplied by the scales of its
rows and columns before LoRA, which is in 16 bits, is added.

Names: input [T, I] times weight gives output [T, O]; L is B transposed (forward: of each module, in its own columns) or A (backward).
`Route.tiles` has the adapter of every row tile inside one segment, so that the multiplying warps need no chain of loads: what the
next tile needs is fetched while the present one is computed. ptxas serialises the products (C7515) if anything but a product or zero
defines an accumulator before the loop: hence LoRA comes last. The loading warp may then also fill the ring while the kernel that computes
S still runs (early_launch.py).
"""

import os

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import num_processors
from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.fp8 import Fp8Matrix, parts
from fused_ops.lora.hopper.gemm_lora import (
    adapter_level,
    add_loaded,
    add_masked,
    add_owner,
    add_product,
    load_added,
    load_ranks,
    module_in_tile,
    owner_ranks,
)
from fused_ops.lora.hopper.gemm_swiglu import activate, column, load_gates, store, store_gradients
from fused_ops.lora.hopper.gemm_tile import (
    BM,
    BN,
    COLUMNS,
    HALF,
    LORA,
    LORA_PART,
    PART,
    QUARTER,
    RANK,
    ROWS,
    STAGES,
    WARPS,
    WM,
    mask_hash,
    product,
)
from fused_ops.lora.hopper.layouts import describe
from fused_ops.lora.hopper.names import async_load
from fused_ops.lora.hopper.ring import ring_barriers
from fused_ops.lora.route import ADAPTER, END_SEGMENT, FIRST_SEGMENT, OWNER, SEGMENT_FIELDS, TILE_FIELDS, Route
from fused_ops.lora.term import term_of_a, term_of_b, three

BK, BK_OF_8_BITS = gl.constexpr(64), gl.constexpr(128)  # inner block, of as many bytes in 8 bits
BYTES = gl.constexpr((BM.value + BN.value) * 128)  # of a step
TOGETHER = gl.constexpr(8)  # row tiles that share the columns of W in the cache
WHOLE_IN_8_BITS = os.environ.get("MEGATRON_LORA_WHOLE", "1") == "1"  # while it is measured
_ACC, _ACC_OF_8_BITS = product(HALF), product(HALF, 32)

# Larger weights are not launched early: it made 4096 x 28672 slower by 2.5%, left 14336 x 4096 and 8192 x 8192 as they were, and made
# 5120 x 5120 and smaller ones faster by 2%. The weight's shape alone decides, so that nothing is compiled in the middle of a run.
MAX_EARLY_WEIGHTS = 2**25


@gluon.jit
def _tile_origin(i_tile, num_rows, num_cols):
    """Return the first row and column of a tile."""
    num_m, num_n = gl.cdiv(num_rows, BM), gl.cdiv(num_cols, BN)
    first = (i_tile // (TOGETHER * num_n)) * TOGETHER
    rows = min(num_m - first, TOGETHER)
    return (first + (i_tile % (TOGETHER * num_n)) % rows) * BM, (i_tile % (TOGETHER * num_n)) // rows * BN


@gluon.jit
def _loader(
    descs, ring, tables, sizes, starts, stops,
    BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr, DROPOUT: gl.constexpr, FP8: gl.constexpr, PDL: gl.constexpr,
    SWIGLU: gl.constexpr, WHOLE: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Load every step of every tile of this program."""
    INNER: gl.constexpr = BK_OF_8_BITS if FP8 else BK
    PAIRED: gl.constexpr = SWIGLU and not BACKWARD
    input_desc, weight_desc, s_desc, l_descs, l_part_descs, further_desc = descs
    a_bufs, b_bufs, full_bars, empty_bars = ring
    tiles_ptr, segments_ptr, adapters_ptr = tables
    num_rows, num_cols, num_inner = sizes
    step = 0
    for i_tile in range(gl.program_id(0), gl.cdiv(num_rows, BM) * gl.cdiv(num_cols, BN), gl.num_programs(0)):
        i_row, i_col = _tile_origin(i_tile, num_rows, num_cols)
        for i_k in range(0, num_inner, INNER):
            stage = step % STAGES
            full_bar = full_bars.index(stage)
            mbarrier.wait(empty_bars.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full_bar, BYTES)
            for group in gl.static_range(2):
                async_load(input_desc, [i_row + group * WM, i_k], full_bar, a_bufs.index(2 * stage + group))
            for half in gl.static_range(2):
                at_col = column(i_col, num_cols, half, 0, PAIRED)
                at = [i_k, at_col] if BACKWARD and not FP8 else [at_col, i_k]
                async_load(weight_desc, at, full_bar, b_bufs.index(2 * stage + half))
            step += 1
        if PDL:  # the kernel before computed S from the input, so the input and the frozen weight are older than it
            gdc_wait()
        tile_ptr = tiles_ptr + i_row // BM * TILE_FIELDS
        i_low, i_high, owner = gl.load(tile_ptr + FIRST_SEGMENT), gl.load(tile_ptr + END_SEGMENT), gl.load(tile_ptr + OWNER)
        if (owner >= 0) & (not DROPOUT) & (WHOLE or not FP8):
            for m in gl.static_range(1 if WIDE else MODULES):
                l_desc = l_descs[0 if BACKWARD else m]
                ranks, l_row, s_col, l_col = module_in_tile(adapters_ptr, owner, i_col, starts[m], stops[m], m, BACKWARD, WIDE)
                mine = m if PAIRED else 0  # the half that is the module's; what is loaded for the other lies outside of L: zeros
                l_cols = (column(l_col, num_cols, 0 - mine, 0, PAIRED), column(l_col, num_cols, 1 - mine, 0, PAIRED))
                for i_rank in range(0, ranks, RANK):
                    step = load_ranks(ring, step, s_desc, l_desc, i_row, s_col + i_rank, l_row + i_rank, l_cols, 2, HALF, LORA)
            i_high = i_low  # nothing is left for the quarters
        for i_part in range(4):
            half, part = i_part // 2, i_part % 2
            if PAIRED:
                half, part = i_part % 2, i_part // 2
            for i_segment in range(i_low, i_high):
                adapter = gl.load(segments_ptr + i_segment * SEGMENT_FIELDS + ADAPTER)
                for m in gl.static_range(1 if WIDE else MODULES):
                    l_desc = l_part_descs[0 if BACKWARD else m]
                    ranks, l_row, s_col, l_col = module_in_tile(adapters_ptr, adapter, i_col, starts[m], stops[m], m, BACKWARD, WIDE)
                    l_cols = (column(l_col, num_cols, half - (m if PAIRED else 0), part, PAIRED),)
                    for i_rank in range(0, ranks, RANK):
                        s_at, l_at = s_col + i_rank, l_row + i_rank
                        step = load_ranks(ring, step, s_desc, l_desc, i_row, s_at, l_at, l_cols, 1, QUARTER, LORA_PART)
            if SWIGLU and BACKWARD:
                step = load_gates(ring, step, further_desc, i_row, i_col + i_part * QUARTER, num_cols)
            if ADD:
                step = load_added(ring, step, further_desc, i_row, i_col + i_part * QUARTER)


@gluon.jit
def _frozen_product(ring, step, num_inner, BACKWARD: gl.constexpr, FP8: gl.constexpr, GROUP: gl.constexpr):
    """Return X W^T or dY W of a warp group's rows of a tile, in two halves [WM, HALF] float32, and the next step."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    INNER: gl.constexpr = BK_OF_8_BITS if FP8 else BK
    ACC: gl.constexpr = _ACC_OF_8_BITS if FP8 else _ACC
    b_acc0, b_acc1 = gl.zeros([WM, HALF], gl.float32, ACC), gl.zeros([WM, HALF], gl.float32, ACC)
    for i_k in range(0, num_inner, INNER):
        stage = step % STAGES
        mbarrier.wait(full_bars.index(stage), (step // STAGES) & 1)
        b_in, b_w0, b_w1 = a_bufs.index(2 * stage + GROUP), b_bufs.index(2 * stage), b_bufs.index(2 * stage + 1)
        if FP8 or not BACKWARD:
            b_w0, b_w1 = b_w0.permute((1, 0)), b_w1.permute((1, 0))
        b_acc0 = warpgroup_mma(b_in, b_w0, b_acc0, is_async=True)
        b_acc1 = warpgroup_mma(b_in, b_w1, b_acc1, is_async=True)
        b_acc0, b_acc1 = warpgroup_mma_wait(2, [b_acc0, b_acc1])
        # The products of the step before are done: its buffers are free.
        mbarrier.arrive(empty_bars.index((step + STAGES - 1) % STAGES), count=1, pred=i_k > 0)
        step += 1
    b_acc0, b_acc1 = warpgroup_mma_wait(0, [b_acc0, b_acc1])
    mbarrier.arrive(empty_bars.index((step + STAGES - 1) % STAGES), count=1)
    return b_acc0, b_acc1, step


@gluon.jit
def _quarters(b_acc):
    """Return the left and the right half of an accumulator, [WM, QUARTER] each; every thread holds a part of both."""
    left, right = gl.split(gl.permute(gl.reshape(b_acc, [WM, 2, QUARTER]), [0, 2, 1]))
    return gl.convert_layout(left, PART, assert_trivial=True), gl.convert_layout(right, PART, assert_trivial=True)


@gluon.jit
def _column_scales(scales_ptr, i_col, num_cols):
    """Return the scales of a quarter's columns."""
    o_col = i_col + gl.arange(0, QUARTER, COLUMNS)
    return gl.load(scales_ptr + o_col, o_col < num_cols, 0.0)


@gluon.jit
def _half_scales(scales_ptr, i_col, num_cols):
    """Return the scales of the columns of half a tile."""
    o_col = i_col + gl.arange(0, HALF, gl.SliceLayout(0, _ACC))
    return gl.load(scales_ptr + o_col, o_col < num_cols, 0.0)


@gluon.jit
def _scaled(b_acc, b_rows, b_cols):
    """Return half an accumulator in 8 bits times the scales of its rows and columns."""
    return gl.convert_layout(b_acc, _ACC, assert_trivial=True) * (gl.expand_dims(b_rows, 1) * gl.expand_dims(b_cols, 0))


@gluon.jit
def _multiplier(
    common, BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr, DROPOUT: gl.constexpr, HAS_BIAS: gl.constexpr,
    FP8: gl.constexpr, PDL: gl.constexpr, SWIGLU: gl.constexpr, REFILL: gl.constexpr, WHOLE: gl.constexpr, ADD: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Compute and store one warp group's rows of every tile of this program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    output_desc, y_desc, output_bufs, ring, tables, sizes, starts, stops, bias_ptr, keys_ptr, first_feature, scales = common
    PAIRED: gl.constexpr = SWIGLU and not BACKWARD
    tiles_ptr, segments_ptr, adapters_ptr = tables
    num_rows, num_cols, num_inner = sizes
    num_tiles, stride = gl.cdiv(num_rows, BM) * gl.cdiv(num_cols, BN), gl.num_programs(0)
    step = 0
    i_row, i_col = _tile_origin(gl.program_id(0), num_rows, num_cols)
    owner = gl.load(tiles_ptr + i_row // BM * TILE_FIELDS + OWNER)
    for i_tile in range(gl.program_id(0), num_tiles, stride):
        # Loaded before the products and used after them. Triton 3.6 carries from tile to tile only what is read outside branches.
        tile_ptr = tiles_ptr + i_row // BM * TILE_FIELDS
        i_low, i_high = gl.load(tile_ptr + FIRST_SEGMENT), gl.load(tile_ptr + END_SEGMENT)
        module_ranks, ranks = owner_ranks(adapters_ptr, owner, i_col, starts, stops, BACKWARD, MODULES, WIDE)
        level = adapter_level(adapters_ptr, max(owner, 0))
        next_row, next_col = _tile_origin(min(i_tile + stride, num_tiles - 1), num_rows, num_cols)
        next_owner = gl.load(tiles_ptr + next_row // BM * TILE_FIELDS + OWNER)
        o_row = i_row + GROUP * WM + gl.arange(0, WM, ROWS)
        # Scales in 8 bits are loaded ahead: of the rows and of all columns before the products, or of a quarter's columns a quarter ahead.
        if WHOLE:
            o_scale = i_row + GROUP * WM + gl.arange(0, WM, gl.SliceLayout(1, _ACC))
            b_rows = gl.load(scales[0] + o_scale, o_scale < num_rows, 0.0)
            b_cols0, b_cols1 = _half_scales(scales[1], i_col, num_cols), _half_scales(scales[1], i_col + HALF, num_cols)
        if FP8 and not WHOLE:
            b_row_scales = gl.load(scales[0] + o_row, o_row < num_rows, 0.0)
            b_next_scales = _column_scales(scales[1], i_col, num_cols)
        b_acc0, b_acc1, step = _frozen_product(ring, step, num_inner, BACKWARD, FP8, GROUP)
        if WHOLE:
            b_acc0, b_acc1 = _scaled(b_acc0, b_rows, b_cols0), _scaled(b_acc1, b_rows, b_cols1)
        if WHOLE or not FP8:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
            if (owner >= 0) & (not DROPOUT):
                b_acc0, b_acc1, step = add_owner(ring, step, b_acc0, b_acc1, ranks, GROUP)
        b_part0, b_part1 = _quarters(b_acc0)
        b_part2, b_part3 = _quarters(b_acc1)
        parts = (b_part0, b_part2, b_part1, b_part3) if PAIRED else (b_part0, b_part1, b_part2, b_part3)
        b_keys = o_row.to(gl.uint32)
        if DROPOUT:
            b_keys = gl.load(keys_ptr + o_row, o_row < num_rows, 0).to(gl.uint32, bitcast=True)
        for i in gl.static_range(4):
            b_part = parts[i]
            at_col = column(i_col, num_cols, i % 2, i // 2, PAIRED) if PAIRED else i_col + i * QUARTER
            o_col = at_col + gl.arange(0, QUARTER, COLUMNS)
            if FP8 and not WHOLE:
                b_scales = b_next_scales
                if i < 3:
                    b_next_scales = _column_scales(scales[1], i_col + (i + 1) * QUARTER, num_cols)
                b_part *= gl.expand_dims(b_row_scales, 1) * gl.expand_dims(b_scales, 0)
            b_hash = b_keys
            if DROPOUT:
                b_hash = mask_hash(b_keys, first_feature + at_col)
            if owner < 0:
                b_part, step = add_masked(
                    ring, step, b_part, tables, i_low, i_high, b_hash, o_row, i_col, starts, stops,
                    BACKWARD, MODULES, WIDE, DROPOUT, GROUP,
                )  # fmt: skip
            elif (DROPOUT or FP8) and not WHOLE:
                b_part, step = add_product(ring, step, b_part, b_hash, module_ranks, level, MODULES, DROPOUT, GROUP)
            if HAS_BIAS:
                b_part += gl.expand_dims(gl.load(bias_ptr + o_col, o_col < num_cols, 0.0).to(gl.float32), 0)
            if ADD:
                b_part, step = add_loaded(ring, step, b_part, GROUP)
            b_out = b_part.to(gl.bfloat16)
            if SWIGLU and BACKWARD:
                step = store_gradients(ring, step, output_desc, y_desc, output_bufs, i_row, at_col, num_cols, b_out, REFILL, i, GROUP)
            else:
                store(output_desc, output_bufs, i_row, at_col, b_out, i + i // 2 if PAIRED else i, GROUP)
                if PAIRED:
                    if i % 2 == 0:
                        b_gate = b_out
                    else:
                        store(y_desc, output_bufs, i_row, i_col // 2 + i // 2 * QUARTER, activate(b_gate, b_out), i + i // 2 + 1, GROUP)
        i_row, i_col, owner = next_row, next_col, next_owner
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "first_feature"])
def _hopper_kernel(
    input_desc, weight_desc, output_desc, y_desc, added_desc, s_desc, l_desc0, l_desc1, l_desc2, l_part0, l_part1, l_part2,
    row_scales_ptr, column_scales_ptr, bias_ptr, tiles_ptr, segments_ptr, adapters_ptr, keys_ptr,
    num_rows, num_cols, num_inner, first_feature, starts, stops,
    BACKWARD: gl.constexpr, MODULES: gl.constexpr, WIDE: gl.constexpr, DROPOUT: gl.constexpr, HAS_BIAS: gl.constexpr,
    FP8: gl.constexpr, SWIGLU: gl.constexpr, REFILL: gl.constexpr, WHOLE: gl.constexpr, ADD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    INNER: gl.constexpr = BK_OF_8_BITS if FP8 else BK
    a_bufs = gl.allocate_shared_memory(input_desc.dtype, [2 * STAGES, WM, INNER], input_desc.layout)
    if BACKWARD and not FP8:
        b_bufs = gl.allocate_shared_memory(weight_desc.dtype, [2 * STAGES, INNER, HALF], weight_desc.layout)
    else:
        b_bufs = gl.allocate_shared_memory(weight_desc.dtype, [2 * STAGES, HALF, INNER], weight_desc.layout)
    output_bufs = gl.allocate_shared_memory(gl.bfloat16, [4, WM, QUARTER], output_desc.layout)
    full_bars, empty_bars = ring_barriers(STAGES, 2)
    ring, tables = (a_bufs, b_bufs, full_bars, empty_bars), (tiles_ptr, segments_ptr, adapters_ptr)
    sizes = (num_rows, num_cols, num_inner)
    descs = (input_desc, weight_desc, s_desc, (l_desc0, l_desc1, l_desc2), (l_part0, l_part1, l_part2), added_desc if ADD else output_desc)
    scales = (row_scales_ptr, column_scales_ptr)
    common = (output_desc, y_desc, output_bufs, ring, tables, sizes, starts, stops, bias_ptr, keys_ptr, first_feature, scales)
    gl.warp_specialize(
        [
            (_multiplier, (common, BACKWARD, MODULES, WIDE, DROPOUT, HAS_BIAS, FP8, PDL, SWIGLU, REFILL, WHOLE, ADD, 0)),
            (_multiplier, (common, BACKWARD, MODULES, WIDE, DROPOUT, HAS_BIAS, FP8, PDL, SWIGLU, REFILL, WHOLE, ADD, 1)),
            (_loader, (descs, ring, tables, sizes, starts, stops, BACKWARD, MODULES, WIDE, DROPOUT, FP8, PDL, SWIGLU, WHOLE, ADD)),
        ], [WARPS, 1], [240, 24],
    )  # fmt: skip


def hopper_gemm(
    input_TI: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix, bias_O: Tensor | None, s_TR: Tensor, group: LoraGroup, route: Route,
    backward: bool, gate_up: Tensor | None = None, y_TF: Tensor | None = None,
    added_TO: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what triton/gemm.py's gemm returns, for tensors that `suits_hopper`.

    Forward with `y_TF`: the weight's columns are gate | up, and silu(gate) * up is written to y_TF [T, F]. Backward with `gate_up` [T, 2F]:
    dX is the gradient of silu(gate) * up, that of gate | up is written over them and returned, and the product itself to `y_TF`, unless
    None. F is a multiple of BN. Neither goes with 8 bits. `added_TO` is added to the product before that is rounded.

    The input in 16 bits must be older than S: blocks of it are loaded while the kernel that computes S still runs.
    """
    (values, row_scales), (weight, column_scales) = parts(input_TI), parts(weight)
    fp8 = row_scales is not None
    inner_first, inner = backward and not fp8, (BK_OF_8_BITS if fp8 else BK).value
    (num_rows, num_inner), num_cols = values.shape, weight.shape[1 if inner_first else 0]
    out_TO = torch.empty(num_rows, num_cols, dtype=s_TR.dtype, device=values.device) if gate_up is None else gate_up
    swiglu = y_TF is not None or gate_up is not None
    term = term_of_a(group) if backward else term_of_b(group)
    starts, stops = zip(*([(0, num_cols)] * 2 if swiglu and not backward else group.columns), strict=True)  # pairs: both in every tile
    tiles = -(-num_rows // BM.value) * -(-num_cols // BN.value)
    early = bool(route.segments) and not fp8 and num_cols * num_inner <= MAX_EARLY_WEIGHTS
    _hopper_kernel[(min(num_processors(values.device), tiles),)](
        describe(values, WM.value, inner),
        describe(weight, inner, HALF.value) if inner_first else describe(weight, HALF.value, inner),
        describe(out_TO, WM.value, QUARTER.value),
        *[each if each is None else describe(each, WM.value, QUARTER.value) for each in (y_TF, added_TO)],
        describe(s_TR, WM.value, RANK.value),
        *three([describe(tensor, RANK.value, HALF.value) for tensor in term.with_rows]),
        *three([describe(tensor, RANK.value, QUARTER.value) for tensor in term.with_rows]),
        row_scales, column_scales, bias_O, route.tiles(BM.value), route.segment_table, group.adapter_table, route.row_keys,
        num_rows, num_cols, num_inner, group.first_feature, starts, stops,
        BACKWARD=backward, MODULES=term.num_modules, WIDE=term.wide, DROPOUT=term.dropout, HAS_BIAS=bias_O is not None,
        FP8=fp8, SWIGLU=swiglu, REFILL=backward and y_TF is not None, WHOLE=fp8 and WHOLE_IN_8_BITS and not term.dropout,
        ADD=added_TO is not None,         num_warps=WARPS.value, maxnreg=168, **pdl(values, early),
    )  # fmt: skip
    return out_TO
