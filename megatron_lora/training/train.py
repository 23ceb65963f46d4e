"""The story of a run, top to bottom: what every rank does between the config and the exit status.

The data and the adapters' first values are functions of the config alone, so each rank makes its own; the plan comes from the first
rank, window after window. The first rank (first stage, first tensor rank) reports and writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.data.steps import target_share
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.huggingface.architecture import Architecture, read_architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.stage import build_stage
from megatron_lora.output.run_directory import RunDirectory, has_trained, job_states
from megatron_lora.output.standing import Standing, standings
from megatron_lora.output.timeline import Timeline, write_timeline
from megatron_lora.parallel.messages import MessageLayout, connect
from megatron_lora.parallel.process_groups import Position, initialize_parallel, pipelines, position_of, rank_timeout, stage_groups
from megatron_lora.planning.calibration import calibrated, keep_calibration, predicted_cost
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.plan_feed import PlanFeed, PlanSettings
from megatron_lora.planning.predict import planner_cost
from megatron_lora.planning.resolve import describe, memory_line, resolve
from megatron_lora.training.agree_to_stop import until_stopped
from megatron_lora.training.assemble import choose_backends, compute_dtype, make_arena, make_executor
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import TrainingJob, read_jobs_in_turn
from megatron_lora.training.optimizer import JobOptimizer, StageGroups
from megatron_lora.training.run_reporter import RunReporter
from megatron_lora.training.saving import Saver, begin_job, writer
from megatron_lora.training.snapshots import SnapshotCollector
from megatron_lora.training.stop_request import StopRequest
from megatron_lora.training.warm_up import warm_up
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths

LONGEST_WINDOW = timedelta(days=7)  # a rank may wait for the next plan while the others train by the last


def run(config: RunConfig, stop: StopRequest) -> int:
    """Train the jobs of a config that are not over as one of its ranks; return the run's exit status.

    0: all are done; 3: some have failed; 75: stopped, as asked, with every job's state saved. The output directory exists already. Raises
    UserError for wrong input.
    """
    on_gpu = torch.cuda.is_available()
    device = initialize_parallel(config.parallel, "nccl" if on_gpu else "gloo", config.seed)
    host = dist.new_group(backend="gloo", timeout=rank_timeout())
    dtype = compute_dtype(config)

    model_dir = resolve_base_model(config.base_model)
    architecture = read_architecture(model_dir)
    left = _left(config, host)
    jobs = read_jobs_in_turn([job for job in config.jobs if job.name in left], model_dir, architecture.vocab_size, host)
    begins = [left[job.config.name] for job in jobs]
    share = target_share((job.rows.samples, job.rows.steps) for job in jobs)
    config, cost = resolve_together(
        config, architecture, [job.rows.lengths() for job in jobs], share, host, [job.config.name for job in jobs]
    )
    position = position_of(config.parallel)
    feed = _plan(config, jobs, position, cost, [begin.step for begin in begins])

    stage = build_stage(
        architecture,
        model_dir,
        config.parallel,
        dtype=dtype,
        device=device,
        load_weights=config.load_weights,
        seed=config.seed,
        recompute=config.recompute,
        base_weights=config.base_weights,
        backends=choose_backends(config, architecture, dtype, device),
    )
    arena = make_arena(stage, config.parallel, [job.adapter() for job in jobs])
    optimizers = _begin(arena, jobs, begins, config.parallel)

    with RunReporter(config, jobs, feed.leave, begins) if dist.get_rank() == 0 else contextlib.nullcontext() as reporter:
        collector = SnapshotCollector(arena, writer(config, jobs), host)
        saver = Saver(jobs, optimizers, begins, collector)
        unchecked = set(range(len(jobs)))  # jobs that have taken no step with a learning rate yet

        def on_step(done: StepDone) -> None:
            job, optimizer = jobs[done.job], optimizers[done.job]
            if done.job in unchecked and optimizer.learning_rate(done.step) > 0 and bool(torch.isfinite(done.square_norm)):
                unchecked.remove(done.job)
                _warn_of_unmoved(job, optimizer)
            if reporter is not None:
                reporter.on_step(done, collector.written, wait=saver.checkpoints(done))  # what a checkpoint holds has been told of
            saver.on_step(done)

        if on_gpu:
            warm_up(stage, arena, int(config.microbatch_tokens), config.parallel.tensor if config.parallel.sequence else 1)
        timeline = Timeline(device)
        layout = MessageLayout(max_endings=len(jobs), hidden_size=architecture.hidden_size, dtype=dtype)
        executor = make_executor(
            stage,
            config.parallel,
            connect(pipelines(config.parallel), layout, device),
            layout,
            rows=[job.rows for job in jobs],
            optimizers=optimizers,
            on_step=on_step,
            on_forward=reporter.on_forward if reporter is not None else lambda microbatch: None,
            timeline=timeline,
        )
        agreement = dist.new_group(backend="gloo", timeout=rank_timeout())
        executor.run(until_stopped(feed, stop, agreement, position.num_stages, position.lag))
        feed.close()
        if reporter is not None:
            reporter.flush()
        stopped = stop.stopped and saver.save_unfinished()
        collector.finish()
        if reporter is not None:
            reporter.finish(collector.written, stopped=stopped)
    _save_timeline(config, timeline, position, host)
    if stopped:
        return 75
    return 3 if any(optimizer.has_failed() for optimizer in optimizers) else 0


def _left(config: RunConfig, host: dist.ProcessGroup) -> dict[str, Standing]:
    """Return the jobs that are not over and where each goes on, as the first rank finds them in the output directory."""
    found: list = [standings(config, job_states(Path(config.output_dir)))] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(found, 0, group=host)
    return found[0]


def _plan(config: RunConfig, jobs: Sequence[TrainingJob], position: Position, cost: SlotCost, first_steps: Sequence[int]) -> PlanFeed:
    """Start to plan what is left of the jobs; the first windows are ready when the model is."""
    parallel = config.parallel
    settings = PlanSettings(
        num_stages=parallel.pipeline,
        num_replicas=parallel.data,
        capacity=int(config.microbatch_tokens),
        delay=position.delay,
        cost=cost,
    )
    replica = dist.get_rank() // parallel.tensor % parallel.data
    group = dist.new_group(backend="gloo", timeout=LONGEST_WINDOW)
    return PlanFeed([job.rows.lengths() for job in jobs], settings, replica, Path(config.output_dir) / "plan", group, first_steps)


def _begin(arena: Arena, jobs: Sequence[TrainingJob], begins: Sequence[Standing], parallel: ParallelConfig) -> list[JobOptimizer]:
    """Set each job's adapter and optimizer to where the job stands; returns the optimizers."""
    groups = StageGroups(**stage_groups(parallel))
    optimizers = [JobOptimizer(arena, row, job.optimizer(), groups) for row, job in enumerate(jobs)]
    for row, (job, standing) in enumerate(zip(jobs, begins, strict=True)):
        begin_job(arena, row, job, standing, optimizers[row])
    return optimizers


