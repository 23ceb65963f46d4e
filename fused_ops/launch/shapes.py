"""Shapes and devices as kernels see them: rank classes, multiprocessors, whether TMA can be used."""

from functools import lru_cache
from typing import Any

import torch

from fused_ops.launch.triton_version import compiles_gluon


def cdiv(number: int, size: int) -> int:
    """Return the blocks of a size that cover a number; Triton's own takes 10 us on the host."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """Return the next power of 2, at least 1; as `cdiv`, in place of Triton's own."""
    return 1 << (number - 1).bit_length()


def rank_class(rank: int, limit: int = 256) -> int:
    """Return the compiled rank block for `rank`: the next of 16, 32, 64, 128, 256, at most `limit` (kernels loop beyond it)."""
    return min(max(16, power_of_2(rank)), limit)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Return the device's multiprocessor count (132 where there is no GPU: compile checks and the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache
def _capability(device: torch.device) -> int:
    """Return the generation of a GPU (9: Hopper), 0 for a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def uses_tma(*tensors: torch.Tensor) -> bool:
    """Return whether every tensor can have a TMA descriptor: Hopper or later, 16-byte aligned rows."""
    device = tensors[0].device
    capable = device.type != "cuda" or _capability(device) >= 9
    return capable and all(t.numel() > 0 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def unchecked(kind: type, tensor: torch.Tensor, block: list[int], **others: object) -> Any:
    """Return Triton's descriptor of a matrix for which `uses_tma` is true, without its own checks: they take as long as a launch."""
    found = object.__new__(kind)
    vars(found).update(base=tensor, shape=tensor.shape, strides=tensor.stride(), block_shape=block, padding="zero", **others)
    return found


def suits_hopper(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Return whether lora/hopper can serve: bfloat16 rows that TMA can address, a Hopper GPU, a Triton known to compile them."""
    described = [tensor for tensor in (x, *others) if tensor.shape[0]]
    return _capability(x.device) == 9 and compiles_gluon() and x.dtype == torch.bfloat16 and x.shape[0] > 0 and uses_tma(*described)
