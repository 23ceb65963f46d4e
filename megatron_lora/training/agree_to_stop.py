"""After which slot a run stops that was asked to: all ranks agree on it, without waiting for one another.

In front of every few slots each rank begins to sum up who has been asked, and reads the sum that it began in front of the slots
before. All read the same sums, so all stop in front of the same slot. What was begun of a step is let go; a checkpoint lies between steps.

    executor.run(until_stopped(feed, stop, group, num_stages=2, lag=2))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_lora.training.stop_request import StopRequest
from scheduling.follow import Window
from scheduling.types import NOOP

FEWEST_SLOTS = 4  # between two agreements


def until_stopped(windows: Iterable[Window], stop: StopRequest, group: dist.ProcessGroup, num_stages: int, lag: int) -> Iterator[Window]:
    """Give windows out a few slots at a time, until they end or a rank has been asked to stop; then the no-ops that drain the pipeline.

    `group` is a gloo group of all ranks that nobody else uses; `lag` the slots from the end of a step to its verdict. No rank waits for
    another: the first stage is at most `num_stages` slots ahead of the last, and a sum is read after twice as many.
    """
    num_slots = max(FEWEST_SLOTS, 2 * num_stages)
    stop.can_save = True
    before: tuple[torch.Tensor, dist.Work] | None = None
    for window in windows:
        for first in range(0, len(window.stream), num_slots):
            asked = torch.tensor([stop.asked], dtype=torch.int32)
            work = dist.all_reduce(asked, group=group, async_op=True)
            assert work is not None
            if before is not None:
                before[1].wait()
                if int(before[0]):
                    work.wait()
                    stop.stopped = True
                    yield Window((NOOP,) * lag, ((),) * lag)
                    return
            before = asked, work
            yield Window(window.stream[first : first + num_slots], window.ended[first : first + num_slots])
    if before is not None:
        before[1].wait()
