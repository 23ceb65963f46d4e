"""The kernels' side of fused_ops.dropout: the same hash, the same bits, on blocks of rows and columns."""

import triton
import triton.language as tl

from fused_ops.dropout import FEATURE, MULTIPLY_1, MULTIPLY_2

_FEATURE = tl.constexpr(FEATURE & 0xFFFFFFFF)
_M1 = tl.constexpr(MULTIPLY_1 & 0xFFFFFFFF)
_M2 = tl.constexpr(MULTIPLY_2 & 0xFFFFFFFF)


@triton.jit
def column_keys(o_col, first=0):
    """Return the key of global features first + o_col: uint32, the shape of o_col."""
    return (first + o_col).to(tl.uint32) * _FEATURE


@triton.jit
def hash_bits(b_keys, b_columns, MODULES: tl.constexpr):
    """Return the hash of every (row key, column key): uint32 [rows, columns], shared by all modules."""
    x = (b_keys[:, None] ^ b_columns[None, :]) * _M1
    x = (x ^ (x >> 15)) * _M2
    if MODULES > 1:
        x = x ^ (x >> 16)
    return x


@triton.jit
def keep(b_hash, threshold, MODULE: tl.constexpr):
    """Return which elements module MODULE keeps, at `threshold` (uint32) of 1024."""
    return ((b_hash << (10 * MODULE)) >> 22) >= threshold
