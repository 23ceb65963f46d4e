"""Block sizes as pure functions of shapes: rank classes, and rows per program."""

from functools import lru_cache

import torch


def rank_class(rank: int, limit: int = 256) -> int:
    """Return the compiled rank block for `rank`: the next of 16, 32, 64, 128, 256, at most `limit` (kernels loop beyond it)."""
    return min(max(16, 1 << (rank - 1).bit_length()), limit)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Return the device's multiprocessor count (132 where there is no GPU to ask: compile checks and the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def row_block(num_rows: int, device: torch.device) -> int:
    """Return the rows per program of a skinny product: the largest of 64, 32, 16 that gives nearly every multiprocessor one."""
    for block in (64, 32):
        if num_rows >= 0.9 * block * num_processors(device):
            return block
    return 16
