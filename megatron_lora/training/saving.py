"""How a job's state is saved and restored: when snapshots are taken, what the first rank writes, how a job starts or resumes.

A job's PEFT directory is `jobs/<name>/` itself. Every `save_steps` steps, and when a run is stopped, a
checkpoint (checkpoint.py) is written inside it, and the adapter in the PEFT directory is replaced by
that of the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.serving import serving_advice
from megatron_lora.files import sync
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter, write_adapter
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.output.checkpoint import read_checkpoint, write_checkpoint
from megatron_lora.output.metrics import metrics_file
from megatron_lora.output.standing import CheckpointState
from megatron_lora.parallel.process_groups import StageGroups
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Job, Jobs
from megatron_lora.training.optimizer import JobOptimizer
from megatron_lora.training.snapshots import Snapshot, SnapshotCollector, Weights


class Saver:
    """Decides which jobs are saved after a step, and at the end of a run that was stopped: the same on every rank."""

    def __init__(self, jobs: Jobs, collector: SnapshotCollector):
        self.jobs = jobs
        self.collector = collector

    def checkpoints(self, done: StepDone) -> bool:
        """Return whether a checkpoint follows this step: every `save_steps` steps of the job, but not after its last one."""
        job, taken = self.jobs[done.job], done.step + 1
        every = job.config.save_steps
        return bool(every and taken % every == 0 and taken < job.num_steps)

    def on_step(self, done: StepDone) -> None:
        """Count a step; save its job if the step was its last one or a checkpoint is due."""
        job = self.jobs[done.job]
        job.steps_taken = done.step + 1
        if self.checkpoints(done) or job.steps_taken == job.num_steps:
            self._save(job)

    def save_unfinished(self) -> bool:
        """Save every unfinished job that has taken steps since its last snapshot; return whether any job is unfinished.

        A job is unfinished when it has steps to take and has not failed. Waits for the device.
        """
        unfinished = [job for job in self.jobs.values() if job.steps_taken < job.num_steps and not job.optimizer.has_failed()]
        for job in unfinished:
            if job.steps_taken > job.steps_saved:
                self._save(job)
                self.collector.wait()  # so that only one job's state is in host memory at a time
        return bool(unfinished)

    def _save(self, job: Job) -> None:
        self.collector.submit(job, moments=job.steps_taken < job.num_steps)
        job.steps_saved = job.steps_taken


def writer(config: RunConfig, jobs: Jobs) -> Callable[[Snapshot], None]:
    """Return the function that writes a snapshot: first a checkpoint, if the job has steps remaining, then its PEFT directory."""
    digests: dict[int, str] = {}

    def write(snapshot: Snapshot) -> None:
        job = jobs[snapshot.job]
        adapter = adapter_of(job.config, snapshot.weights)
        directory = Path(config.output_dir) / "jobs" / job.config.name
        if snapshot.moments:
            if snapshot.job not in digests:
                digests[snapshot.job] = job.data.digest()
            state = CheckpointState(
                step=snapshot.step,
                num_steps=job.num_steps,
                num_updates=snapshot.num_updates,
                skipped_in_a_row=snapshot.skipped_in_a_row,
                samples=digests[snapshot.job],
            )
            sync(metrics_file(config.output_dir, job.config.name))
            write_checkpoint(directory, adapter, config.base_model, snapshot.moments, state)
        write_adapter(directory, adapter, config.base_model, serving_advice(job.config, job.data))

    return write


def adapter_of(job: JobConfig, weights: Weights) -> AdapterFile:
    """Return a job's adapter in PEFT's format."""
    return AdapterFile(
        r=job.r,
        lora_alpha=job.lora_alpha,
        use_rslora=job.use_rslora,
        lora_dropout=job.lora_dropout,
        target_modules=job.target_modules,
        weights=weights,
    )


def start_job(job: Job, arena: Arena, adapter_row: int, groups: StageGroups) -> None:
    """Make a job resident: give it a row of the arena that holds its adapter, load its weights there, make its optimizer.

    They come from the job's checkpoint, with Adam's moments and step counts; without one from
    `init_adapter`; without that they are PEFT's initial values.
    """
    job.adapter_row = adapter_row
    job.resident_optimizer = JobOptimizer(arena, adapter_row, job.optimizer_settings(), groups)
    point = job.resume_point
    if point.checkpoint is not None and point.state is not None:
        weights, moments = read_checkpoint(point.checkpoint)
        arena.load(adapter_row, weights)
        for moment, buffer in zip(moments, (arena.exp_avg, arena.exp_avg_sq), strict=True):
            arena.fill(adapter_row, moment, buffer)
        job.optimizer.restore(point.state.num_updates, point.state.skipped_in_a_row)
    elif job.config.init_adapter is not None:
        arena.load(adapter_row, read_adapter(job.config.init_adapter).weights)
    else:
        arena.initialise(adapter_row, job.step_samples.seed)
