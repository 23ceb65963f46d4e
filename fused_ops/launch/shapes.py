"""Shapes and devices as kernels see them: rank classes, multiprocessors, whether TMA can be used."""

from functools import lru_cache

import torch

from fused_ops.launch.triton_version import compiles_gluon


def rank_class(rank: int, limit: int = 256) -> int:
    """Return the compiled rank block for `rank`: the next of 16, 32, 64, 128, 256, at most `limit` (kernels loop beyond it)."""
    return min(max(16, 1 << (rank - 1).bit_length()), limit)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Return the device's multiprocessor count (132 where there is no GPU: compile checks and the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def uses_tma(*tensors: torch.Tensor) -> bool:
    """Return whether every tensor can have a TMA descriptor: Hopper or later, 16-byte aligned rows."""
    device = tensors[0].device
    capable = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return capable and all(t.numel() > 0 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def suits_hopper(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Return whether lora/hopper can serve: bfloat16 rows that TMA can address, a Hopper GPU, a Triton known to compile them."""
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    described = [tensor for tensor in (x, *others) if len(tensor)]
    return on_hopper and compiles_gluon() and x.dtype == torch.bfloat16 and len(x) > 0 and uses_tma(*described)
