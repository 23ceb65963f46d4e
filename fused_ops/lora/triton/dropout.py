"""The kernels' side of fused_ops.lora.dropout: the same hash, the same bits, on blocks of rows and columns, in any layout.

hopper/dropout.py does the same for a kernel that knows which two values share a register.
"""

import triton
import triton.language as tl

from fused_ops.lora.dropout import FEATURE, MODULE_MULTIPLY, MULTIPLY_1

_FEATURE = tl.constexpr(FEATURE & 0xFFFFFFFF)
_M1 = tl.constexpr(MULTIPLY_1 & 0xFFFFFFFF)
_MODULES = tl.constexpr(tuple(value & 0xFFFFFFFF for value in MODULE_MULTIPLY))


@triton.jit
def column_keys(o_col, first=0):
    """Return what the hash needs of global features first + o_col, `first` even: (key of the pair, whether odd), the shape of o_col.

    Where `first` alone is unknown at compile time, the compiler sees that neighbours share their key, and computes their hash once.
    """
    return ((first >> 1) + (o_col >> 1)).to(tl.uint32) * _FEATURE, (o_col & 1) == 1


@triton.jit
def hash_bits(b_keys, b_columns):
    """Return (x, odd): x uint32 [rows, columns] of every row key and pair of features, and which columns [columns] are odd."""
    pair, odd = b_columns
    x = (b_keys[:, None] ^ pair[None, :]) * _M1
    return x ^ (x >> 15), odd


@triton.jit
def keep(b_hash, threshold, MODULE: tl.constexpr):
    """Return which elements module MODULE keeps, at `threshold` (uint32) of 1024; at 1024 none."""
    x, odd = b_hash
    h = x * tl.full([], _MODULES[MODULE], tl.uint32) + ((x >> 16) | (x << 16))
    return ((h >> tl.where(odd, 20, 4).to(tl.uint32)[None, :]) & 1023) >= threshold
