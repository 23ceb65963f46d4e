"""Collects the states of jobs from all ranks on the first one, beside the running pipeline: finished adapters, and what a checkpoint needs.

A job's STEP comes at different times on different stages, so nobody may wait inside it. Each rank copies its factors (of a checkpoint
also Adam's two moments) to host memory and hands them to a thread with a gloo group of its own; the first rank's thread receives the
parts of all ranks, joins the shards (A over K for row-parallel linears, B over N for column-parallel ones) and calls `write`. All
ranks take the same steps in the same order, so the messages match without names.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.model.adapter_arena import Arena, Factor
from megatron_lora.training.optimizer import JobOptimizer

Weights = dict[str, tuple[Tensor, Tensor]]  # path -> (A [r, K], B [N, r]), fp32, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A job between two steps. `moments` are Adam's two, shaped as the weights; none for a finished job, which needs its weights alone."""

    slot: int
    step: int  # steps that it has taken
    weights: Weights
    moments: tuple[Weights, ...]
    num_updates: int
    skipped_in_a_row: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank holds of a snapshot, on its way to the host: `values` is one buffer after another, then three numbers."""

    slot: int
    step: int
    num_buffers: int
    values: Tensor
    copied: torch.cuda.Event | None


class SnapshotCollector:
    """Sends this rank's parts of snapshots to the first rank, which writes them."""

    def __init__(self, arena: Arena, write: Callable[[Snapshot], None], group: dist.ProcessGroup):
        """Begin on every rank at once; `group` is a gloo group of all ranks that nobody else uses meanwhile.

        `write(snapshot)` is called in the first rank's thread.
        """
        self.arena, self.write, self.group = arena, write, group
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        factors: list = [None] * self.world_size
        dist.all_gather_object(factors, arena.factors, group=self.group)
        self.factors_of_rank: Sequence[Sequence[Sequence[Factor]]] = factors
        self.written: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (slot, steps taken) whose files are there
        self.failure: BaseException | None = None
        self.waiting: queue.SimpleQueue[_Part | threading.Event | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="snapshot-collector", daemon=True)
        self.thread.start()

    def submit(self, slot: int, step: int, optimizer: JobOptimizer, *, moments: bool) -> None:
        """Hand over a job as it is now, with `step` steps taken; waits for nothing. A job that has failed is not written.

        Raises what a previous collection raised.
        """
        self._raise_failure()
        buffers = (self.arena.master, *((self.arena.exp_avg, self.arena.exp_avg_sq) if moments else ()))
        numbers = torch.stack([optimizer.failed.double(), optimizer.num_updates, optimizer.skipped_in_a_row.double()]).float()
        pieces = [*(self.arena.view(factor, buffer).reshape(-1) for buffer in buffers for factor in self.arena.factors[slot]), numbers]
        lengths = [piece.numel() for piece in pieces]
        on_gpu = numbers.is_cuda
        values = torch.empty(sum(lengths), pin_memory=on_gpu)
        for target, piece in zip(values.split(lengths), pieces, strict=True):
            target.copy_(piece, non_blocking=on_gpu)
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record()
        self.waiting.put(_Part(slot, step, len(buffers), values, copied))

    def wait(self) -> None:
        """Wait until what was submitted so far has left this rank (on the first rank: is written), so that it takes no memory."""
        passed = threading.Event()
        self.waiting.put(passed)
        while not passed.wait(0.2):
            self._raise_failure()

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
            while (part := self.waiting.get()) is not None:
                if isinstance(part, threading.Event):
                    part.set()
                    continue
                if part.copied is not None:
                    part.copied.synchronize()
                failed, num_updates, skipped_in_a_row = part.values[-3:].tolist()
                if not failed:
                    self._collect(part, int(num_updates), int(skipped_in_a_row))
        except BaseException as failure:  # carried to the main thread, which raises it
            self.failure = failure

    def _collect(self, part: _Part, num_updates: int, skipped_in_a_row: int) -> None:
        own = part.values[:-3]
        if self.rank != 0:
            dist.send(own, 0, group=self.group)
            return
        factors = [ranks[part.slot] for ranks in self.factors_of_rank]
        flats = [own.view(part.num_buffers, -1)]
        for rank in range(1, self.world_size):
            flat = torch.empty(part.num_buffers, sum(factor.length for factor in factors[rank]))
            dist.recv(flat, rank, group=self.group)
            flats.append(flat)
        weights, *moments = (join_shards(factors, [flat[buffer] for flat in flats]) for buffer in range(part.num_buffers))
        snapshot = Snapshot(
            slot=part.slot,
            step=part.step,
            weights=weights,
            moments=tuple(moments),
            num_updates=num_updates,
            skipped_in_a_row=skipped_in_a_row,
        )
        self.write(snapshot)
        self.written.put((part.slot, part.step))


def join_shards(factors_of_rank: Sequence[Sequence[Factor]], flats: Sequence[Tensor]) -> Weights:
    """Join every rank's factors of one job, flattened one after another, into whole A and B by path."""
    shards: dict[tuple[str, str], dict[int, Tensor]] = {}
    for factors, flat in zip(factors_of_rank, flats, strict=True):
        for factor, part in zip(factors, flat.split([factor.length for factor in factors]), strict=True):
            shards.setdefault((factor.path, factor.kind), {})[factor.first] = part.view(factor.r, factor.width)
    whole = {key: torch.cat([by_first[first] for first in sorted(by_first)], dim=1) for key, by_first in shards.items()}
    return {path: (whole[path, "A"], whole[path, "B"].t().contiguous()) for path, kind in whole if kind == "A"}
