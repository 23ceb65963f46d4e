"""The frozen GEMM with the LoRA term in its epilogue: Y = X W^T (+ bias) + S B^T, and dX = dY W + M * (dS A).

One kernel body serves both. Output tiles form the plain row grid. After the K loop a tile goes through the segments that meet it
(`Route.tiles`) and adds dot(S [rows, r], L [r, columns]), where L is B (forward: each module its own columns) or A (backward: all
columns). The *product* is masked by row, column and dropout, so that a neighbour's NaN does not spread. The accumulator is
processed in two or four column parts, which bounds the registers that the product needs.

In 8 bits X or dY arrives rounded by rows, and W in the copy whose rows are outputs (fp8.py), so that both directions read both
operands along the reduced dimension, as Hopper's 8-bit tensor cores require. The accumulator is multiplied by the two scales after
the K loop; the LoRA term is in 16 bits. Sums are the tensor core's own, with about 14 bits of fraction: finer than the operands' 4.

Names: input [T, I] times weight gives output [T, O]; weight is [O, I] forward and [I, O] backward (in 8 bits [O, I]). Without
dropout, dX treats the modules of an adapter as one: their rows of A, and their columns of dS, are adjacent (WIDE).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.launch.shapes import num_processors, uses_tma
from fused_ops.launch.triton_version import adds_ranks_ahead
from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, B_ROW, FIRST_A_ROW, LEVEL, LORA_RANK, MODULE_FIELDS, S_COLUMN, S_WIDTH, LoraGroup
from fused_ops.lora.fp8 import Fp8Matrix, parts
from fused_ops.lora.route import ADAPTER, END, END_SEGMENT, FIRST, FIRST_SEGMENT, SEGMENT_FIELDS, TILE_FIELDS, Route
from fused_ops.lora.term import LoraTerm, term_of_a, term_of_b, three
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.gemm_config import GemmConfig, gemm_config
from fused_ops.lora.triton.parts import described, halves

RANK = 16  # ranks of one product of the LoRA term


@triton.jit
def _add_lora(
    b_acc, i_row, i_col, o_row, o_col, num_cols, i_low, i_high, done, s, s_stride, factors, l_strides, starts, stops,
    segments_ptr, adapters_ptr, keys_ptr, first_feature,
    BACKWARD: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return b_acc [BM, BP] plus the LoRA products of its rows and columns, segment by segment, module by module."""
    if DROPOUT:
        b_columns = column_keys(tl.arange(0, o_col.shape[0]), i_col + first_feature)
    i_segment = i_low
    while i_segment < i_high:  # `while`, since only the K loop may be a nested `for` of the flattened tile loop
        first, end = tl.load(segments_ptr + i_segment * SEGMENT_FIELDS + FIRST), tl.load(segments_ptr + i_segment * SEGMENT_FIELDS + END)
        adapter_ptr = adapters_ptr + tl.load(segments_ptr + i_segment * SEGMENT_FIELDS + ADAPTER) * ADAPTER_FIELDS
        m_row = (o_row >= first) & (o_row < end)
        if DROPOUT:
            b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
            b_threshold = tl.where(m_row, tl.load(adapter_ptr + LEVEL), 1024).to(tl.uint32)  # 1024: no element of the row is kept
        for i_module in tl.static_range(1 if WIDE else MODULES):
            if WIDE:
                rank, l_row, s_col = tl.load(adapter_ptr + S_WIDTH), tl.load(adapter_ptr + FIRST_A_ROW), 0
            else:
                rank, s_col = tl.load(adapter_ptr + LORA_RANK), tl.load(adapter_ptr + S_COLUMN + i_module * MODULE_FIELDS)
                l_row = tl.load(adapter_ptr + (A_ROW if BACKWARD else B_ROW) + i_module * MODULE_FIELDS)
            start, stop = (0, num_cols) if BACKWARD else (starts[i_module], stops[i_module])
            lora = factors[0 if BACKWARD else i_module]
            if (l_row >= 0) & (done < rank) & (i_col + o_col.shape[0] > start) & (i_col < stop):
                b_product = tl.zeros([o_row.shape[0], o_col.shape[0]], tl.float32)
                o_rank = done  # ranks that are added already
                while o_rank < rank:
                    if TMA:
                        b_s = s.load([i_row, s_col + o_rank])
                        b_l = lora.load([l_row + o_rank, i_col - start])
                    else:
                        o_r = o_rank + tl.arange(0, RANK)
                        s_at = s + o_row.to(tl.int64)[:, None] * s_stride + (s_col + o_r)[None, :]
                        b_s = tl.load(s_at, m_row[:, None] & (o_r < rank)[None, :], 0.0)
                        l_at = (
                            lora + (l_row + o_r).to(tl.int64)[:, None] * l_strides[0 if BACKWARD else i_module] + (o_col - start)[None, :]
                        )
                        b_l = tl.load(l_at, (o_r < rank)[:, None] & ((o_col >= start) & (o_col < stop))[None, :], 0.0)
                    b_product = tl.dot(b_s, b_l, b_product, input_precision="ieee")
                    o_rank += RANK
                # Columns of other modules get a product of zeros; only rows need a mask against other jobs.
                if DROPOUT:
                    b_acc += tl.where(keep(hash_bits(b_keys, b_columns), b_threshold[:, None], i_module), b_product, 0.0)
                else:
                    b_acc += tl.where(m_row[:, None], b_product, 0.0)
        i_segment += 1
    return b_acc


