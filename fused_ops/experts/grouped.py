"""The grouped product in Triton: each row times the matrix of its expert, forward X W^T and backward dY W, by one kernel body.

Programs are persistent and take every n-th tile [BM, BN] of the route's table, in which no tile has rows of two experts; how many
tiles there are is read on the device. A tile's last rows may be the next expert's, or beyond the end: they are computed and not stored.
The reduced dimension is summed in blocks of BK from its beginning, whatever rows a tile has. Of each job that has rows in a tile the
adapter's term is added to these rows alone, before the sum is rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.experts.adapters import A_ROW, ADAPTER_FIELDS, B_ROW, LEVEL, MODULE_FIELDS, RANK, Lora
from fused_ops.experts.route import BLOCK, ExpertRoute, most_tiles
from fused_ops.launch.shapes import cdiv, num_processors, rank_class, uses_tma
from fused_ops.lora.route import ADAPTER, SEGMENT_FIELDS
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep
from fused_ops.lora.triton.parts import described, halves

COLUMNS = 256
INNER = 64


@triton.jit(do_not_specialize=["num_rows", "most"])
def _grouped_kernel(
    x, weight, out_ptr, tiles_ptr, num_rows, num_cols, num_inner, most, weight_rows, x_stride, w_stride,
    s_ptr, lora1_ptr, lora2_ptr, keys_ptr, bounds_ptr, segments_ptr, adapters_ptr, num_segments, width, max_rank, first_feature,
    expert_stride1, expert_stride2, start2,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr, MODULES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(num_cols, BN)
    num_tiles = tl.load(tiles_ptr + 3 * most) * num_n
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1, flatten=FLATTEN):
        tile_ptr, i_col = tiles_ptr + 3 * (i_tile // num_n), i_tile % num_n * BN
        w_row, i_row, end = tl.load(tile_ptr) * weight_rows, tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
        o_row, o_col = i_row + tl.arange(0, BM), i_col + tl.arange(0, BN)
        b_acc = tl.zeros([BM, BN], tl.float32)
        for i_k in tl.range(0, tl.cdiv(num_inner, BK), num_stages=STAGES):
            if TMA:
                b_x = x.load([i_row, i_k * BK])
                b_w = weight.load([w_row + i_k * BK, i_col]) if TRANSPOSED else weight.load([w_row + i_col, i_k * BK]).T
            else:
                o_k = i_k * BK + tl.arange(0, BK)
                x_at = x + o_row.to(tl.int64)[:, None] * x_stride + o_k[None, :]
                b_x = tl.load(x_at, (o_row < num_rows)[:, None] & (o_k < num_inner)[None, :], 0.0)
                if TRANSPOSED:
                    w_at = weight + (w_row + o_k).to(tl.int64)[:, None] * w_stride + o_col[None, :]
                else:
                    w_at = weight + (w_row + o_col).to(tl.int64)[None, :] * w_stride + o_k[:, None]
                b_w = tl.load(w_at, (o_k < num_inner)[:, None] & (o_col < num_cols)[None, :], 0.0)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
        parts = halves(b_acc)
        for i_part in tl.static_range(2):
            o_part = i_col + i_part * (BN // 2) + tl.arange(0, BN // 2)
            b_part = parts[i_part]
            if MODULES:
                b_part = _add_adapters(
                    b_part, o_row, o_part, i_row, end, tl.load(tile_ptr), s_ptr, lora1_ptr, lora2_ptr, keys_ptr, bounds_ptr, segments_ptr,
                    adapters_ptr, num_segments, width, max_rank, first_feature, expert_stride1, expert_stride2, start2, num_cols,
                    TRANSPOSED, MODULES, R, DROPOUT,
                )  # fmt: skip
            out_at = out_ptr + o_row.to(tl.int64)[:, None] * num_cols + o_part[None, :]
            tl.store(out_at, b_part.to(out_ptr.dtype.element_ty), (o_row < end)[:, None] & (o_part < num_cols)[None, :])


@triton.jit
def _add_adapters(
    b_part, o_row, o_col, i_row, end, expert, s_ptr, lora1_ptr, lora2_ptr, keys_ptr, bounds_ptr, segments_ptr, adapters_ptr,
    num_segments, width, max_rank, first_feature, expert_stride1, expert_stride2, start2, num_cols,
    TRANSPOSED: tl.constexpr, MODULES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return a part of a tile of an expert, with S L of each job that has rows there added to these."""
    o_r = tl.arange(0, R)
    for i_segment in range(num_segments):
        bounds_at = bounds_ptr + 2 * (expert * num_segments + i_segment)
        first, stop = tl.load(bounds_at), tl.load(bounds_at + 1)
        if (first < end) & (stop > i_row) & (first < stop):
            adapter_ptr = adapters_ptr + tl.load(segments_ptr + i_segment * SEGMENT_FIELDS + ADAPTER) * ADAPTER_FIELDS
            rank, level = tl.load(adapter_ptr + RANK), tl.load(adapter_ptr + LEVEL).to(tl.uint32)
            m_row = (o_row >= first) & (o_row < stop)
            for m in tl.static_range(MODULES):
                l_row = tl.load(adapter_ptr + (A_ROW if TRANSPOSED else B_ROW) + m * MODULE_FIELDS)
                if TRANSPOSED:
                    l_ptr, l_cols, o_l = lora1_ptr + expert.to(tl.int64) * expert_stride1, num_cols, o_col
                elif m == 0:
                    l_ptr, l_cols, o_l = lora1_ptr + expert.to(tl.int64) * expert_stride1, start2, o_col
                else:
                    l_ptr, l_cols, o_l = lora2_ptr + expert.to(tl.int64) * expert_stride2, num_cols - start2, o_col - start2
                m_r = o_r < tl.where(l_row >= 0, rank, 0)
                s_at = s_ptr + o_row.to(tl.int64)[:, None] * width + (m * max_rank + o_r)[None, :]
                b_s = tl.load(s_at, m_row[:, None] & m_r[None, :], 0.0)
                b_l = tl.load(
                    l_ptr + (l_row + o_r)[:, None] * l_cols + o_l[None, :], m_r[:, None] & ((o_l >= 0) & (o_l < l_cols))[None, :], 0.0
                )
                m_add = m_row[:, None]
                if DROPOUT:
                    b_keys = tl.load(keys_ptr + o_row, m_row, 0).to(tl.uint32, bitcast=True)
                    m_add = m_add & keep(hash_bits(b_keys, column_keys(o_col, first_feature)), level, m)
                b_part += tl.where(m_add, tl.dot(b_s, b_l, input_precision="ieee"), 0.0)
    return b_part


