"""Counter-based dropout: the same mask bits on every path, in every packing, on every shard.

    key(t)     = high 32 bits of mix64(mix64(seed, sample, epoch) + position * golden)      one per token, on the host
    column(k)  = k * FEATURE                                                          k is the *global* feature
    h(t, k)    = xorshift16(M2 * xorshift15(M1 * (key(t) ^ column(k))))                     two multiplies per element
    keep(t, k) = bits 22 - 10 m .. 31 - 10 m of h >= round(1024 p)                          module m < 3 of a merged linear
    kept values are scaled by 1 / (1 - round(1024 p) / 1024)

One hash serves all modules of a merged linear. The keys are well mixed on the host, so the hash needs no more; the last xorshift
leaves module 0's bits as they are, so kernels skip it where there is one module (five instructions, a comparison and a select). A
column's key is one multiply, because a thread of a matrix product holds few rows of each column. A mask depends on its job's seed,
the sample, the epoch, the position and the feature; not on
neighbours, microbatches, ranks or recomputation. `row_keys` makes the keys of a sample; `keep_mask` is the twin of the kernels.
"""

import numpy as np
import torch
from torch import Tensor

MAX_MODULES = 3
LEVELS = 1024
# As signed 32-bit integers (torch and Triton wrap around on multiplication).
FEATURE = 0x9E3779B1 - (1 << 32)
MULTIPLY_1 = 0x7FEB352D
MULTIPLY_2 = 0x846CA68B - (1 << 32)

_GOLDEN_64 = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def threshold(p: float) -> int:
    """Return the level below which a value is dropped: round(1024 p), at most 1023; raise ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout {p} is not in [0, 1)")
    return min(round(LEVELS * p), LEVELS - 1)


def quantised_p(p: float) -> float:
    """Return the drop probability that is really applied: the nearest multiple of 1/1024 (at most 1023/1024)."""
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
    hashed = (row_keys[:, None] ^ (features * FEATURE)[None, :]) * MULTIPLY_1
    hashed = (hashed ^ _shift_right(hashed, 15)) * MULTIPLY_2
    hashed = hashed ^ _shift_right(hashed, 16)
    return _shift_right(hashed, 22 - 10 * module).bitwise_and_(LEVELS - 1) >= threshold(p)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int32 right as if it were unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix64_int(x: int) -> int:
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
