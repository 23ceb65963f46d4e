"""A SwiGLU done by the linears around it, where their kernels can: its output by the one that makes gate | up, its gradient by the next.

    forward     up:   gate | up = X W^T, gated.y = silu(gate) * up        swiglu: returns gated.y            down: reads it
    backward    down: d[gate | up] over gate | up, gated.y = y            swiglu: returns d[gate | up]       up:   reads it

Where a kernel cannot (other devices, 8 bits, widths that do not fit its tiles) it leaves its field None, and SwiGLU does its own work. One
Gated serves one layer for one microbatch. Between the two linears a gradient is passed that has no values and takes no memory.
"""

from torch import Tensor


class Gated:
    """What a SwiGLU, the linear before it and the one after it leave for each other."""

    __slots__ = ("done", "gate_up", "y")

    def __init__(self):
        self.y: Tensor | None = None  # the output [T, F]; in backward the same again, for a linear that has not kept it
        self.gate_up: Tensor | None = None  # [T, 2F]: what backward needs, once SwiGLU allows that it is overwritten
        self.done = False  # gate_up holds its gradient

    def take_y(self) -> Tensor | None:
        """Return the output and forget it."""
        y, self.y = self.y, None
        return y
