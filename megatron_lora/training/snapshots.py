"""Collects snapshots of jobs from all ranks on the first one while the pipeline runs: finished adapters and checkpoints.

Stages take a job's step at different times, so no rank may wait for another while it takes one. Each
rank copies the job's factors (for a checkpoint also Adam's two moments) to host memory and queues them
for a thread, which sends them over gloo. The first rank's thread receives the parts of all ranks, joins
the shards (A along K for row-parallel linears, B and magnitudes along N for column-parallel ones) and has `write` called,
which may wait until the snapshot's step is reported; the ranks' training threads wait for neither.
All ranks take the same steps in the same order, so messages match by their order. Snapshots of one job are
written one after another, those of different jobs side by side: a digest and a sync take the most of it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.model.adapter_arena import Arena, Factor
from megatron_lora.model.arena_region import KINDS, AdapterSpec, shards
from megatron_lora.model.linears import LinearGeometry
from megatron_lora.training.adapter_forms import Weights
from megatron_lora.training.jobs import Job

MOST_WRITERS = 4  # threads of the first rank that write; each holds a joined copy of one job's state
MOST_PINNED_AHEAD = 4  # checkpoints at the same step whose host memory is there from the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A job's state between two steps.

    `moments` are Adam's two, shaped as the weights; empty where no checkpoint is wanted, only the weights.
    """

    job: Job
    step: int  # steps taken
    weights: Weights
    moments: tuple[Weights, ...]
    num_updates: int
    skipped_in_a_row: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's part of a snapshot: `values` is `num_buffers` buffers one after another, then three numbers.

    On a GPU the copy to the host is complete once the event `copied` is.
    """

    job: Job
    spec: AdapterSpec
    step: int
    num_buffers: int
    values: Tensor
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _Joinable:
    """All ranks' parts of a snapshot: `flats[rank]` is [buffers, the rank's factors one after another]."""

    part: _Part
    flats: Sequence[Tensor]
    num_updates: int
    skipped_in_a_row: int


class _Writers:
    """Threads that call `write` with what they are given, of each job one after another, in its order.

    Twice as many as there are threads may wait: with a slow disk what comes later stays where it is, on the hosts of all ranks.
    """

    def __init__(self, write: Callable[[_Joinable], None], num_threads: int):
        self._write = write
        self._most = 3 * num_threads
        self._changed = threading.Condition()
        self._of_job: dict[str, deque[_Joinable]] = {}  # what is to be written; its first is being written, or is in `_ready`
        self._ready: deque[str] = deque()
        self._closed = False
        self.failure: BaseException | None = None
        for number in range(num_threads):
            threading.Thread(target=self._work, name=f"snapshot-writer-{number}", daemon=True).start()

    def put(self, job: str, snapshot: _Joinable) -> None:
        """Have a snapshot written after those of the same job; waits for room."""
        with self._changed:
            self._changed.wait_for(lambda: sum(map(len, self._of_job.values())) < self._most)
            others = self._of_job.setdefault(job, deque())
            others.append(snapshot)
            if len(others) == 1:
                self._ready.append(job)
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all is written; raises what a write has raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._of_job or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the threads once all is written: they hold what `write` refers to, an arena among it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or (self._closed and not self._of_job))
                if not self._ready:
                    return
                job = self._ready.popleft()
                snapshot = self._of_job[job][0]
            try:
                if self.failure is None:  # else what should lie beside it may be missing
                    self._write(snapshot)
            except BaseException as failure:  # carried to the main thread, which raises it
                self.failure = self.failure or failure
            del snapshot  # its memory is free before anybody waits no more
            with self._changed:
                self._of_job[job].popleft()
                if self._of_job[job]:
                    self._ready.append(job)
                else:
                    del self._of_job[job]
                self._changed.notify_all()


class SnapshotCollector:
    """Sends this rank's parts of snapshots to the first rank, which writes them."""

    def __init__(self, arena: Arena, write: Callable[[Snapshot], str | None], group: dist.ProcessGroup):
        """Start the thread; collective: every rank calls this.

        `group` is a gloo group of all ranks that nothing else uses until `finish`. The first rank's thread
        calls `write(snapshot)`, which returns the state of a job that is over with it.
        """
        self.arena = arena
        self.write = write
        self.group = group
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        ranks: list = [None] * self.world_size
        own = ([region.geometry for region in arena.regions], arena.tensor_rank)
        dist.all_gather_object(ranks, own, group=self.group)
        self.linears_of_rank: Sequence[tuple[Sequence[LinearGeometry], int]] = ranks  # and the tensor rank
        self.written: queue.SimpleQueue[tuple[Job, str]] = queue.SimpleQueue()  # jobs that leave with what was written, and their states
        self.failure: BaseException | None = None
        self.writers = _Writers(self._join_and_write, min(MOST_WRITERS, os.cpu_count() or 1) if self.rank == 0 else 0)
        self.waiting: queue.SimpleQueue[_Part | threading.Event | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="snapshot-collector", daemon=True)
        self.thread.start()

    def pin_ahead(self, specs: Sequence[AdapterSpec]) -> None:
        """Have host memory for checkpoints of the largest of `specs` pinned before training starts: the driver takes 0.1 s for 500 MB.

        torch keeps pinned memory that is given back for the next that asks for as much, rounded up to a power of two.
        """
        if not self.arena.master.is_cuda:
            return
        of_spec = {spec: sum(factor.length for factor in self.arena.shards_of(spec)) for spec in set(specs)}
        lengths = sorted(of_spec[spec] for spec in specs)
        kept = [_host_memory(3 * length, pinned=True) for length in lengths[-MOST_PINNED_AHEAD:]]
        kept.clear()

    def submit(self, job: Job, *, moments: bool) -> None:
        """Queue a snapshot of a job as it is now and return at once. A failed job is not written.

        Raises what an earlier collection has raised.
        """
        self._raise_failure()
        optimizer = job.optimizer
        buffers = (self.arena.master, *((self.arena.exp_avg, self.arena.exp_avg_sq) if moments else ()))
        numbers = torch.stack([optimizer.failed.double(), optimizer.num_updates, optimizer.skipped_in_a_row.double()]).float()
        length, on_gpu = sum(factor.length for factor in self.arena.factors[job.adapter_row]), numbers.is_cuda
        values = _host_memory(len(buffers) * length, on_gpu)
        *targets, last = values.split([length] * len(buffers) + [len(numbers)])
        for target, buffer in zip(targets, buffers, strict=True):  # each in one piece: a factor's copy is small
            target.copy_(self.arena.values(job.adapter_row, buffer), non_blocking=on_gpu)
        last.copy_(numbers, non_blocking=on_gpu)
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record()
        self.waiting.put(_Part(job, self.arena.specs[job.adapter_row], job.steps_taken, len(buffers), values, copied))

    def wait(self) -> None:
        """Wait until all snapshots so far are sent (on the first rank: written) and their host memory is free."""
        passed = threading.Event()
        self.waiting.put(passed)
        while not passed.wait(0.2):
            self._raise_failure()

    def finish(self) -> None:
        """Wait until everything that was submitted is written."""
        self.waiting.put(None)
        self.thread.join()
        self.writers.close()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure = self.failure or self.writers.failure
        if failure is not None:
            raise failure

    def _work(self) -> None:
        try:
            while (part := self.waiting.get()) is not None:
                if isinstance(part, threading.Event):
                    self.writers.wait()
                    part.set()
                    continue
                if part.copied is not None:
                    part.copied.synchronize()
                failed, num_updates, skipped_in_a_row = part.values[-3:].tolist()
                if not failed:
                    self._collect(part, int(num_updates), int(skipped_in_a_row))
                del part  # else its memory is held until the next one comes
            self.writers.wait()
        except BaseException as failure:  # carried to the main thread, which raises it
            self.failure = failure

    def _collect(self, part: _Part, num_updates: int, skipped_in_a_row: int) -> None:
        own = part.values[:-3]
        if self.rank != 0:
            dist.send(own, 0, group=self.group)
            return
        flats = [own.view(part.num_buffers, -1)]
        for rank in range(1, self.world_size):
            flat = torch.empty(part.num_buffers, sum(factor.length for factor in self._factors(part.spec, rank)))
            dist.recv(flat, rank, group=self.group)
            flats.append(flat)
        self.writers.put(part.job.name, _Joinable(part, flats, num_updates, skipped_in_a_row))

    def _factors(self, spec: AdapterSpec, rank: int) -> list[Factor]:
        linears, tensor_rank = self.linears_of_rank[rank]
        return [shard for geometry in linears for shard in shards(geometry, tensor_rank, spec)]

    def _join_and_write(self, joinable: _Joinable) -> None:
        part, flats = joinable.part, joinable.flats
        factors = [self._factors(part.spec, rank) for rank in range(self.world_size)]
        weights, *moments = (join_shards(factors, [flat[buffer] for flat in flats]) for buffer in range(part.num_buffers))
        snapshot = Snapshot(
            job=part.job,
            step=part.step,
            weights=weights,
            moments=tuple(moments),
            num_updates=joinable.num_updates,
            skipped_in_a_row=joinable.skipped_in_a_row,
        )
        if (state := self.write(snapshot)) is not None:
            self.written.put((part.job, state))