@triton.jit
def _load_owner(
    o_row, o_col, i_row, i_col, num_rows, num_cols, tiles_ptr, segments_ptr, adapters_ptr, i_m, s_ptr, s_stride,
    lora_ptr, offset1, offset2, starts, stops,
    BACKWARD: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return (S [BM, RANK], L [RANK, BN], owned) of a tile whose rows and columns have one adapter; zeros and 0 where they do not.

    Zeros in both operands add nothing to any row.
    """
    i_low, i_high = tl.load(tiles_ptr + i_m * TILE_FIELDS + FIRST_SEGMENT), tl.load(tiles_ptr + i_m * TILE_FIELDS + END_SEGMENT)
    segment_ptr = segments_ptr + i_low * SEGMENT_FIELDS
    m_one = i_low + 1 == i_high
    first, end, adapter = (
        tl.load(segment_ptr + FIRST, m_one, 0),
        tl.load(segment_ptr + END, m_one, 0),
        tl.load(segment_ptr + ADAPTER, m_one, 0),
    )
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    start, stop, offset, i_module = 0, num_cols, offset1 * 0, 0
    if (not BACKWARD) and MODULES > 1:
        for i in tl.static_range(1, MODULES):
            later = i_col >= starts[i]
            i_module = tl.where(later, i, i_module)
            offset = tl.where(later, offset1 if i == 1 else offset2, offset)
    if not BACKWARD:
        start, stop = starts[0], stops[0]
        for i in tl.static_range(1, MODULES):
            start, stop = tl.where(i_module == i, starts[i], start), tl.where(i_module == i, stops[i], stop)
    if WIDE:
        rank, l_row, s_col = tl.load(adapter_ptr + S_WIDTH), tl.load(adapter_ptr + FIRST_A_ROW), 0
    else:
        rank, s_col = tl.load(adapter_ptr + LORA_RANK), tl.multiple_of(tl.load(adapter_ptr + S_COLUMN + i_module * MODULE_FIELDS), 16)
        l_row = tl.load(adapter_ptr + (A_ROW if BACKWARD else B_ROW) + i_module * MODULE_FIELDS)
    owned = m_one & (first <= i_row) & (end >= min(i_row + o_row.shape[0], num_rows)) & (l_row >= 0)
    owned = owned & (i_col >= start) & (min(i_col + o_col.shape[0], num_cols) <= stop)
    o_r = tl.arange(0, RANK)
    m_r = ((o_r < rank) & owned).to(tl.int1)
    b_s = tl.load(s_ptr + o_row.to(tl.int64)[:, None] * s_stride + (s_col + o_r)[None, :], (o_row < num_rows)[:, None] & m_r[None, :], 0.0)
    l_at = lora_ptr + offset + (l_row + o_r).to(tl.int64)[:, None] * (stop - start) + (o_col - start)[None, :]
    return b_s, tl.load(l_at, m_r[:, None] & (o_col < stop)[None, :], 0.0), owned.to(tl.int32)


@triton.jit
def _store(output, bias_ptr, b_acc, i_row, i_col, o_row, o_col, num_rows, num_cols, o_stride, HAS_BIAS: tl.constexpr, TMA: tl.constexpr):
    if HAS_BIAS:
        b_acc += tl.load(bias_ptr + o_col, o_col < num_cols, 0.0).to(tl.float32)[None, :]
    if TMA:
        output.store([i_row, i_col], b_acc.to(output.dtype))
    else:
        at = output + o_row.to(tl.int64)[:, None] * o_stride + o_col[None, :]
        tl.store(at, b_acc.to(output.dtype.element_ty), (o_row < num_rows)[:, None] & (o_col < num_cols)[None, :])


@triton.jit
def _split(b_acc, PARTS: tl.constexpr):
    """Return the 1, 2 or 4 column parts of a block, left to right."""
    if PARTS == 1:
        parts = (b_acc,)
    else:
        low, high = halves(b_acc)
        if PARTS == 2:
            parts = (low, high)
        else:
            part0, part1 = halves(low)
            part2, part3 = halves(high)
            parts = (part0, part1, part2, part3)
    return parts


@triton.jit(do_not_specialize=["num_rows", "s_stride", "first_feature"])
def _gemm_kernel(
    input, weight, output, row_scales_ptr, column_scales_ptr, bias_ptr, s, lora0, lora1, lora2, s_ptr, lora_ptr, offset1, offset2,
    l_strides, starts, stops, tiles_ptr, segments_ptr, adapters_ptr, keys_ptr, num_rows, num_cols, num_inner, i_stride, w_stride, o_stride,
    s_stride, first_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, NUM_STAGES: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, BACKWARD: tl.constexpr, LORA: tl.constexpr, MODULES: tl.constexpr,
    RANK: tl.constexpr, FIRST: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
    FP8: tl.constexpr, INNER_FIRST: tl.constexpr,
):  # fmt: skip
    factors = (lora0, lora1, lora2)
    num_m, num_n = tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN)
    # One program per tile when NUM_PROGRAMS is 0, else each program takes every NUM_PROGRAMS-th tile.
    stride = num_m * num_n if NUM_PROGRAMS == 0 else NUM_PROGRAMS
    for i_tile in tl.range(tl.program_id(0), num_m * num_n, stride, num_stages=1, flatten=FLATTEN):
        # Groups of GROUP row tiles share the columns of W that are in the cache.
        group_first = (i_tile // (GROUP * num_n)) * GROUP
        group_rows = min(num_m - group_first, GROUP)
        i_m = group_first + (i_tile % (GROUP * num_n)) % group_rows
        i_n = (i_tile % (GROUP * num_n)) // group_rows
        o_row = i_m * BM + tl.arange(0, BM)

        b_acc = tl.zeros([BM, BN], tl.float32)
        for i_k in tl.range(0, tl.cdiv(num_inner, BK), num_stages=NUM_STAGES):
            if TMA:
                b_in = input.load([i_m * BM, i_k * BK])
                b_w = weight.load([i_k * BK, i_n * BN]) if INNER_FIRST else weight.load([i_n * BN, i_k * BK]).T
            else:
                o_k = i_k * BK + tl.arange(0, BK)
                o_c = i_n * BN + tl.arange(0, BN)
                in_at = input + o_row.to(tl.int64)[:, None] * i_stride + o_k[None, :]
                b_in = tl.load(in_at, (o_row < num_rows)[:, None] & (o_k < num_inner)[None, :], 0.0)
                if INNER_FIRST:
                    w_at = weight + o_k.to(tl.int64)[:, None] * w_stride + o_c[None, :]
                else:
                    w_at = weight + o_c.to(tl.int64)[None, :] * w_stride + o_k[:, None]
                b_w = tl.load(w_at, (o_k < num_inner)[:, None] & (o_c < num_cols)[None, :], 0.0)
            b_acc = tl.dot(b_in, b_w, b_acc, input_precision="ieee")

        # First, so that the wait for the accumulator is not inside a branch (which would serialise the K loop).
        parts = _split(b_acc, PARTS)
        if FP8:
            b_row_scales = tl.load(row_scales_ptr + o_row, o_row < num_rows, 0.0)
        done = 0
        if FIRST > 0:
            b_s, b_l, owned = _load_owner(
                o_row, i_n * BN + tl.arange(0, BN), i_m * BM, i_n * BN, num_rows, num_cols, tiles_ptr, segments_ptr, adapters_ptr, i_m,
                s_ptr, s_stride, lora_ptr, offset1, offset2, starts, stops, BACKWARD, MODULES, FIRST, WIDE,
            )  # fmt: skip
            l_parts, done = _split(b_l, PARTS), owned * FIRST
        for i_part in tl.static_range(PARTS):
            i_col = i_n * BN + i_part * (BN // PARTS)
            o_col = i_col + tl.arange(0, BN // PARTS)
            b_part = parts[i_part]
            if FP8:
                b_column_scales = tl.load(column_scales_ptr + o_col, o_col < num_cols, 0.0)
                b_part = b_part * b_row_scales[:, None] * b_column_scales[None, :]
            if FIRST > 0:
                b_part = tl.dot(b_s, l_parts[i_part], b_part, input_precision="ieee")
            if LORA:
                b_part = _add_lora(
                    b_part, i_m * BM, i_col, o_row, o_col, num_cols,
                    tl.load(tiles_ptr + i_m * TILE_FIELDS + FIRST_SEGMENT), tl.load(tiles_ptr + i_m * TILE_FIELDS + END_SEGMENT),
                    done, s, s_stride, factors, l_strides, starts, stops, segments_ptr, adapters_ptr, keys_ptr, first_feature,
                    BACKWARD, MODULES, RANK, DROPOUT, WIDE, TMA,
                )  # fmt: skip
            _store(output, bias_ptr, b_part, i_m * BM, i_col, o_row, o_col, num_rows, num_cols, o_stride, HAS_BIAS, TMA)


def gemm(
    input_TI: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix, bias_O: Tensor | None,
    s_TR: Tensor | None, group: LoraGroup | None, route: Route | None,
    backward: bool, dtype: torch.dtype | None = None, config: GemmConfig | None = None,
) -> Tensor:  # fmt: skip
    """Return input W^T (+ bias) + S B^T, or with `backward` input W + M * (S A), in `dtype` (None: the input's).

    Of 8-bit matrices, `weight` is the copy whose rows are outputs, in both directions. s_TR, group and route are None together.
    """
    (values, row_scales), (weight, column_scales) = parts(input_TI), parts(weight)
    fp8 = row_scales is not None
    inner_first = backward and not fp8  # the weight's rows lie along the reduced dimension
    (num_rows, num_inner), num_cols = values.shape, weight.shape[1 if inner_first else 0]
    out_TO = torch.empty(num_rows, num_cols, dtype=dtype or values.dtype, device=values.device)
    if num_rows == 0:
        return out_TO
    term = LoraTerm() if group is None else term_of_a(group) if backward else term_of_b(group)
    tma = uses_tma(values, weight, out_TO, *(t for t in term.factors if len(t)))
    if config is None:
        small = not tma or out_TO.dtype == torch.float32
        config = gemm_config(values, num_cols, backward, small, term.width, term.dropout, group.num_modules if group is not None else 0)
    tiles, part = -(-num_rows // config.rows) * -(-num_cols // config.columns), config.columns // config.parts
    weight_box = (config.inner, config.columns) if inner_first else (config.columns, config.inner)
    matrices = described(tma, (values, config.rows, config.inner), (weight, *weight_box), (out_TO, config.rows, part))
    s_desc, l_descs, factors, columns, tables = None, [], (None, 0, 0, ()), ((), ()), (None, None, None, None)
    if s_TR is not None and group is not None and route is not None:
        columns, first = zip(*group.columns, strict=True), term.factors[0]
        offsets = [(each.data_ptr() - first.data_ptr()) // each.element_size() for each in term.factors[1:]]
        factors = first, *[*offsets, 0, 0][:2], tuple(each.stride(0) for each in term.factors)
        tables = route.tiles(config.rows), route.segment_table, group.adapter_table, route.row_keys
        s_desc, l_descs = s_TR, term.factors
        if tma:
            s_desc, *l_descs = described(tma, (s_TR, config.rows, RANK), *((each, RANK, part) for each in term.with_rows))
    # More ranks in one product leave too few registers, and ptxas serialises.
    first = RANK if term.factors and tma and not term.dropout and (fp8 or adds_ranks_ahead()) else 0
    programs = min(num_processors(values.device), tiles) if config.persistent else tiles
    _gemm_kernel[(programs,)](
        *matrices, row_scales, column_scales, bias_O, s_desc, *three(l_descs), s_TR, *factors, *columns, *tables,
        num_rows, num_cols, num_inner, values.stride(0), weight.stride(0), out_TO.stride(0),
        s_TR.stride(0) if s_TR is not None else 0, group.first_feature if group is not None else 0,
        BM=config.rows, BN=config.columns, BK=config.inner, GROUP=config.group, PARTS=config.parts, NUM_STAGES=config.stages,
        NUM_PROGRAMS=programs if config.persistent else 0, FLATTEN=config.flatten, BACKWARD=backward, LORA=group is not None,
        MODULES=term.num_modules, RANK=RANK, FIRST=first,
        DROPOUT=term.dropout, WIDE=term.wide, HAS_BIAS=bias_O is not None, TMA=tma, FP8=fp8, INNER_FIRST=inner_first,
        num_warps=config.warps,
    )  # fmt: skip
    return out_TO