def grouped(x_RI: Tensor, weight_EOI: Tensor, route: ExpertRoute, transposed: bool = False, lora: Lora | None = None) -> Tensor:
    """Return each row times the matrix of its expert, X W^T, plus S B^T; `transposed`: X W plus M * (dS A), of X [R, O]."""
    num_experts, weight_rows, weight_columns = weight_EOI.shape
    num_cols = weight_columns if transposed else weight_rows
    num_rows, num_inner = x_RI.shape
    out = x_RI.new_empty(num_rows, num_cols)
    if not num_rows:
        return out
    weight = weight_EOI.view(-1, weight_columns)
    tma = uses_tma(x_RI, weight)
    small = not tma or x_RI.dtype == torch.float32
    columns, inner = (COLUMNS // 2, INNER // 2) if small else (COLUMNS, INNER)
    x, weight_or_box = described(tma, (x_RI, BLOCK, inner), (weight, *((inner, columns) if transposed else (columns, inner))))
    most = most_tiles(num_rows, num_experts)
    programs = min(num_processors(x_RI.device), most * cdiv(num_cols, columns))
    _grouped_kernel[(programs,)](
        x, weight_or_box, out, route.tiles, num_rows, num_cols, num_inner, most, weight_rows, x_RI.stride(0), weight.stride(0),
        *_lora_arguments(lora, transposed, num_cols),
        BM=BLOCK, BN=columns, BK=inner, STAGES=3, FLATTEN=tma and lora is None, TRANSPOSED=transposed, TMA=tma,
        MODULES=lora.group.num_modules if lora else 0, R=rank_class(lora.group.max_rank) if lora else 0,
        DROPOUT=lora is not None and transposed and any(lora.group.adapters.thresholds), num_warps=8,
    )  # fmt: skip
    return out


def _lora_arguments(lora: Lora | None, transposed: bool, num_cols: int) -> tuple:
    """Return the kernel's arguments from s_ptr to start2."""
    if lora is None:
        return *[None] * 7, *[0] * 7
    s_RW, group, rows = lora
    factors = [group.a_ERK] if transposed else list(group.b_ERN)
    start2 = num_cols if transposed or len(factors) == 1 else group.columns[1][0]
    tables = (rows.keys_R, rows.bounds, rows.segments, group.adapter_table, len(rows.segments), s_RW.stride(0), group.max_rank)
    return s_RW, factors[0], factors[-1], *tables, group.first_feature, factors[0].stride(0), factors[-1].stride(0), start2
