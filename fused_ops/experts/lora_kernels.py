"""Triton kernels of the experts' adapters: S and dS of blocks of rows, dA and dB of stretches.

A block and a stretch have rows of one expert and one job (rows_by_job.py). The sums of a stretch begin at its first row and belong to
one program, which adds them to the gradient: nothing is added atomically, and no row of another job takes part.
"""

from fused_ops.experts.adapters import ADAPTER_FIELDS, LEVEL, MODULE_FIELDS, RANK
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.lora.route import ADAPTER, SEGMENT_FIELDS
from fused_ops.lora.triton.dropout import column_keys, hash_bits, keep


@triton.jit
def expert_down_kernel(
    x_ptr, factor_ptr, out_ptr, keys_ptr, blocks_ptr, segments_ptr, adapters_ptr, scales_ptr,
    num_segments, num_inner, x_stride, x_start, expert_stride, width, max_rank, first_feature,
    FIELD: tl.constexpr, MODULE: tl.constexpr, MODULES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write scale * (M * X) L^T, L the rows of A, or of B transposed, of modules from MODULE on."""
    block_ptr = blocks_ptr + 3 * tl.program_id(0)
    stretch, first, end = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    if first < end:
        adapter = tl.load(segments_ptr + stretch % num_segments * SEGMENT_FIELDS + ADAPTER)
        adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
        rank = tl.load(adapter_ptr + RANK)
        expert_ptr = factor_ptr + (stretch // num_segments).to(tl.int64) * expert_stride
        o_row, o_r = first + tl.arange(0, BM), tl.arange(0, R)
        x_at = x_ptr + o_row.to(tl.int64)[:, None] * x_stride + x_start
        b_keys = tl.load(keys_ptr + o_row, o_row < end, 0).to(tl.uint32, bitcast=True)
        level = tl.load(adapter_ptr + LEVEL).to(tl.uint32)
        for m in tl.static_range(MODULE, MODULE + MODULES):
            l_row = tl.load(adapter_ptr + FIELD + m * MODULE_FIELDS)
            if l_row >= 0:
                b_acc = tl.zeros([BM, R], tl.float32)
                for i_k in range(0, num_inner, BK):
                    o_k = i_k + tl.arange(0, BK)
                    b_x = tl.load(x_at + o_k[None, :], (o_row < end)[:, None] & (o_k < num_inner)[None, :], 0.0)
                    if DROPOUT:
                        b_x = tl.where(keep(hash_bits(b_keys, column_keys(o_k, first_feature)), level, m), b_x, 0.0)
                    l_at = expert_ptr + (l_row + o_r)[None, :] * num_inner + o_k[:, None]
                    b_l = tl.load(l_at, (o_r < rank)[None, :] & (o_k < num_inner)[:, None], 0.0)
                    b_acc = tl.dot(b_x, b_l, b_acc, input_precision="ieee")
                b_acc *= tl.load(scales_ptr + adapter)
                out_at = out_ptr + o_row.to(tl.int64)[:, None] * width + (m * max_rank + o_r)[None, :]
                tl.store(out_at, b_acc.to(out_ptr.dtype.element_ty), (o_row < end)[:, None] & (o_r < rank)[None, :])


@triton.jit
def expert_grad_kernel(
    x_ptr, s_ptr, grad_ptr, keys_ptr, bounds_ptr, segments_ptr, adapters_ptr,
    num_segments, num_cols, x_stride, x_start, expert_stride, width, max_rank, first_feature,
    FIELD: tl.constexpr, MODULE: tl.constexpr, MODULES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add S^T (M * X) over a stretch's rows to a block of columns of the gradients of modules from MODULE on."""
    stretch = tl.program_id(0)
    first, end = tl.load(bounds_ptr + 2 * stretch), tl.load(bounds_ptr + 2 * stretch + 1)
    if first < end:
        adapter_ptr = adapters_ptr + tl.load(segments_ptr + stretch % num_segments * SEGMENT_FIELDS + ADAPTER) * ADAPTER_FIELDS
        rank, level = tl.load(adapter_ptr + RANK), tl.load(adapter_ptr + LEVEL).to(tl.uint32)
        expert_ptr = grad_ptr + (stretch // num_segments).to(tl.int64) * expert_stride
        o_col, o_r = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, R)
        for m in tl.static_range(MODULE, MODULE + MODULES):
            g_row = tl.load(adapter_ptr + FIELD + m * MODULE_FIELDS)
            if g_row >= 0:
                b_acc = tl.zeros([R, BN], tl.float32)
                for i_row in range(first, end, BM):
                    o_row = i_row + tl.arange(0, BM)
                    x_at = x_ptr + o_row.to(tl.int64)[:, None] * x_stride + (x_start + o_col)[None, :]
                    b_x = tl.load(x_at, (o_row < end)[:, None] & (o_col < num_cols)[None, :], 0.0)
                    if DROPOUT:
                        b_keys = tl.load(keys_ptr + o_row, o_row < end, 0).to(tl.uint32, bitcast=True)
                        b_x = tl.where(keep(hash_bits(b_keys, column_keys(o_col, first_feature)), level, m), b_x, 0.0)
                    s_at = s_ptr + o_row.to(tl.int64)[None, :] * width + (m * max_rank + o_r)[:, None]
                    b_s = tl.load(s_at, (o_row < end)[None, :] & (o_r < rank)[:, None], 0.0)
                    b_acc = tl.dot(b_s, b_x, b_acc, input_precision="ieee")
                grad_at = expert_ptr + (g_row + o_r)[:, None] * num_cols + o_col[None, :]
                mask = (o_r < rank)[:, None] & (o_col < num_cols)[None, :]
                tl.store(grad_at, tl.load(grad_at, mask, 0.0) + b_acc, mask)
