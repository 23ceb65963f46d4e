"""Counter-based dropout: the same mask bits on every path, in every packing, on every shard.

    key(t)        = high 32 bits of mix64(mix64(seed, sample, epoch) + position * golden)       one per token, on the host
    column(k)     = (k >> 1) * FEATURE                                                  k is the *global* feature
    x(t, k)       = xorshift15(M1 * (key(t) ^ column(k)))                               one for two neighbouring features
    h(t, k, m)    = MODULE[m] * x(t, k) + rotate16(x(t, k))                             one for each module m < 3
    field         = bits 4 to 13 of h for an even feature, bits 20 to 29 for an odd one
    keep(t, k, m) = field >= round(1024 p)
    kept values are scaled by 1 / (1 - round(1024 p) / 1024)

Two neighbouring features and all modules of a merged linear share x, and the two features one h: as 16-bit halves of one register they are
masked and compared together. A half of at most 14 bits is a finite float16, and float16 compares as its bits do, so that two comparisons
are one instruction, whose result masks two bfloat16 values at once (triton/dropout.py): some 8 instructions for two values, 4 more for each
further module. The keys are well mixed on the host, so the hash needs no further rounds. The low bits of a product do not depend on the
high bits of x; adding the rotated x mends that. A mask depends on its job's seed, the sample, the epoch, the position and the feature; not
on neighbours, microbatches, ranks or recomputation. `row_keys` computes the keys of a sample; `keep_mask` is the twin of the kernels.
"""

import numpy as np
import torch
from torch import Tensor

MAX_MODULES = 3
LEVELS = 1024
# As signed 32-bit integers (torch and Triton wrap around on multiplication).
FEATURE = 0x9E3779B1 - (1 << 32)
MULTIPLY_1 = 0x7FEB352D
# By module. Their differences are odd, or twice an odd number, so that the fields of two modules are independent.
MODULE_MULTIPLY = tuple(value - (1 << 32) * (value >= 1 << 31) for value in (0x85EBCA6D, 0xC2B2AE36, 0x27D4EB2F))

_GOLDEN_64 = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def threshold(p: float) -> int:
    """Return the level below which a value is dropped: round(1024 p), at most 1023; raise ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout {p} is not in [0, 1)")
    return min(round(LEVELS * p), LEVELS - 1)


def quantised_p(p: float) -> float:
    """Return the drop probability that is applied: the nearest multiple of 1/1024 (at most 1023/1024)."""
    return threshold(p) / LEVELS


def row_keys(seed: int, sample: int, epoch: int, num_tokens: int) -> np.ndarray:
    """Return one dropout key per token of a sample: int32 [num_tokens], the bits of a uint32."""
    base = 0
    for word in (seed, sample, epoch):
        base = _mix64_int((base ^ (word & _MASK_64)) + _GOLDEN_64)
    with np.errstate(over="ignore"):
        keys = np.uint64(base) + np.arange(num_tokens, dtype=np.uint64) * np.uint64(_GOLDEN_64)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.int32)


def keep_mask(row_keys: Tensor, first_feature: int, num_features: int, module: int, p: float) -> Tensor:
    """Return which values of [T, num_features] are kept: bool, True = kept.

    `row_keys` is int32 [T]; column i is global feature `first_feature + i`; `module` is 0, 1 or 2 within its merged linear.
    """
    if not 0 <= module < MAX_MODULES:
        raise ValueError(f"module {module} has no bits of the hash; there are {MAX_MODULES}")
    features = torch.arange(first_feature, first_feature + num_features, dtype=torch.int32, device=row_keys.device)
    mixed = (row_keys[:, None] ^ ((features >> 1) * FEATURE)[None, :]) * MULTIPLY_1
    x = mixed ^ _shift_right(mixed, 15)
    hashed = x * MODULE_MULTIPLY[module] + (_shift_right(x, 16) | (x << 16))
    field = torch.where(features % 2 == 1, hashed >> 20, hashed >> 4)
    return field.bitwise_and_(LEVELS - 1) >= threshold(p)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int32 right as if it were unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix64_int(x: int) -> int:
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
