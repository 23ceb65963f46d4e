"""A run from top to bottom: what every rank does between the config and the exit status.

The data and the adapters' initial values depend on the config alone, so each rank makes its own.
The plan comes from the first rank, window after window. The first rank (global rank 0, which
belongs to the first stage) also reports to the user and writes all files.

`jobs` maps numbers to the jobs that still have steps to take (jobs.Job: config, data, resume point,
adapter row, optimizer, state). They are numbered from 0 in the order of the config. Plans and
messages name a job by its number; its adapter row, where its adapter lies in the arena, is another
number. Ranks exchange three kinds of data, each kind over groups of its own: activations and
gradients between stages (messages.py), sums over the ranks of one stage (StageGroups), and data of
the host, over gloo: the plan (plan_feed.py), stop requests and the rest (`host_group`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.data.sample_arrays import target_share
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.output.run_directory import RunDirectory, has_trained, job_states
from megatron_lora.output.standing import resume_points
from megatron_lora.output.timeline import Timeline, write_timeline
from megatron_lora.parallel.process_groups import Position, from_first_rank, initialize_parallel, new_group, position_of
from megatron_lora.planning.calibration import calibrated, keep_calibration, predicted_cost
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.plan_feed import PlanFeed, PlanSettings
from megatron_lora.planning.predict import planner_cost
from megatron_lora.planning.resolve import describe, memory_line, resolve
from megatron_lora.training.agree_to_stop import until_stopped
from megatron_lora.training.assemble import make_executor, make_resident
from megatron_lora.training.determinism import determinism
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Job, read_jobs_in_turn
from megatron_lora.training.run_reporter import RunReporter
from megatron_lora.training.saving import Saver, writer
from megatron_lora.training.snapshots import SnapshotCollector
from megatron_lora.training.stop_request import StopRequest
from megatron_lora.training.warm_up import warm_up
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths

LONGEST_WINDOW = timedelta(days=7)  # timeout of the plan's process group: a rank waits there for as long as a window trains


def run(config: RunConfig, stop: StopRequest) -> None:
    """Train a config's remaining jobs, as one rank of the run; status.json then says how each job ended.

    A job remains until it is over (job_states.OVER). If the run was stopped on request, the state of
    every unfinished job is saved. The output directory must exist. Raises UserError for wrong input.
    """
    with determinism(config.deterministic):
        _train(config, stop)


def _train(config: RunConfig, stop: StopRequest) -> None:
    on_gpu = torch.cuda.is_available()
    device = initialize_parallel(config.parallel, "nccl" if on_gpu else "gloo", config.seed)
    host_group = new_group(backend="gloo")
    path = Path(config.output_dir)
    # The config that was checked and written there: other ranks may lie on machines whose copy of the user's file is another.
    recorded = from_first_rank(lambda: load_config(path / "config.yaml"), host_group)
    assert recorded.parallel.world_size == config.parallel.world_size
    config = recorded
    # Name -> where the job resumes (its newest checkpoint, or its start) of the jobs that remain.
    remaining = from_first_rank(lambda: resume_points(config, job_states(path)), host_group)

    model_dir = resolve_base_model(config.base_model)
    architecture = read_base_model(model_dir, config.load_weights)
    jobs = read_jobs_in_turn(config.jobs, model_dir, architecture.vocab_size, host_group, remaining)
    share_of_targets = target_share((job.step_samples.samples, job.step_samples.steps) for job in jobs.values())
    lengths = [job.step_samples.lengths() for job in jobs.values()]
    config, slot_cost = resolve_together(config, architecture, lengths, share_of_targets, host_group, list(remaining))
    position = position_of(config.parallel)
    feed = _start_planning(config, lengths, position, slot_cost, [job.resume_point.step for job in jobs.values()])

    stage, arena = make_resident(config, architecture, model_dir, jobs, device)
    # When a failure is noticed depends on time, and with it the first window without the job. Its steps are skipped in any case.
    remove = (lambda number: None) if config.deterministic else feed.remove
    with RunReporter(config, jobs, remove) if dist.get_rank() == 0 else contextlib.nullcontext() as reporter:
        collector = SnapshotCollector(arena, writer(config, jobs), host_group)
        saver = Saver(jobs, collector)
        unchecked = set(jobs)  # numbers of the jobs whose first update (learning rate above 0, finite norm) is still to come

        def on_step(done: StepDone) -> None:
            job = jobs[done.job]
            # Reading the norm waits for the device, once per job.
            if done.job in unchecked and job.optimizer.settings.learning_rate_at(done.step) > 0 and bool(torch.isfinite(done.square_norm)):
                unchecked.remove(done.job)
                _warn_of_unmoved(job)
            if reporter is not None:  # a step that a checkpoint follows is reported before the checkpoint is written
                reporter.on_step(done, collector.written, wait=saver.checkpoints(done))
            saver.on_step(done)  # saves the adapter after the job's last step

        if on_gpu:
            warm_up(stage, arena, config.microbatch_tokens, config.parallel.row_multiple)
        executor = make_executor(
            stage,
            config.parallel,
            feed.settings.max_endings,
            jobs=jobs,
            on_step=on_step,
            on_forward=reporter.on_forward if reporter is not None else lambda microbatch: None,
        )
        stop_group = new_group(backend="gloo")
        executor.run(until_stopped(feed, stop, stop_group, position.num_stages, position.gap))
        feed.close()
        if reporter is not None:
            reporter.flush()
        stopped = stop.stopped and saver.save_unfinished()  # False if the stop came when all jobs were finished
        collector.finish()
        if reporter is not None:
            reporter.finish(collector.written, stopped=stopped)
    _save_timeline(config, executor.timeline, position, host_group)


def _start_planning(
    config: ResolvedConfig, lengths: Lengths, position: Position, slot_cost: SlotCost, first_steps: Sequence[int]
) -> PlanFeed:
    """Start to plan the jobs' steps from `first_steps` on, in the background, while the model is built."""
    parallel = config.parallel
    settings = PlanSettings(
        num_stages=parallel.pipeline,
        num_replicas=parallel.data,
        capacity=config.microbatch_tokens,
        delay=position.delay,
        cost=slot_cost,
    )
    replica = parallel.replica_of(dist.get_rank())
    group = new_group(backend="gloo", timeout=LONGEST_WINDOW)
    return PlanFeed(lengths, settings, replica, Path(config.output_dir) / "plan", group, first_steps)


