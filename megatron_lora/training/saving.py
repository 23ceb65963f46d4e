"""How a job's state goes to disk and comes back: when snapshots are taken, what the first rank writes of them, how a job begins.

A job's PEFT directory is `jobs/<name>/` itself. Every `save_steps` steps, and where a run is stopped, a checkpoint (checkpoint.py) is
written inside it, and the PEFT directory is brought up to the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.samples import digest_of
from megatron_lora.files import sync
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter, write_adapter
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.output.checkpoint import read_checkpoint, write_checkpoint
from megatron_lora.output.metrics import metrics_file
from megatron_lora.output.standing import CheckpointState, ResumePoint
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import TrainingJob
from megatron_lora.training.optimizer import JobOptimizer
from megatron_lora.training.snapshots import Snapshot, SnapshotCollector, Weights


class Saver:
    """Decides on every rank alike which jobs are saved after a step, and at the end of a run that was stopped."""

    def __init__(
        self,
        jobs: Sequence[TrainingJob],
        optimizers: Sequence[JobOptimizer],
        standings: Sequence[ResumePoint],
        collector: SnapshotCollector,
    ) -> None:
        self.jobs, self.optimizers, self.collector = jobs, optimizers, collector
        self.taken = [standing.step for standing in standings]
        self.saved = list(self.taken)  # steps that are on the disk, or on their way

    def checkpoints(self, done: StepDone) -> bool:
        """Say whether a step is followed by a checkpoint: its job has taken as many more as its `save_steps`, and is not finished."""
        job, taken = self.jobs[done.job], done.step + 1
        every = job.config.save_steps
        return bool(every and taken % every == 0 and taken < job.num_steps)

    def on_step(self, done: StepDone) -> None:
        """Note a step that was taken; save a job that it has finished, or that is due for a checkpoint."""
        self.taken[done.job] = done.step + 1
        if self.checkpoints(done) or self.taken[done.job] == self.jobs[done.job].num_steps:
            self._save(done.job)

    def save_unfinished(self) -> bool:
        """Save every job that has steps left and has taken some since it was saved; return whether any has steps left to take.

        A job that has failed has none. Waits for the device.
        """
        unfinished = [
            slot
            for slot, (job, optimizer) in enumerate(zip(self.jobs, self.optimizers, strict=True))
            if self.taken[slot] < job.num_steps and not optimizer.has_failed()
        ]
        for slot in unfinished:
            if self.taken[slot] > self.saved[slot]:
                self._save(slot)
                self.collector.wait()  # one job's state at a time
        return bool(unfinished)

    def _save(self, slot: int) -> None:
        step = self.taken[slot]
        self.collector.submit(slot, step, self.optimizers[slot], moments=step < self.jobs[slot].num_steps)
        self.saved[slot] = step


def writer(config: RunConfig, jobs: Sequence[TrainingJob]) -> Callable[[Snapshot], None]:
    """Return what writes a snapshot: the job's PEFT directory, and before it a checkpoint where the job has steps left."""
    digests: dict[int, str] = {}

    def write(snapshot: Snapshot) -> None:
        job = jobs[snapshot.slot]
        adapter = adapter_of(job.config, snapshot.weights)
        directory = Path(config.output_dir) / "jobs" / job.config.name
        if snapshot.moments:
            if snapshot.slot not in digests:
                digests[snapshot.slot] = digest_of(job.data.samples)
            state = CheckpointState(
                step=snapshot.step,
                num_steps=job.num_steps,
                num_updates=snapshot.num_updates,
                skipped_in_a_row=snapshot.skipped_in_a_row,
                samples=digests[snapshot.slot],
            )
            sync(metrics_file(config.output_dir, job.config.name))
            write_checkpoint(directory, adapter, config.base_model, snapshot.moments, state)
        write_adapter(directory, adapter, config.base_model)

    return write


def adapter_of(job: JobConfig, weights: Weights) -> AdapterFile:
    """Return a job's adapter as a PEFT directory holds it."""
    return AdapterFile(
        r=job.r,
        lora_alpha=job.lora_alpha,
        use_rslora=job.use_rslora,
        lora_dropout=job.lora_dropout,
        target_modules=job.target_modules,
        weights=weights,
    )


def begin_job(arena: Arena, slot: int, job: TrainingJob, standing: ResumePoint, optimizer: JobOptimizer) -> None:
    """Give a job its weights: of its checkpoint, with Adam's moments and counts, or of `init_adapter`, or PEFT's initial ones."""
    if standing.checkpoint is not None and standing.state is not None:
        weights, moments = read_checkpoint(standing.checkpoint)
        arena.load(slot, weights)
        for moment, buffer in zip(moments, (arena.exp_avg, arena.exp_avg_sq), strict=True):
            arena.fill(slot, moment, buffer)
        optimizer.restore(standing.state.num_updates, standing.state.skipped_in_a_row)
    elif job.config.init_adapter is not None:
        arena.load(slot, read_adapter(job.config.init_adapter).weights)
    else:
        arena.initialise(slot, job.rows.seed)
