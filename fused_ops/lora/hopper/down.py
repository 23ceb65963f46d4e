"""S = c' (M * X) A^T with dropout, as triton/down.py, on Hopper: masks are computed in the registers that the tensor cores read.

A program owns up to BM rows of one segment (`Route.items`), RANK ranks of each module, and a share of the inner dimension. One warp
fills a ring of blocks of X and A by TMA. The others read X from there as the operand of their products, 16 rows a warp, hash each value
once, and mask a copy for each module in registers: no masked copy goes through memory. Rows of X do not mix, so that neighbours' rows may
be loaded; they are not written. Shares of the inner dimension are float32 partial sums, which a second kernel adds in ascending order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_ops.launch.early_launch import pdl
from fused_ops.launch.shapes import cdiv, num_processors, rank_class
from fused_ops.lora.adapters import A_ROW, ADAPTER_FIELDS, LEVEL, LORA_RANK, MODULE_FIELDS, S_COLUMN, S_WIDTH, LoraGroup
from fused_ops.lora.hopper.dropout import drop_features, level_of, mix, pair_keys
from fused_ops.lora.hopper.layouts import describe
from fused_ops.lora.hopper.masked import ACC_COLUMNS, ACC_ROWS, LEFT, LEFT_COLUMNS, LEFT_ROWS, RIGHT, WARPS, first_ranks, zeros
from fused_ops.lora.hopper.names import async_load
from fused_ops.lora.hopper.ring import release_loaded, ring_barriers
from fused_ops.lora.route import ADAPTER, END, FIRST, ITEM_FIELDS, Route

BM, BK = gl.constexpr(64), gl.constexpr(64)


@gluon.jit
def _loader(ring, descs, num_blocks, first, begin, a_rows, RANK: gl.constexpr, MODULES: gl.constexpr, STAGES: gl.constexpr):
    """Load every block of X, and of A for each module."""
    x_bufs, a_bufs, full_bars, empty_bars = ring
    x_desc, a_desc = descs
    for i in range(num_blocks):
        stage, i_k = i % STAGES, (begin + i) * BK
        full_bar = full_bars.index(stage)
        mbarrier.wait(empty_bars.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full_bar, (BM + MODULES * RANK) * BK * 2)
        async_load(x_desc, [first, i_k], full_bar, x_bufs.index(stage))
        for m in gl.static_range(MODULES):
            async_load(a_desc, [a_rows[m], i_k], full_bar, a_bufs.index(stage * MODULES + m))


@gluon.jit
def _multiplier(
    ring, out_ptr, partial_ptr, adapter_ptr, scale_ptr, keys_ptr, num_rows, out_stride, first_feature, num_blocks, first, end, begin,
    i_rank, RANK: gl.constexpr, MODULES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply every block, and write what belongs to the item and the adapter."""
    x_bufs, a_bufs, full_bars, empty_bars = ring
    rank, level, scale = gl.load(adapter_ptr + LORA_RANK), level_of(gl.load(adapter_ptr + LEVEL)), gl.load(scale_ptr)
    o_row = first + gl.arange(0, BM, LEFT_ROWS)
    b_keys = gl.expand_dims(gl.load(keys_ptr + o_row, o_row < num_rows, 0).to(gl.uint32, bitcast=True), 1)
    b_accs = zeros(MODULES, BM, RANK)
    for i in range(num_blocks):
        stage = i % STAGES
        b_pairs = gl.expand_dims(pair_keys(first_feature + (begin + i) * BK + gl.arange(0, BK, LEFT_COLUMNS)), 0)
        b_hash = mix(b_keys, b_pairs)
        mbarrier.wait(full_bars.index(stage), (i // STAGES) & 1)
        b_x = x_bufs.index(stage).load(LEFT)
        b_sums = ()
        for m in gl.static_range(MODULES):
            b_a = a_bufs.index(stage * MODULES + m).permute((1, 0)).load(RIGHT)
            b_sums += (mma_v2(drop_features(b_x, b_hash, level, m), b_a, b_accs[m]),)
        b_accs = b_sums
        release_loaded(empty_bars.index(stage))
    for m in gl.static_range(MODULES):
        column = gl.load(adapter_ptr + S_COLUMN + m * MODULE_FIELDS)
        ranks = gl.where(column >= 0, rank, 0)
        _put(out_ptr, partial_ptr, num_rows, out_stride, first, end, column, ranks, i_rank, scale, b_accs[m], RANK)


@gluon.jit
def _put(out_ptr, partial_ptr, num_rows, out_stride, first, end, column, rank, i_rank, scale, b_acc, RANK: gl.constexpr):
    """Write one module's columns: of S where the inner dimension is not cut, else of this share's partial sums."""
    o_row, o_r = first + gl.arange(0, BM, ACC_ROWS), i_rank + gl.arange(0, RANK, ACC_COLUMNS)
    at = gl.expand_dims(o_row.to(gl.int64), 1) * out_stride + gl.expand_dims(column + o_r, 0)
    m_in = gl.expand_dims(o_row < end, 1) & gl.expand_dims(o_r < rank, 0)
    if gl.num_programs(1) == 1:
        gl.store(out_ptr + at, (b_acc * scale).to(gl.bfloat16), m_in)
    else:
        gl.store(partial_ptr + gl.program_id(1) * num_rows.to(gl.int64) * out_stride + at, b_acc, m_in)


@gluon.jit(do_not_specialize=["num_rows", "share_blocks", "out_stride", "first_feature"])
def _hopper_down_kernel(
    x_desc, a_desc, out_ptr, partial_ptr, items_ptr, adapters_ptr, scales_ptr, keys_ptr,
    num_rows, num_inner, share_blocks, out_stride, first_feature,
    RANK: gl.constexpr, MODULES: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], x_desc.layout)
    a_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * MODULES, RANK, BK], a_desc.layout)
    full_bars, empty_bars = ring_barriers(STAGES, 1)
    ring = (x_bufs, a_bufs, full_bars, empty_bars)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    item_ptr = items_ptr + gl.program_id(0) * ITEM_FIELDS
    first, end, adapter = gl.load(item_ptr + FIRST), gl.load(item_ptr + END), gl.load(item_ptr + ADAPTER)
    adapter_ptr = adapters_ptr + adapter * ADAPTER_FIELDS
    i_rank = gl.program_id(2) * RANK
    a_rows = first_ranks(adapter_ptr, i_rank, A_ROW, MODULES)
    begin = gl.program_id(1) * share_blocks
    num_blocks = min(share_blocks, gl.cdiv(num_inner, BK) - begin)
    num_blocks = gl.where(i_rank < gl.load(adapter_ptr + LORA_RANK), num_blocks, 0)
    gl.warp_specialize(
        [
            (_multiplier, (
                ring, out_ptr, partial_ptr, adapter_ptr, scales_ptr + adapter, keys_ptr, num_rows, out_stride, first_feature,
                num_blocks, first, end, begin, i_rank, RANK, MODULES, STAGES,
            )),
            (_loader, (ring, (x_desc, a_desc), num_blocks, first, begin, a_rows, RANK, MODULES, STAGES)),
        ], [1], [24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_shares", "stride"])
def _add_shares_kernel(
    out_ptr, partial_ptr, items_ptr, adapters_ptr, scales_ptr, num_rows, num_shares, stride,
    BM: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """S = c' times the sum of the shares, in ascending order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item_ptr = items_ptr + tl.program_id(0) * ITEM_FIELDS
    first, end, adapter = tl.load(item_ptr + FIRST), tl.load(item_ptr + END), tl.load(item_ptr + ADAPTER)
    o_col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    o_row = first + tl.arange(0, BM)
    at = o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
    m_in = (o_row < end)[:, None] & (o_col < tl.load(adapters_ptr + adapter * ADAPTER_FIELDS + S_WIDTH))[None, :]
    b_sum = tl.zeros([BM, COLUMNS], tl.float32)
    for i in tl.range(num_shares, num_stages=1):
        b_sum += tl.load(partial_ptr + i * num_rows.to(tl.int64) * stride + at, m_in, 0.0)
    tl.store(out_ptr + at, (b_sum * tl.load(scales_ptr + adapter)).to(out_ptr.dtype.element_ty), m_in)


def hopper_down(x_TK: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return S [T, width] in x's dtype, as triton/down.py's down: for X [T, K] and A that `suits_hopper`, and a group with dropout."""
    s_TR = torch.empty(x_TK.shape[0], group.width, dtype=x_TK.dtype, device=x_TK.device)
    num_rows, num_inner = x_TK.shape
    modules = group.num_modules
    rank = rank_class(group.max_padded_rank, 64 if modules == 1 else 32)
    num_items, num_ranks = route.num_items(BM.value), cdiv(group.max_padded_rank, rank)
    if not num_items:
        return s_TR
    num_shares = min(max(num_processors(x_TK.device) // num_items, 1), cdiv(num_inner, 512))
    num_blocks = cdiv(num_inner, BK.value)
    share_blocks = cdiv(num_blocks, num_shares)
    num_shares = cdiv(num_blocks, share_blocks)
    partial = torch.empty(num_shares if num_shares > 1 else 0, *s_TR.shape, dtype=torch.float32, device=x_TK.device)

    stage_bytes = (BM.value + modules * rank) * BK.value * 2
    _hopper_down_kernel[(num_items, num_shares, num_ranks)](
        describe(x_TK, BM.value, BK.value), describe(group.a_RK, rank, BK.value),
        s_TR, partial, route.items(BM.value), group.adapter_table, group.scale_table, route.row_keys,
        num_rows, num_inner, share_blocks, s_TR.stride(0), group.first_feature,
        RANK=rank, MODULES=modules, STAGES=8 if 8 * stage_bytes <= 112 << 10 else 4, num_warps=WARPS.value, maxnreg=128,
        **pdl(x_TK),
    )  # fmt: skip
    if num_shares > 1:
        _add_shares_kernel[(num_items, cdiv(group.width, 16))](
            s_TR, partial, route.items(BM.value), group.adapter_table, group.scale_table, num_rows, num_shares, s_TR.stride(0),
            BM=BM.value, COLUMNS=16, num_warps=4, **pdl(x_TK),
        )  # fmt: skip
    return s_TR
