"""Blocks of a bfloat16 matrix on Hopper: their layout in shared memory, and the descriptor by which TMA copies them."""

from functools import lru_cache

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@lru_cache
def _layout(*block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def shared(*block: gl.constexpr) -> gl.constexpr:
    """Return the layout of a block [rows, columns] in shared memory."""
    return gl.constexpr(_layout(*(size.value for size in block)))


def describe(tensor: Tensor, *box: int) -> TensorDescriptor:
    """Return the descriptor by which TMA copies blocks of a matrix [rows, columns] that `suits_hopper`."""
    return TensorDescriptor.from_tensor(tensor, list(box), _layout(*box))
