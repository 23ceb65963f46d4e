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
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_lora.config.live import Live
from megatron_lora.config.objective_keys import PairObjective
from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.data.evaluation import longest_of
from megatron_lora.data.sample_arrays import target_share
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.data.tokenizer import tokenizer_for
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.stage import Stage
from megatron_lora.output.changes import Run
from megatron_lora.output.events import Replay
from megatron_lora.output.run_directory import RunDirectory, has_trained, job_states
from megatron_lora.output.standing import first_jobs, resume_points
from megatron_lora.output.timeline import Timeline, spans_of_a_rank, write_timeline
from megatron_lora.parallel.process_groups import (
    Position,
    from_first_rank,
    initialize_parallel,
    new_group,
    pipelines,
    position_of,
    stage_groups,
)
from megatron_lora.planning.adapter_memory import check_fits
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.planning.calibration import calibrated, keep_calibration, predicted_cost
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.plan_feed import PlanFeed, PlanSettings
from megatron_lora.planning.predict import planner_cost, rank_row_bytes_of, room_of, window_time
from megatron_lora.planning.resolve import describe, memory_line, resolve
from megatron_lora.planning.targets import completed, targeted, with_modules
from megatron_lora.training.agree_to_stop import until_stopped
from megatron_lora.training.assemble import DTYPES, make_arena, make_executor, make_stage
from megatron_lora.training.control import Control
from megatron_lora.training.determinism import determinism
from megatron_lora.training.executor import StepDone
from megatron_lora.training.first_factors import FirstFactors
from megatron_lora.training.first_updates import FirstUpdates
from megatron_lora.training.job_reader import JobReader, read_and_check
from megatron_lora.training.jobs import Job, Jobs, read_jobs_in_turn, spec_of
from megatron_lora.training.near_ties import NearTies
from megatron_lora.training.references import ReferenceCache
from megatron_lora.training.reported import ReportBoard
from megatron_lora.training.residents import Residents
from megatron_lora.training.run_reporter import RunReporter
from megatron_lora.training.saving import Saver, Writer
from megatron_lora.training.snapshots import SnapshotCollector
from megatron_lora.training.stop_request import StopRequest
from megatron_lora.training.warm_up import warm_up
from megatron_lora.training.window_changes import WindowChanges
from scheduling.follow import Window
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch

OnBegin = Callable[[str, int], None]
# Python's 5 ms would pass at each kernel that the training thread launches while another thread plans, reads or saves: a launch gives
# the interpreter's lock away.
SWITCH_S = 5e-5
LONGEST_WINDOW = timedelta(days=7)  # timeout of the plan's process group: a rank waits there for as long as a window trains