def _warn_of_unmoved(job: Job) -> None:
    """Warn of modules whose B is still zero after the job's first update: no gradient reaches them."""
    unmoved = job.optimizer.unmoved()
    if unmoved:
        names = f"{', '.join(unmoved[:3])}{f' and {len(unmoved) - 3} more' if len(unmoved) > 3 else ''}"
        print(f"megatron-lora: warning: job {job.name}: B has not moved in its first step: {names}", file=sys.stderr)


def _save_timeline(config: RunConfig, timeline: Timeline, position: Position, host_group: dist.ProcessGroup) -> None:
    """Collect the timed spans of all ranks on the first one, which writes them as one trace."""
    rank = dist.get_rank()
    events: list | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(timeline.events(rank, position.stage), events, group=host_group)
    if events is not None:
        write_timeline(Path(config.output_dir) / "timeline.json", events)


def resolve_together(
    config: RunConfig,
    architecture: Architecture,
    lengths: Lengths,
    target_share: float,
    host_group: dist.ProcessGroup,
    names: Sequence[str],
) -> tuple[ResolvedConfig, SlotCost]:
    """Return the resolved config and the planner's cost model; the first rank makes both for all ranks.

    It also prints and records what was chosen. The memory of its own device decides, even if other
    ranks have more or less. `host_group` is a gloo group of all ranks; `lengths` and `target_share`
    are as in planning.resolve; `names` are those of the jobs that remain.
    """

    def choose() -> tuple[ResolvedConfig, SlotCost]:
        device, path = this_device(config.parallel.world_size), Path(config.output_dir)
        table, basis = keep_calibration(path, has_trained(path), cache_dir(), config, architecture, device)
        device = calibrated(device, table)
        resolved = resolve(config, architecture, lengths, device, target_share)
        with RunDirectory.join(config) as directory:
            directory.write_resolved(resolved, predicted_cost(resolved, architecture, device, target_share, table, names))
        chosen = [*describe(config, resolved, target_share), *memory_line(config, resolved, architecture, device)]
        for line in [*filter(None, [basis]), *chosen]:
            print(line, flush=True)
        return resolved, planner_cost(resolved, architecture, device, target_share)

    return from_first_rank(choose, host_group)
