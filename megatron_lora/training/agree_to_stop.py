"""All ranks agree on the slot before which a run stops on request, without waiting for one another.

A stop request reaches each rank at its own time. Windows are therefore cut into chunks of a few slots.
Before each chunk a rank starts an all-reduce of "I have a stop request", and reads the result of the
all-reduce before the previous chunk. All ranks read the same results, so all stop before the same
slot. Steps that have begun by then are dropped: a checkpoint always lies between two steps.

    executor.run(until_stopped(feed, stop, group, num_stages=2, gap=2))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_lora.training.stop_request import StopRequest
from scheduling.follow import Window
from scheduling.types import NOOP

FEWEST_SLOTS = 4  # of a chunk


def until_stopped(windows: Iterable[Window], stop: StopRequest, group: dist.ProcessGroup, num_stages: int, gap: int) -> Iterator[Window]:
    """Yield the windows in chunks of a few slots, until they end or a rank has a stop request.

    A stop ends the stream with the no-ops that drain the pipeline. `group` is a gloo group of all ranks
    that nothing else uses; `gap` is the number of slots from the end of a step to its verdict. No rank
    waits for another: the first stage is at most `num_stages` slots ahead of the last, and the result of
    an all-reduce is read at least twice as many slots after its start.
    """
    num_slots = max(FEWEST_SLOTS, 2 * num_stages)
    stop.can_save = True
    previous: tuple[torch.Tensor, dist.Work] | None = None
    for window in windows:
        for chunk in window.chunks(num_slots):
            num_requests = torch.tensor([stop.requested], dtype=torch.int32)
            work = dist.all_reduce(num_requests, group=group, async_op=True)
            assert work is not None
            if previous is not None:
                previous[1].wait()
                if int(previous[0]):
                    work.wait()
                    stop.stopped = True
                    yield Window((NOOP,) * gap, ((),) * gap)
                    return
            previous = num_requests, work
            yield chunk
    if previous is not None:
        previous[1].wait()