def run(config: RunConfig, stop: StopRequest, live: Live = Live(), on_begin: OnBegin | None = None) -> None:  # noqa: B008  it is frozen
    """Train a config's remaining jobs, as one rank of the run; status.json then says how each job ended.

    `on_begin(name, index)` is called where an action begins.

    A job remains until it is over (job_states.OVER). If the run was stopped on request, the state of
    every unfinished job is saved. The output directory must exist. Raises UserError for wrong input.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        with determinism(config.deterministic):
            _train(config, stop, live, on_begin)
    finally:
        sys.setswitchinterval(interval)


def _train(config: RunConfig, stop: StopRequest, live: Live, on_begin: OnBegin | None) -> None:
    device = initialize_parallel(config.parallel, seed=config.seed)
    host_group = new_group(backend="gloo")
    path = Path(config.output_dir)
    # The config that was checked and written there: other ranks may lie on machines whose copy of the user's file is another.
    recorded = from_first_rank(lambda: load_config(path / "config.yaml"), host_group)
    assert recorded.parallel.world_size == config.parallel.world_size
    config = recorded
    states = from_first_rank(lambda: job_states(path), host_group)
    # Name -> where the job resumes (its newest checkpoint, or its start) of the jobs that wait.
    points = from_first_rank(lambda: resume_points(config, states), host_group)
    points = {name: point for name, point in points.items() if states[name] == "queued"}

    model_dir = resolve_base_model(config.base_model)
    architecture = read_base_model(model_dir, config.load_weights)
    config = targeted(config, architecture)
    first = read_jobs_in_turn(first_jobs(config, points), model_dir, architecture.vocab_size, host_group, points)
    # Without a job to train, one that is added decides nothing any more: the head is then taken to compute every row.
    share_of_targets = target_share((job.step_samples.samples, job.step_samples.steps) for job in first.values()) if first else 1.0
    lengths = _lengths(config, architecture, first, points)
    config, slot_cost, longest = resolve_together(config, architecture, lengths, share_of_targets, host_group, live)
    arena: Future[Arena] = Future()
    residents = Residents(
        lambda configs: load_jobs_data(configs, tokenizer_for(configs, model_dir), cache_dir(), architecture.vocab_size),
        arena,
        stage_groups(config.parallel),
        config.parallel.data,
        slot_cost,
        ReferenceCache(config, model_dir, cache_dir()),
        FirstFactors(config.output_dir, config.base_model, architecture, model_dir),
        keeps_references=position_of(config.parallel).is_last and dist.get_rank() == pipelines(config.parallel)[0][-1],
    )
    residents.data = {job.name: job.data for job in first.values()}
    control = None
    if dist.get_rank() == 0:
        begun = [name for name, point in points.items() if point.step]
        control = _make_control(config, architecture, model_dir, Run(config=config, states=states), residents.data, begun, live)
    feed = _start_planning(config, slot_cost, longest, control, residents)
    stage = make_stage(config, architecture, model_dir, device)
    arena.set_result(make_arena(stage, config.parallel, [], _room_of(config, architecture)))
    if device.type == "cuda":
        specs = [spec_of(job) for job in config.jobs]
        warm_up(stage, arena.result(), config.microbatch_tokens, config.parallel.row_multiple, specs)
    near_ties = NearTies()
    timeline = _run_windows(config, stage, arena.result(), residents, control, feed, stop, on_begin, model_dir, near_ties)
    _save_timeline(config, timeline, position_of(config.parallel), host_group)
    if architecture.num_experts:
        near_ties.say(config.parallel.tensor, host_group)


def _run_windows(
    config: ResolvedConfig,
    stage: Stage,
    arena: Arena,
    residents: Residents,
    control: Control | None,
    feed: PlanFeed,
    stop: StopRequest,
    on_begin: OnBegin | None,
    model_dir: Path,
    near_ties: NearTies,
) -> Timeline:
    """Execute the plan's windows to their end, or until the run is stopped; save and report what jobs leave behind."""
    jobs, board, position = residents.jobs, ReportBoard(), position_of(config.parallel)
    with RunReporter(config, jobs, board, control) if control is not None else contextlib.nullcontext() as reporter:
        # Ranks wait for the first one's thread, which may wait until a job is evaluated.
        writer = Writer(config, board, model_dir, {} if reporter is None else reporter.directory.status().get("rests_on", {}))
        collector = SnapshotCollector(arena, writer.write, new_group(backend="gloo", timeout=LONGEST_WINDOW))
        collector.pin_ahead([spec_of(job) for job in config.jobs if job.save_steps])
        saver = Saver(jobs, collector, board)
        first_updates = FirstUpdates()

        def on_window(window: Window) -> None:
            if reporter is not None:
                reporter.on_window(collector.written, begins=window.changes is not None)
            if isinstance(window.changes, WindowChanges):
                residents.begin(window.changes, saver)

        def on_join(job: Job) -> None:
            first_updates.join(job)
            if reporter is not None:
                reporter.join(job)

        def on_step(done: StepDone) -> None:
            job = jobs[done.job]
            first_updates.on_step(job, done)
            saver.on_step(done)  # first: what is reported then may be what its snapshot waits for
            if reporter is not None:
                reporter.on_step(done, collector.written)

        def on_forward(microbatch: Microbatch) -> None:
            residents.before(microbatch)
            if reporter is not None:
                reporter.on_forward(microbatch)

        residents.on_join = on_join
        executor = make_executor(
            stage,
            config.parallel,
            feed.settings.max_endings,
            jobs=jobs,
            on_step=on_step,
            on_evaluation=reporter.on_evaluation if reporter is not None else lambda done: None,
            on_forward=on_forward,
            on_window=on_window,
            move=residents.move,
            with_references=residents.with_references,
            is_stopped=lambda: stop.stopped,
            timeline=Timeline(stage.device, spans_of_a_rank(config.parallel.world_size), on_begin or (lambda name, index: None)),
            near_ties=near_ties,
        )
        executor.run(until_stopped(feed, stop, new_group(backend="gloo"), position.num_stages, position.gap))
        feed.close()
        for job in jobs.values():
            residents.keep_references(job)
        if reporter is not None:
            reporter.end_reports()
        stopped = stop.stopped and saver.save_unfinished()  # False if the stop came when all jobs were finished
        collector.finish()
        if reporter is not None and control is not None:
            reporter.finish(collector.written, stopped=stopped)
            control.finish()
    return executor.timeline


