"""How a job's state is saved and restored: when snapshots are taken, what the first rank writes, how a job starts or resumes.

A job's PEFT directory is `jobs/<name>/` itself. Every `save_steps` steps, and when a run is stopped, a
checkpoint (checkpoint.py) is written inside it, and the adapter in the PEFT directory is replaced by
that of the same step. Where a job is evaluated, a snapshot is taken before its result is known; it
becomes the best weights, or the last ones where the patience is over, or nothing. At the end of a job
the PEFT directory holds the weights that `keep` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_lora.config.schema import RunConfig
from megatron_lora.data.serving import serving_advice
from megatron_lora.files import digest_of_file, sync
from megatron_lora.huggingface.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, read_adapter, write_adapter
from megatron_lora.huggingface.export import EXPORT_DTYPES, export
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.output.best import remove_outdated, write_best
from megatron_lora.output.checkpoint import read_checkpoint, write_checkpoint
from megatron_lora.output.metrics import LoggedDigest, describe_evaluations, metrics_file
from megatron_lora.output.resume import deciding_keys
from megatron_lora.output.standing import Best, CheckpointState, best_name
from megatron_lora.parallel.process_groups import StageGroups
from megatron_lora.training.adapter_forms import adapter_of, as_in_arena, as_trained
from megatron_lora.training.executor import StepDone
from megatron_lora.training.first_factors import FirstFactors, remove_first_factors
from megatron_lora.training.jobs import Job, Jobs
from megatron_lora.training.optimizer import JobOptimizer
from megatron_lora.training.reported import ReportBoard, Reported
from megatron_lora.training.snapshots import Snapshot, SnapshotCollector


class Saver:
    """Decides which jobs are saved after a step, where they leave, and at the end of a run that was stopped: the same on every rank."""

    def __init__(self, jobs: Jobs, collector: SnapshotCollector, board: ReportBoard):
        self.jobs = jobs
        self.collector = collector
        self.board = board

    def join(self, job: Job) -> None:
        """Take a snapshot of a job that is evaluated before its first step here."""
        if job.is_evaluated_after(job.steps_taken):
            self._save(job, moments=False)

    def leave(self, job: Job) -> None:
        """Save a job that leaves, and has taken its last step before that; its state is that of its leaving once it is written."""
        assert job.leaving is not None
        is_evaluated = job.steps_taken > 0 and (job.evaluated_after == job.steps_taken or job.owes_evaluation(job.steps_taken))
        if job.leaving.saves and job.steps_taken == job.resume_point.step and not is_evaluated:
            self.collector.written.put((job, job.leaving.state))  # it is as it was when it joined
        elif job.leaving.saves:
            self._save(job, moments=True)

    def on_step(self, done: StepDone) -> None:
        """Count a step; take a snapshot of its job where one may be wanted."""
        job = self.jobs[done.job]
        job.steps_taken = done.step + 1
        if job.leaving is not None and job.leaving.saves and job.leaving.step == job.steps_taken:
            self._save(job, moments=True)
        elif _has_checkpoint(job, job.steps_taken) or job.steps_taken == job.num_steps or job.is_evaluated_after(job.steps_taken):
            self._save(job, moments=_has_checkpoint(job, job.steps_taken))

    def save_unfinished(self) -> bool:
        """Save every unfinished job that has changed since its last checkpoint; return whether any job is unfinished.

        A job is unfinished when it has steps to take, or an evaluation, and has not failed. Waits for
        the device.
        """
        unfinished = [job for job in self.jobs.values() if not _is_finished(job) and not job.optimizer.has_failed()]
        for job in unfinished:
            # A checkpoint that says that an evaluation is due is replaced when it is not; before the first step there is none.
            if job.steps_taken > job.steps_saved or job.steps_taken == job.evaluated_after == job.resume_point.step > 0:
                self._save(job, moments=True)
                self.collector.wait()  # so that only one job's state is in host memory at a time
        return bool(unfinished)

    def _save(self, job: Job, *, moments: bool) -> None:
        self.board.expect(job.name, job.steps_taken)
        self.collector.submit(job, moments=moments)
        if moments:
            job.steps_saved = job.steps_taken


def _has_checkpoint(job: Job, step: int) -> bool:
    """Whether a checkpoint is due: every `save_steps` steps, but not after the last one."""
    every = job.config.save_steps
    return bool(every and step % every == 0 and step < job.num_steps)


def _is_finished(job: Job) -> bool:
    return job.steps_taken == job.num_steps and not job.owes_evaluation(job.num_steps)


class Writer:
    """Writes snapshots, on the first rank, in threads of their own (snapshots.py)."""

    def __init__(self, config: RunConfig, board: ReportBoard, model_dir: Path, rests_on: Mapping[str, str]):
        """Write into the directory of the run that `config` describes; `board` says what was reported of each job.

        `model_dir` is the base model's, and `rests_on` has the digests of its files (base_files.py).
        """
        self.config = config
        self.board = board
        self.model_dir = model_dir
        self.rests_on = rests_on
        self.samples: dict[str, str] = {}  # job -> the digest of its samples
        self.logged: dict[str, LoggedDigest] = {}

    def write(self, snapshot: Snapshot) -> str | None:
        """Write what a snapshot is for, once its step is reported; return the state of a job that ends or leaves with it, or "exported"."""
        job = snapshot.job
        reported = self.board.wait_for(job.name, snapshot.step)
        if reported is None:  # the job was stopped before, or has failed
            return None
        directory = Path(self.config.output_dir) / "jobs" / job.name
        adapter, progress = adapter_of(job.config, snapshot.weights, self.rests_on), reported.progress
        sync(metrics_file(self.config.output_dir, job.name))
        best, base_model = progress.best, self.config.base_model
        if best is not None and best.step == snapshot.step:
            write_best(directory, adapter, base_model, best, job.config.metric)
        is_last = snapshot.step == job.num_steps and not reported.evaluation_due
        is_over = is_last or progress.over
        if is_over and job.config.keep == "best" and best is not None and best.step != snapshot.step:
            adapter = read_adapter(directory / best_name(best.step))
        elif snapshot.moments and not is_over:
            write_checkpoint(directory, adapter, base_model, snapshot.moments, self._state(snapshot, reported))
        at_rung = snapshot.step in job.rungs  # where it may rest, and be stopped
        if snapshot.moments or is_over or at_rung:
            self._export(job, directory, adapter, snapshot.step, best)
            job.files = {name: digest_of_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
            job.exported_after = snapshot.step
        remove_outdated(directory, best, job.config.save_total_limit, is_over=is_over)
        if is_over:
            remove_first_factors(directory)
            return "done" if is_last else "stopped"
        leaves = snapshot.moments and job.leaving is not None and job.leaving.step == snapshot.step
        if leaves and job.leaving is not None:
            return job.leaving.state
        return "exported" if at_rung else None

    def _export(self, job: Job, directory: Path, adapter: AdapterFile, step: int, best: Best | None) -> None:
        """Write a job's PEFT directory as its config wants it, with a card that says how its evaluations went and how to serve it."""
        exported = export(as_trained(job.config, adapter), job.config.export, dtype := job.config.export_dtype)
        if any(a_RK.dtype != EXPORT_DTYPES[dtype] for a_RK, _ in exported.weights.values()):
            print(f"megatron-lora: warning: {job.name}: is written in fp32, since {dtype} has no number for one of its", file=sys.stderr)
        metrics = metrics_file(self.config.output_dir, job.name)
        notes = [describe_evaluations(metrics, step, best) if job.config.is_evaluated else ""]
        job.advice = serving_advice(job.config, job.data, self.model_dir)
        write_adapter(directory, exported, self.config.base_model, job.name, [*filter(None, [*notes, job.advice])])

    def _state(self, snapshot: Snapshot, reported: Reported) -> CheckpointState:
        job, progress = snapshot.job, reported.progress
        if job.name not in self.samples:
            self.samples[job.name] = job.data.digest()
            self.logged[job.name] = LoggedDigest(metrics_file(self.config.output_dir, job.name))
        return CheckpointState(
            step=snapshot.step,
            num_steps=job.num_steps,
            num_updates=snapshot.num_updates,
            skipped_in_a_row=snapshot.skipped_in_a_row,
            samples=self.samples[job.name],
            job=deciding_keys(job.config),
            reference="" if job.references is None else job.references.adapter,
            metrics=self.logged[job.name].until(snapshot.step, reported.evaluation_due),
            best=progress.best,
            evaluations_without_improvement=progress.num_without,
            evaluation_due=reported.evaluation_due,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A job's weights where it starts or resumes, and Adam's two moments if it resumes: this rank's shards, in host memory."""

    weights: Tensor
    has_magnitudes: bool = True  # of a DoRA job; else they begin as the norms of what it starts with
    moments: tuple[Tensor, ...] = ()
    initial: Tensor | None = None  # `init_adapter`'s weights, where they are the job's reference and still to be computed with


def read_start(job: Job, arena: Arena, first_factors: FirstFactors | None = None) -> Start:
    """Read or draw what `start_job` copies to the device; any thread may call it.

    Values come from the job's checkpoint, with Adam's moments; without one from `init_adapter`;
    without that they are PEFT's initial values, of `first_factors` where those are cut out of the base weights (to measure
    without a base model, others serve).
    """
    point, spec = job.resume_point, job.adapter_spec()
    initial = None
    computes = job.references is not None and (job.references.unknown or job.has_mismatched)
    if job.reference_has_adapter and job.config.init_adapter is not None and computes:
        initial = arena.shard(spec, as_in_arena(job.config, read_adapter(job.config.init_adapter)))
    if point.checkpoint is not None and point.state is not None:
        weights, moments = read_checkpoint(point.checkpoint)
        shards = tuple(arena.shard(spec, moment) for moment in moments)
        return Start(weights=arena.shard(spec, weights), moments=shards, initial=initial)
    if job.config.init_adapter is not None:
        adapter = read_adapter(job.config.init_adapter)
        weights = arena.shard(spec, as_in_arena(job.config, adapter))
        return Start(weights=weights, has_magnitudes=bool(adapter.magnitudes), initial=initial)
    if job.config.has_frozen_half and first_factors is not None:
        return Start(weights=arena.shard(spec, first_factors.read(job.name)), has_magnitudes=False)
    weights = arena.draw(spec, job.step_samples.seed, gaussian=job.config.init_lora_weights == "gaussian")
    return Start(weights=weights, has_magnitudes=False)


def start_job(job: Job, arena: Arena, adapter_row: int, groups: StageGroups, start: Start) -> None:
    """Make a job resident in the row of the arena that was added for it: copy its state there, make its optimizer."""
    job.adapter_row = adapter_row
    job.resident_optimizer = JobOptimizer(arena, adapter_row, job.optimizer_settings(), groups)
    arena.put(adapter_row, start.weights, arena.master)
    arena.set_norms(adapter_row, groups.tensor, restart=not start.has_magnitudes)
    if start.moments:
        state = job.resume_point.state
        assert state is not None
        for moment, buffer in zip(start.moments, (arena.exp_avg, arena.exp_avg_sq), strict=True):
            arena.put(adapter_row, moment, buffer)
        job.optimizer.restore(state.num_updates, state.skipped_in_a_row)
