"""The frozen GEMM over 8-bit operands with the LoRA term in its epilogue: Y = X W^T (+ bias) + S B^T, dX = dY W + M * (dS A).

X or dY arrives rounded by rows, W in the copy whose rows are outputs (fp8.py), so both directions read both operands along the reduced
dimension, as Hopper's 8-bit tensor cores require. The accumulator is multiplied by the two scales after the K loop; the LoRA
term, in 16 bits, is added by the functions of lora_gemm.py. Sums are the tensor core's own, with about 14 bits of fraction: finer than
the operands' 4, and no second accumulator takes registers.

Names: input [T, I] times weight [O, I] gives output [T, O].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_ops.adapters import LoraGroup
from fused_ops.fp8 import Fp8Matrix
from fused_ops.gemm_config import GemmConfig, fp8_config
from fused_ops.lora_gemm import RANK, _add_lora, _load_owner, _split, _store, lora_term, ranks_ahead
from fused_ops.route import Route
from fused_ops.shapes import num_processors, uses_tma


@triton.jit(do_not_specialize=["num_rows", "s_stride", "first_feature"])
def _fp8_gemm_kernel(
    input, weight, output, row_scales_ptr, column_scales_ptr, bias_ptr, s, lora0, lora1, lora2, s_ptr, lora_ptr, offset1, offset2,
    l_strides, starts, stops, tiles_ptr, segments_ptr, adapters_ptr, keys_ptr, num_rows, num_cols, num_inner, i_stride, w_stride, o_stride,
    s_stride, first_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, NUM_STAGES: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, BACKWARD: tl.constexpr, LORA: tl.constexpr, MODULES: tl.constexpr,
    RANK: tl.constexpr, FIRST: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    factors = (lora0, lora1, lora2)
    num_m, num_n = tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN)
    stride = num_m * num_n if NUM_PROGRAMS == 0 else NUM_PROGRAMS
    for i_tile in tl.range(tl.program_id(0), num_m * num_n, stride, num_stages=1, flatten=FLATTEN):
        group_first = (i_tile // (GROUP * num_n)) * GROUP
        group_rows = min(num_m - group_first, GROUP)
        i_m = group_first + (i_tile % (GROUP * num_n)) % group_rows
        i_n = (i_tile % (GROUP * num_n)) // group_rows
        o_row = i_m * BM + tl.arange(0, BM)
        b_acc = tl.zeros([BM, BN], tl.float32)
        for i_k in tl.range(0, tl.cdiv(num_inner, BK), num_stages=NUM_STAGES):
            if TMA:
                b_in = input.load([i_m * BM, i_k * BK])
                b_w = weight.load([i_n * BN, i_k * BK])
            else:
                o_k = i_k * BK + tl.arange(0, BK)
                o_c = i_n * BN + tl.arange(0, BN)
                in_at = input + o_row.to(tl.int64)[:, None] * i_stride + o_k[None, :]
                b_in = tl.load(in_at, (o_row < num_rows)[:, None] & (o_k < num_inner)[None, :], 0.0)
                w_at = weight + o_c.to(tl.int64)[:, None] * w_stride + o_k[None, :]
                b_w = tl.load(w_at, (o_c < num_cols)[:, None] & (o_k < num_inner)[None, :], 0.0)
            b_acc = tl.dot(b_in, b_w.T, b_acc)

        # First, so that the wait for the accumulator is not inside a branch (which would serialise the K loop).
        parts = _split(b_acc, PARTS)
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
            b_column_scales = tl.load(column_scales_ptr + o_col, o_col < num_cols, 0.0)
            b_part = parts[i_part] * b_row_scales[:, None] * b_column_scales[None, :]
            if FIRST > 0:
                b_part = tl.dot(b_s, l_parts[i_part], b_part, input_precision="ieee")
            if LORA:
                b_part = _add_lora(
                    b_part, i_m * BM, i_col, o_row, o_col, num_cols, tl.load(tiles_ptr + i_m * 2), tl.load(tiles_ptr + i_m * 2 + 1), done,
                    s, s_stride, factors, l_strides, starts, stops, segments_ptr, adapters_ptr, keys_ptr, first_feature,
                    BACKWARD, MODULES, RANK, DROPOUT, WIDE, TMA,
                )  # fmt: skip
            _store(output, bias_ptr, b_part, i_m * BM, i_col, o_row, o_col, num_rows, num_cols, o_stride, HAS_BIAS, TMA)


def fp8_gemm(
    input_TI: Fp8Matrix,
    weight_OI: Fp8Matrix,
    bias_O: Tensor | None,
    s_TR: Tensor | None,
    group: LoraGroup | None,
    route: Route | None,
    backward: bool,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """Return input weight^T (+ bias) + S B^T, or with `backward` input weight^T + M * (S A), in `dtype`.

    weight_OI is the copy whose rows are outputs. s_TR, group and route are None together.
    """
    values, weight = input_TI.values, weight_OI.values
    (num_rows, num_inner), num_cols = values.shape, weight.shape[0]
    out_TO = torch.empty(num_rows, num_cols, dtype=dtype, device=values.device)
    if num_rows == 0:
        return out_TO
    term, lora = lora_term(group, backward), group is not None
    tma = uses_tma(values, weight, out_TO, *(t for t in term.factors if len(t)))
    if config is None:
        small = not tma or dtype == torch.float32
        config = fp8_config(values, num_cols, backward, small, term.width, term.dropout, group.num_modules if lora else 0)
    tiles = -(-num_rows // config.rows) * -(-num_cols // config.columns)
    part, matrices = config.columns // config.parts, (values, weight, out_TO)
    if tma:
        boxes = (config.rows, config.inner), (config.columns, config.inner), (config.rows, part)
        matrices = tuple(TensorDescriptor.from_tensor(t, list(box)) for t, box in zip(matrices, boxes, strict=True))
    programs = min(num_processors(values.device), tiles) if config.persistent else tiles
    _fp8_gemm_kernel[(programs,)](
        *matrices, input_TI.scales, weight_OI.scales, bias_O,
        *term.operands(s_TR, config.rows, part, tma), *term.tables(s_TR, group, route, config.rows),
        num_rows, num_cols, num_inner, values.stride(0), weight.stride(0), out_TO.stride(0),
        s_TR.stride(0) if lora else 0, group.first_feature if lora else 0,
        BM=config.rows, BN=config.columns, BK=config.inner, GROUP=config.group, PARTS=config.parts, NUM_STAGES=config.stages,
        NUM_PROGRAMS=programs if config.persistent else 0, FLATTEN=config.flatten, BACKWARD=backward, LORA=lora,
        MODULES=term.num_modules, RANK=RANK, FIRST=ranks_ahead(term, tma), DROPOUT=term.dropout, WIDE=term.wide,
        HAS_BIAS=bias_O is not None, TMA=tma, num_warps=config.warps,
    )  # fmt: skip
    return out_TO
