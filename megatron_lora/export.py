"""Collects finished adapters from all ranks on the first one, beside the running pipeline.

A job's last STEP comes at different times on different stages, so nobody may wait inside it. Each rank copies its factors to host
memory and hands them to a thread with a gloo group of its own; the first rank's thread receives the parts of all ranks, joins the
shards (A over K for row-parallel linears, B over N for column-parallel ones) and calls `write`. All ranks take the same steps in the
same order, so the messages match without names.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.arena import Arena, Factor

Weights = dict[str, tuple[Tensor, Tensor]]  # path -> (A [r, K], B [N, r]), fp32, whole


class AdapterCollector:
    """Sends this rank's parts of finished adapters to the first rank, which writes them."""

    def __init__(self, arena: Arena, write: Callable[[int, Weights], None], group: dist.ProcessGroup):
        """Begin on every rank at once; `group` is a gloo group of all ranks that nobody else uses meanwhile.

        `write(slot, weights)` is called in the first rank's thread.
        """
        self.arena, self.write, self.group = arena, write, group
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        factors: list = [None] * self.world_size
        dist.all_gather_object(factors, arena.factors, group=self.group)
        self.factors_of_rank: Sequence[Sequence[Sequence[Factor]]] = factors
        self.written: queue.SimpleQueue[int] = queue.SimpleQueue()  # slots whose files are there
        self.failure: BaseException | None = None
        self.waiting: queue.SimpleQueue[tuple[int, Tensor, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="adapter-collector", daemon=True)
        self.thread.start()

    def submit(self, slot: int, failed: Tensor) -> None:
        """Hand over a job's masters as they are now, unless it has `failed`, bool [], which all ranks agree on; waits for nothing.

        Raises what a previous collection raised.
        """
        self._raise_failure()
        parts = [self.arena.view(factor, self.arena.master).reshape(-1) for factor in self.arena.factors[slot]]
        values, copied = torch.cat([*parts, failed.float()[None]]), None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.waiting.put((slot, values, copied))

    def finish(self) -> None:
        """Wait until everything that was submitted is written."""
        self.waiting.put(None)
        self.thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        try:
            while (item := self.waiting.get()) is not None:
                slot, values, copied = item
                if copied is not None:
                    copied.synchronize()
                if not values[-1]:
                    self._collect(slot, values[:-1])
        except BaseException as failure:  # carried to the main thread, which raises it
            self.failure = failure

    def _collect(self, slot: int, own: Tensor) -> None:
        if self.rank != 0:
            dist.send(own, 0, group=self.group)
            return
        parts = [own]
        for rank in range(1, self.world_size):
            part = torch.empty(sum(factor.length for factor in self.factors_of_rank[rank][slot]))
            dist.recv(part, rank, group=self.group)
            parts.append(part)
        self.write(slot, join_shards([ranks[slot] for ranks in self.factors_of_rank], parts))
        self.written.put(slot)


def join_shards(factors_of_rank: Sequence[Sequence[Factor]], flats: Sequence[Tensor]) -> Weights:
    """Join every rank's factors of one job, flattened one after another, into whole A and B by path."""
    shards: dict[tuple[str, str], dict[int, Tensor]] = {}
    for factors, flat in zip(factors_of_rank, flats, strict=True):
        for factor, part in zip(factors, flat.split([factor.length for factor in factors]), strict=True):
            shards.setdefault((factor.path, factor.kind), {})[factor.first] = part.view(factor.r, factor.width)
    whole = {key: torch.cat([by_first[first] for first in sorted(by_first)], dim=1) for key, by_first in shards.items()}
    return {path: (whole[path, "A"], whole[path, "B"].t().contiguous()) for path, kind in whole if kind == "A"}
