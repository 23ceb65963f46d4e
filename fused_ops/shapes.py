"""Block sizes as pure functions of shapes: rank classes, and rows per program."""

from functools import lru_cache

import torch

BLOCK_ROWS = 64  # rows per program of a skinny product


def rank_class(rank: int, limit: int = 256) -> int:
    """Return the compiled rank block for `rank`: the next of 16, 32, 64, 128, 256, at most `limit` (kernels loop beyond it)."""
    return min(max(16, 1 << (rank - 1).bit_length()), limit)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Return the device's multiprocessor count (132 where there is no GPU to ask: compile checks and the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def inner_splits(num_rows: int, num_inner: int, device: torch.device) -> int:
    """Return among how many programs a skinny product's inner dimension is cut: about four programs a multiprocessor, 512 values each."""
    wanted = 4 * num_processors(device) * BLOCK_ROWS // max(num_rows, 1)
    return max(1, min(wanted, num_inner // 512))


def item_rows(num_rows: int, num_blocks: int, device: torch.device, per_processor: int = 4) -> int:
    """Return the rows of one item of a sum over rows: some programs per multiprocessor, and few partial sums."""
    wanted = max(1, per_processor * num_processors(device) // num_blocks)
    rows = 1 << max(0, -(-num_rows // wanted) - 1).bit_length()
    return min(max(rows, 128), 2048)
