"""What a linear knows of its frozen weight [N, K], however that is stored: the operands of its two products.

    forward   Y = X W^T     forward()      [N, K] in X's dtype, or 8-bit values with a scale per output
    backward  dX = dY W     grad_input()   [N, K] in dY's dtype, or 8-bit values of the transpose [K, N] with a scale per input

A plain tensor [N, K] is its own operand in both. Weights that are unpacked for a product share a Scratch: an operand is valid until the
next one is asked for, which suits products that are launched one after another on one stream.
"""

from typing import Protocol

import torch
from torch import Tensor

from fused_ops.lora.fp8 import Fp8Matrix


class FrozenWeight(Protocol):
    """A weight that is not a tensor of the compute dtype: fp8.Fp8Weight, packed.PackedWeight."""

    @property
    def in_8_bits(self) -> bool:
        """Whether both operands are: what is multiplied with them is rounded too, by a neighbour if it can."""
        ...

    @property
    def dy_factors(self) -> Tensor | None:
        """Return what dY's columns are multiplied by before it is rounded, [N] float32."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Return (N, K)."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the bytes of what is stored."""
        ...

    def forward(self) -> Tensor | Fp8Matrix:
        """Return what X is multiplied with."""
        ...

    def grad_input(self) -> Tensor | Fp8Matrix:
        """Return what dY is multiplied with."""
        ...


def operand(weight: Tensor | FrozenWeight, backward: bool) -> Tensor | Fp8Matrix:
    """Return the matrix of a product, forward or backward."""
    if isinstance(weight, Tensor):
        return weight
    return weight.grad_input() if backward else weight.forward()


def factors_of(weight: Tensor | FrozenWeight, backward: bool) -> Tensor | None:
    """Return what the columns of the other operand are multiplied by before it is rounded."""
    return None if isinstance(weight, Tensor) or not backward else weight.dy_factors
