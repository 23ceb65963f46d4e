"""The input X of a frozen linear, recomputed in backward instead of kept.

A frozen linear needs X for dA alone. X's producer (RMSNorm, SwiGLU) can compute it from what it keeps anyway, so the linear need not
keep X: its backward defers dA to this object. The producer's backward runs next, reads the same rows for its own gradient, writes X in
the same pass and finishes dA.

    forward     x = rms_norm(h, weight, eps, refill=refill)     y = multi_lora_linear(x, ..., refill=refill)
    backward    linear: dS, dB, dX, refill.defer(dA)            norm: dh and x, refill.finish(x)

One Refill serves one producer and one linear for one microbatch. No other module reads the producer's output.
"""

from collections.abc import Callable

from torch import Tensor


class Refill:
    """Passes X from its producer's backward to the linear that read it."""

    __slots__ = ("_work",)

    def __init__(self):
        self._work: Callable[[Tensor], None] | None = None

    def defer(self, work: Callable[[Tensor], None]) -> None:
        """Keep work that needs X until its producer has recomputed it."""
        assert self._work is None, "this Refill serves a linear already"
        self._work = work

    def finish(self, x: Tensor) -> None:
        """Do the work that waited for X, [T_local, K] after leading dimensions are merged."""
        assert self._work is not None, "no work waits for this X"
        work, self._work = self._work, None
        work(x.flatten(0, -2))


def wanted(refill: Refill | None) -> bool:
    """Whether a producer's backward must recompute its output."""
    return refill is not None and refill._work is not None