def _warn_of_unmoved(job: TrainingJob, optimizer: JobOptimizer) -> None:
    """Say which B a job's first step has left where it was: its adapter would not train there."""
    unmoved = optimizer.unmoved()
    if unmoved:
        names = f"{', '.join(unmoved[:3])}{f' and {len(unmoved) - 3} more' if len(unmoved) > 3 else ''}"
        print(f"megatron-lora: warning: job {job.config.name}: B has not moved in its first step: {names}", file=sys.stderr)


def _save_timeline(config: RunConfig, timeline: Timeline, position: Position, host: dist.ProcessGroup) -> None:
    """Collect the spans of all ranks and write them as one trace."""
    rank = dist.get_rank()
    events: list | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(timeline.events(rank, position.stage), events, group=host)
    if events is not None:
        write_timeline(Path(config.output_dir) / "timeline.json", events)


def resolve_together(
    config: RunConfig, architecture: Architecture, lengths: Lengths, target_share: float, host, names: Sequence[str]
) -> tuple[RunConfig, SlotCost]:
    """Settle a run's config, and the planner's weights, on the first rank for all of them; it tells and records what was chosen.

    `host` is a gloo group of all ranks; `names` are those of the jobs that are left, whose `lengths` these are. Other ranks of a run may
    have other memory: the first rank's decides.
    """
    import torch.distributed as dist

    chosen: list = [None, None]
    if dist.get_rank() == 0:
        device, path = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))), Path(config.output_dir)
        table = keep_calibration(path, has_trained(path), cache_dir(), config, architecture, device)
        device = calibrated(device, table)
        resolved = resolve(config, architecture, lengths, device, target_share)
        with RunDirectory.join(config) as directory:
            directory.resolve(resolved, predicted_cost(resolved, architecture, device, target_share, table, names))
        if table is not None:
            print(f"costs are by {table.describe()}", flush=True)
        for line in [*describe(config, resolved, target_share), *memory_line(config, resolved, architecture, device)]:
            print(line, flush=True)
        chosen = [resolved, planner_cost(resolved, architecture, device, target_share)]
    dist.broadcast_object_list(chosen, 0, group=host)
    return chosen[0], chosen[1]
