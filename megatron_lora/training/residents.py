"""The jobs of one rank that are resident: they join, move and leave as the windows of the plan say.

Two threads work here. The plan feed's reads a joining job's data and draws its first values in host
memory; the training thread only takes rows and starts copies:

    residents = Residents(read=read, arena=arena_future)
    residents.read(changes); residents.prepare(changes)      # the feed's thread (planning.plan_feed.Crew)
    residents.begin(changes, saver)                          # the training thread, where the window begins
    residents.before(microbatch)                             # ... before each forward
    residents.move(number, step)                             # ... directly after that step, as an action of the plan

Joining costs the training thread tens of milliseconds, which a GPU's queue of kernels hides, but not
those of all jobs that join with a window. So a window's changes are carried out one by one, before its
forwards, in their order: a job is there before its first microbatch.

A row is freed by a window that begins after the job's last STEP and evaluation on every stage, so no
microbatch in flight refers to it. What a snapshot copies from a row is queued on the device before that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.samples import JobData
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.output.standing import ResumePoint
from megatron_lora.parallel.process_groups import StageGroups
from megatron_lora.planning.plan_feed import PlannedJob
from megatron_lora.training.first_factors import FirstFactors
from megatron_lora.training.jobs import Job
from megatron_lora.training.references import Known, ReferenceCache, References
from megatron_lora.training.saving import Saver, Start, read_start, start_job
from megatron_lora.training.window_changes import Joining, Places, WindowChanges
from scheduling.data_parallel import DealtJob
from scheduling.references import Wanted
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch


class Residents:
    """The resident jobs of this rank, by number."""

    def __init__(
        self,
        read: Callable[[Sequence[JobConfig]], Sequence[JobData]],
        arena: Future[Arena],
        groups: StageGroups,
        num_replicas: int,
        cost: SlotCost,
        reference_cache: ReferenceCache,
        first_factors: FirstFactors,
        keeps_references: bool = False,
    ):
        """Begin with no job resident. `read` returns the data of jobs; `arena` is awaited before values are drawn.

        `keeps_references`: whether this rank writes what it knows of them into the cache.
        """
        self.jobs: dict[int, Job] = {}
        self.data: dict[str, JobData] = {}  # of jobs that were read before the run began
        self._read = read
        self._arena = arena
        self._groups = groups
        self._num_replicas = num_replicas
        self._cost = cost
        self._reference_cache = reference_cache
        self._first_factors = first_factors
        self._keeps_references = keeps_references
        self._ready: dict[int, Job] = {}  # that join with a window still to begin
        self._starts: dict[int, Future[Start]] = {}
        self._pending: deque[tuple[Callable[..., None], tuple]] = deque()  # what windows have changed and is still to be done
        self._joining: set[int] = set()  # numbers of the jobs among them that join
        self._moves: dict[tuple[int, int], Places] = {}
        self.on_join: Callable[[Job], None] = lambda job: None

    def read(self, changes: WindowChanges, known: Mapping[int, Known | None] | None = None) -> Sequence[PlannedJob]:
        """Read the data of the jobs that join; return what plans know of them, and of those that continue.

        `known`: what the first rank has found of references.
        """
        planned = []
        for continuing in changes.continued:
            job, step = self.jobs[continuing.number], continuing.step
            after, dealt = [each for each in job.evaluation_steps if each > step], self._deal(job)
            later = {} if job.references is None else {k: held for k, held in job.references.wanted(dealt).items() if k >= step}
            planned.append(self._planned(job, dealt, step, after, continuing.rungs, later))
        for joining in changes.joined:
            job = self._make(joining.number, joining.config, joining.point)
            self._ready[job.number], self._starts[job.number] = job, Future()
            if known is None and job.config.has_frozen_half and job.resume_point.checkpoint is None:
                self._first_factors.write(job.config)
            dealt, found = self._deal(job), None
            if job.has_reference:
                found = self._reference_cache.known(job.config, job.data) if known is None else known[job.number]
                assert found is not None
                job.references = References(found, job.data, job.step_samples.steps, job.resume_point.step, bool(job.evaluation_steps))
            wanted = {} if job.references is None else job.references.wanted(dealt)
            planned.append(self._planned(job, dealt, job.resume_point.step, job.evaluation_steps, joining.rungs, wanted, found))
        return planned

    def _deal(self, job: Job) -> DealtJob:
        held, shared = job.validation_samples, (self._num_replicas, self._cost)
        dealt = DealtJob.of(job.step_samples.lengths(), *shared, held.lengths.tolist())
        if not job.has_mismatched:
            return dealt
        of_validation = held.mismatched_lengths(np.arange(len(held)), np.array([len(held)]), job.config.sequence_len) if len(held) else ()
        return replace(dealt, mismatched=DealtJob.of(job.step_samples.mismatched_lengths(), *shared, list(map(int, of_validation))))

    def _planned(
        self,
        job: Job,
        dealt: DealtJob,
        first_step: int,
        evaluate_after: Sequence[int],
        rungs: int,
        wanted: Wanted,
        known: Known | None = None,
    ) -> PlannedJob:
        return PlannedJob(
            number=job.number,
            dealt=dealt,
            first_step=first_step,
            evaluate_after=evaluate_after,
            priority=job.config.priority,
            until=job.next_rung(rungs),
            wanted=wanted,
            known=known,
        )

    def _make(self, number: int, config: JobConfig, point: ResumePoint) -> Job:
        data = self.data.pop(config.name, None) or self._read([config])[0]
        return Job(number=number, config=config, data=data, step_samples=data.steps_of(config), resume_point=point)

    def prepare(self, changes: WindowChanges) -> None:
        """Draw, or read, the values with which the jobs that join start."""
        starts = [self._starts[joining.number] for joining in changes.joined]
        try:
            for joining, start in zip(changes.joined, starts, strict=True):
                start.set_result(read_start(self._ready[joining.number], self._arena.result(), self._first_factors))
        except BaseException as failure:
            for start in starts:
                if not start.done():
                    start.set_exception(failure)  # which the training thread raises where it needs the values
            raise

    def begin(self, changes: WindowChanges, saver: Saver) -> None:
        """Begin with a window's changes."""
        self._pending += [(self._free, (number,)) for number in changes.freed]
        self._pending += [(self._join, (joining, saver)) for joining in changes.joined]
        self._joining |= {joining.number for joining in changes.joined}
        self._moves |= changes.moves
        if not self._joining.isdisjoint({*changes.configs, *changes.left}):
            self._finish()
        for number, config in changes.configs.items():
            if number in self.jobs:
                self.jobs[number].config = config
        for number, leaving in changes.left.items():
            job = self.jobs[number]
            job.leaving = leaving
            if job.steps_taken == leaving.step:
                saver.leave(job)

    def before(self, microbatch: Microbatch) -> None:
        """Carry out the next change, and others until all jobs of the microbatch are resident."""
        if self._pending:
            with self._arena.result().changing():
                self._do_next()
                while any(segment.job in self._joining for segment in microbatch.segments):
                    self._do_next()

    def move(self, number: int, step: int) -> None:
        """Move a job's rows, directly after its step."""
        self._finish()
        arena, job = self._arena.result(), self.jobs[number]
        arena.move(job.adapter_row, self._moves.pop((number, step)))
        job.optimizer.locate()

    @contextmanager
    def with_references(self, microbatch: Microbatch) -> Iterator[None]:
        """Let adapters of a reference slot be, for its forward alone, those that their jobs began from."""
        held = [self.jobs[segment.job] for segment in microbatch.segments if segment.samples] if microbatch.reference else []
        arena, own = self._arena.result(), []
        for job in held:
            if job.initial is not None:
                own.append((job.adapter_row, arena.values(job.adapter_row, arena.compute)))
                arena.put(job.adapter_row, job.initial, arena.compute)
        yield
        for row, values in own:
            arena.put(row, values, arena.compute)

    def keep_references(self, job: Job) -> None:
        """Keep what is known of a job's references for later runs."""
        if job.references is not None and self._keeps_references:
            self._reference_cache.store(job.references)

    def _finish(self) -> None:
        if self._pending:
            with self._arena.result().changing():
                while self._pending:
                    self._do_next()

    def _do_next(self) -> None:
        change, words = self._pending.popleft()
        change(*words)

    def _join(self, joining: Joining, saver: Saver) -> None:
        start = self._starts[joining.number].result()
        arena, job = self._arena.result(), self._ready.pop(joining.number)
        del self._starts[joining.number]
        start_job(job, arena, arena.add(job.adapter_spec(), joining.places), self._groups, start)
        if start.initial is not None:
            job.initial = start.initial.to(arena.compute, non_blocking=True)
        self.jobs[job.number] = job
        self._joining.remove(job.number)
        self.on_join(job)
        saver.join(job)

    def _free(self, number: int) -> None:
        job = self.jobs.pop(number)
        self.keep_references(job)
        self._arena.result().remove(job.adapter_row)
        job.adapter_row, job.resident_optimizer, job.initial = -1, None, None
