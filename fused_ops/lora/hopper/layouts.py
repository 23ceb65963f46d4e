"""Blocks of a matrix on Hopper, bfloat16 or float8_e4m3fn: their layout in shared memory, and the descriptor by which TMA copies them."""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_ops.launch.shapes import unchecked


@lru_cache
def _layout(in_8_bits: bool, *block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.float8e4nv if in_8_bits else gl.bfloat16)


def shared(*block: gl.constexpr) -> gl.constexpr:
    """Return the layout of a block [rows, columns] of bfloat16 in shared memory."""
    return gl.constexpr(_layout(False, *(size.value for size in block)))


class _Named(gl.NVMMASharedLayout):
    """A layout that knows its name: Triton asks for it at each launch, for each descriptor."""

    def __repr__(self) -> str:
        return self.__dict__["name"]


@lru_cache
def _named(in_8_bits: bool, *block: int) -> _Named:
    layout = _layout(in_8_bits, *block)
    named = _Named(**vars(layout))
    vars(named)["name"] = repr(layout)
    return named


def describe(tensor: Tensor, *box: int) -> TensorDescriptor:
    """Return the descriptor by which TMA copies blocks of a matrix [rows, columns] that `suits_hopper`."""
    return unchecked(TensorDescriptor, tensor, list(box), layout=_named(tensor.dtype == torch.float8_e4m3fn, *box))
