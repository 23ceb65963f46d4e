"""Unpacks a stored weight for a product, at the speed of memory: 4-bit codes or 8-bit values, times a factor for each row, in 16 or 8 bits.

    out_nk = x_nk * factor_n, or transposed out_kn       x_nk = table[code_nk] * absmax_n,k/64 or value_nk

A program takes ROWS rows by BLOCKS blocks of 64 columns, one after another. The table of 16 numbers is read through the L1 cache. Its twin
is packed.unpack_reference; `out` may be any memory that the kernel before has finished with.
"""

from torch import Tensor

from fused_ops.launch.optional_triton import constants, tl, triton
from fused_ops.launch.shapes import cdiv
from fused_ops.lora.fp8 import Fp8Matrix
from fused_ops.lora.nf4 import BLOCK, Nf4Matrix, table_of

(_BLOCK,) = constants(BLOCK)
SIZES = {False: (32, 4), True: (128, 2)}  # transposed -> ROWS, BLOCKS


@triton.jit
def _unpack_kernel(
    values_ptr, absmax_ptr, table_ptr, factors_ptr, out_ptr, num_rows, num_cols,
    NF4: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    if SCALED:
        b_factor = tl.load(factors_ptr + o_row, m_row, 0.0)
    for i_block in tl.static_range(BLOCKS):
        first = (tl.program_id(0) * BLOCKS + i_block) * _BLOCK
        o_col = first + tl.arange(0, _BLOCK)
        mask = m_row[:, None] & (o_col < num_cols)[None, :]
        if NF4:
            o_pair = first // 2 + tl.arange(0, _BLOCK // 2)
            at_pair = values_ptr + o_row[:, None] * (num_cols // 2) + o_pair[None, :]
            b_pair = tl.load(at_pair, m_row[:, None] & (o_pair < num_cols // 2)[None, :], 0).to(tl.int32)
            at_absmax = absmax_ptr + o_row * (num_cols // _BLOCK) + first // _BLOCK
            b_absmax = tl.load(at_absmax, m_row & (0 * o_row + first < num_cols), 0.0)
            b_x = tl.interleave(tl.load(table_ptr + (b_pair >> 4)), tl.load(table_ptr + (b_pair & 15))) * b_absmax[:, None]
        else:
            b_x = tl.load(values_ptr + o_row[:, None] * num_cols + o_col[None, :], mask, 0.0).to(tl.float32)
        if SCALED:
            b_x *= b_factor[:, None]
        b_out = b_x.to(out_ptr.dtype.element_ty)
        if TRANSPOSED:
            tl.store(out_ptr + o_col.to(tl.int64)[:, None] * num_rows + o_row[None, :], tl.trans(b_out), tl.trans(mask))
        else:
            tl.store(out_ptr + o_row[:, None] * num_cols + o_col[None, :], b_out, mask)


def unpack(matrix: Fp8Matrix | Nf4Matrix, factors: Tensor | None, out: Tensor, transposed: bool) -> Tensor:
    """Fill `out`, [N, K] or transposed [K, N], and return it. Stored tensors are contiguous."""
    nf4 = isinstance(matrix, Nf4Matrix)
    values = matrix.codes if nf4 else matrix.values
    num_rows, num_cols = out.shape[::-1] if transposed else out.shape
    assert values.is_contiguous() and values.shape == (num_rows, num_cols // 2 if nf4 else num_cols)
    rows, blocks = SIZES[transposed]
    _unpack_kernel[(cdiv(num_cols, BLOCK * blocks), cdiv(num_rows, rows))](
        values, matrix.absmax if nf4 else None, table_of(out.device) if nf4 else None, factors, out, num_rows, num_cols,
        NF4=nf4, SCALED=factors is not None, TRANSPOSED=transposed, ROWS=rows, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return out
