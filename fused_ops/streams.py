"""Two pieces of backward side by side: dA needs nothing of dX, and fills the multiprocessors that dX's last tiles leave idle.

    dx = side_by_side(make_dx, add_da, device)          # both see what the current stream did before; both are done for what follows

The second piece runs on a stream of its own, which waits for the current stream as it was before the first, and which the current
stream waits for at the end: tensors that either reads may be freed right after, and a CUDA graph captures both. Neither may read what
the other makes, tables made on first use included. Elsewhere than on CUDA they run one after the other.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

Result = TypeVar("Result")
BESIDE = False  # whether linear.py lets dA run beside dX


def side_by_side(first: Callable[[], Result], second: Callable[[], None], device: torch.device) -> Result:
    """Return first(); second() may run at the same time, and allocates from its own stream's memory."""
    if device.type != "cuda":
        result = first()
        second()
        return result
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    before = current.record_event()
    result = first()
    side.wait_event(before)
    with torch.cuda.stream(side):
        second()
    current.wait_stream(side)
    return result


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