def _make_control(
    config: ResolvedConfig,
    architecture: Architecture,
    model_dir: Path,
    run: Run,
    read: Collection[str],
    begun: Collection[str],
    live: Live,
) -> Control:
    """Return what decides, on the first rank, which jobs join and leave; `read` and `begun` are names of jobs."""
    room = _room_of(config, architecture)
    row_bytes = rank_row_bytes_of(config, architecture, DTYPES[config.precision].itemsize)
    check = partial(
        read_and_check,
        output_dir=config.output_dir,
        base_model=config.base_model,
        model_dir=model_dir,
        architecture=architecture,
        budget=config.microbatch_tokens,
        cache_dir=cache_dir(),
    )
    reader, complete = JobReader(check), partial(completed, architecture=architecture)
    if any(state == "queued" and name not in read for name, state in run.states.items()):
        reader.start()  # while the model is built
    return Control(
        Path(config.output_dir),
        run.with_jobs(complete),  # requests that waited for this start are among them
        Book(room),
        reader,
        read=read,
        begun=begun,
        gap=position_of(config.parallel).gap,
        check_fits=lambda job: check_fits(job.name, with_modules(job, architecture), room, row_bytes, float(config.adapter_memory)),
        complete=complete,
        num_devices=config.parallel.world_size,
        deterministic=config.deterministic,
        keep_alive=live.keep_alive,
        max_wait_s=config.max_wait_s,
        replay=None if live.replay is None else Replay(live.replay),
    )


def _lengths(config: RunConfig, architecture: Architecture, first: Jobs, points: Collection[str]) -> Lengths:
    """Return the lengths that a microbatch must hold: of the jobs that have been read, and of those of `points` that have not, at most."""
    lengths: list[Sequence[Sequence[int]]] = [job.step_samples.lengths() for job in first.values()]
    lengths += longest_of((job.config, job.data.samples, job.validation_samples) for job in first.values())
    read = {job.name for job in first.values()}
    waiting = [job for job in config.jobs if not points or (job.name in points and job.name not in read)]  # without any, others may come
    return lengths + [
        [[min(job.sequence_len, architecture.max_positions) * (1 + isinstance(job.preference, PairObjective))]] for job in waiting
    ]


def _room_of(config: ResolvedConfig, architecture: Architecture) -> dict[str, int]:
    """Return the arena's rank rows of each module."""
    return room_of(config, architecture, DTYPES[config.precision].itemsize)


def _start_planning(config: ResolvedConfig, slot_cost: SlotCost, longest: float, control: Control | None, residents: Residents) -> PlanFeed:
    """Start to plan in the background, while the model is built."""
    parallel = config.parallel
    settings = PlanSettings(
        num_stages=parallel.pipeline,
        num_replicas=parallel.data,
        capacity=config.microbatch_tokens,
        delay=position_of(parallel).delay,
        cost=slot_cost,
        window_time=longest,
    )
    replica = parallel.replica_of(dist.get_rank())
    group = new_group(backend="gloo", timeout=LONGEST_WINDOW)
    return PlanFeed(settings, replica, Path(config.output_dir) / "plan", group, control, residents)


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
    share_of_targets: float,
    host_group: dist.ProcessGroup,
    live: Live = Live(),  # noqa: B008  it is frozen
) -> tuple[ResolvedConfig, SlotCost, float]:
    """Return the resolved config, the planner's cost model and a window's longest planned time; the first rank makes them for all ranks.

    It also prints and records what was chosen. The memory of its own device decides, even if other
    ranks have more or less. `host_group` is a gloo group of all ranks; `lengths` and `share_of_targets`
    are as in planning.resolve.
    """

    def choose() -> tuple[ResolvedConfig, SlotCost, float]:
        device, path = this_device(config.parallel.world_size), Path(config.output_dir)
        table, basis = keep_calibration(path, has_trained(path), cache_dir(), config, architecture, device)
        device = calibrated(dataclasses.replace(device, memory_bytes=device.memory_bytes * live.memory_share), table)
        resolved = resolve(config, architecture, lengths, device, share_of_targets, live.keep_alive)
        with RunDirectory.join(config) as directory:
            directory.write_resolved(
                resolved, predicted_cost(resolved, architecture, device, share_of_targets, table, [job.name for job in config.jobs])
            )
        chosen = [*describe(config, resolved, share_of_targets), *memory_line(config, resolved, architecture, device)]
        for line in [*filter(None, [basis]), *chosen]:
            print(line, flush=True)
        longest = window_time(resolved, architecture, device, share_of_targets, resolved.window_s)
        return resolved, planner_cost(resolved, architecture, device, share_of_targets), longest

    return from_first_rank(choose, host_group)