def _host_memory(num_values: int, pinned: bool) -> Tensor:
    """Return memory for values of an adapter and the three numbers of a job."""
    return torch.empty(num_values + 3, pin_memory=pinned)


def join_shards(factors_of_rank: Sequence[Sequence[Factor]], flats: Sequence[Tensor]) -> Weights:
    """Join one job's factors of all ranks; `flats` has each rank's factors, flattened one after another."""
    shards: dict[tuple[str, str], dict[int, Tensor]] = {}
    for factors, flat in zip(factors_of_rank, flats, strict=True):
        for factor, part in zip(factors, flat.split([factor.length for factor in factors]), strict=True):
            for path, values in factor.parts(part):
                pieces = values.split([number for _, number in factor.pieces], dim=1)
                by_first = shards.setdefault((path, factor.kind), {})
                by_first |= {first: piece for (first, _), piece in zip(factor.pieces, pieces, strict=True)}
    joined = {key: torch.cat([by_first[first] for first in sorted(by_first)], dim=1) for key, by_first in shards.items()}
    for path, kind in joined:
        if kind != "A":
            joined[path, kind] = joined[path, kind].t().contiguous() if kind == "B" else joined[path, kind][0]
    return {path: tuple(joined[path, each] for each in KINDS if (path, each) in joined) for path, kind in joined if kind == "A"}
