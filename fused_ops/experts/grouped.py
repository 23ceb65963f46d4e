"""The grouped product in Triton: each row times the matrix of its expert, forward X W^T and backward dY W, by one kernel body.

Programs are persistent and take every n-th tile [BM, BN] of the route's table, in which no tile has rows of two experts; how many
tiles there are is read on the device. A tile's last rows may be the next expert's, or beyond the end: they are computed and not stored.
The reduced dimension is summed in blocks of BK from its beginning, whatever rows a tile has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.experts.route import BLOCK, ExpertRoute, most_tiles
from fused_ops.launch.shapes import cdiv, num_processors, uses_tma
from fused_ops.lora.triton.parts import described, halves

COLUMNS = 256
INNER = 64


@triton.jit(do_not_specialize=["num_rows", "most"])
def _grouped_kernel(
    x, weight, out_ptr, tiles_ptr, num_rows, num_cols, num_inner, most, weight_rows, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
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
            out_at = out_ptr + o_row.to(tl.int64)[:, None] * num_cols + o_part[None, :]
            tl.store(out_at, parts[i_part].to(out_ptr.dtype.element_ty), (o_row < end)[:, None] & (o_part < num_cols)[None, :])


def grouped(x_RI: Tensor, weight_EOI: Tensor, route: ExpertRoute, transposed: bool = False) -> Tensor:
    """Return each row times the matrix of its expert, X W^T; `transposed`: X W, of X [R, O]."""
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
        BM=BLOCK, BN=columns, BK=inner, STAGES=3, FLATTEN=tma, TRANSPOSED=transposed, TMA=tma, num_warps=8,
    )  # fmt: skip
    return out
