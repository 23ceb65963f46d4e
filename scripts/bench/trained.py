"""Runs a config in this process as `megatron-lora train` does in its ranks, with what a benchmark compares in a part's place.

    run = trained(config, policy="flush", adapters="unfused")      # on every rank; the first gets the FinishedRun

A policy other than ours plans the whole run as streams with a flush between; here they are one stream with as many no-ops between two as
drain the pipeline, so that every policy goes through the same executor, messages and optimizers.
"""

import gc
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_lora.commands.finished_run import FinishedRun
from megatron_lora.config.schema import RunConfig
from megatron_lora.environment import environment
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.parallel.process_groups import initialize_parallel
from megatron_lora.planning.plan_feed import Planned, PlanSettings
from megatron_lora.training import assemble, calibrate, train
from megatron_lora.training.stop_request import StopRequest
from scheduling.data_parallel import Dealt
from scheduling.follow import Follower, Window
from scheduling.pipeline import with_drain
from scheduling.plan_json import stream_to_json
from scheduling.policies import POLICIES
from scheduling.types import NOOP, Lengths, Stream
from scripts.bench.plain_lora import use_adapters


def trained(
    config: RunConfig,
    *,
    policy: str = "ours",
    adapters: str = "fused",
    around: AbstractContextManager | None = None,
    calibrated: bool = False,
) -> FinishedRun | None:
    """Train a config into its output directory, which is made anew, `around` the executor's run a profiler perhaps; `calibrated` first."""
    initialize_parallel(config.parallel, seed=config.seed)
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    with substituted(policy, adapters, around or nullcontext()):
        if calibrated:
            calibrate.run(config, None)
            gc.collect()  # what it held would count as taken when the run looks for free memory
            torch.cuda.empty_cache()
        with RunDirectory.create(config, environment()) if first else nullcontext() as directory:
            train.run(config, StopRequest())
            if directory is not None:
                status = directory.finish()
                assert status == 0, f"{config.output_dir}: the run ended with status {status}"
    return FinishedRun.read(Path(config.output_dir)) if first else None


@contextmanager
def substituted(policy: str, adapters: str, around: AbstractContextManager) -> Iterator[None]:
    """Put a policy's plan in the place of ours and a kind of adapters in the place of the fused ones; `around` the executor's run."""

    def stage(*arguments, before=assemble.build_stage, **keywords):
        built = before(*arguments, **keywords)
        use_adapters(built, adapters)
        return built

    def executor(*arguments, before=train.make_executor, **keywords):
        made = before(*arguments, **keywords)

        def run(windows, begin=made.run):
            with around:
                begin(windows)

        made.run = run
        return made

    feed = {} if policy == "ours" else {"PlanFeed": partial(PolicyFeed, policy)}
    with mock.patch.object(assemble, "build_stage", stage), mock.patch.multiple(train, make_executor=executor, **feed):
        yield


class PolicyFeed:
    """In the place of PlanFeed: a baseline's whole plan as one window, which all jobs join."""

    def __init__(self, policy: str, settings: PlanSettings, replica: int, plan_dir: Path, group: dist.ProcessGroup, director, crew):
        """Plan on the first rank, for all; the run begins with its first steps."""
        asked = None if director is None else director.ask(0, 0)
        told: list = [None if asked is None else asked.changes]
        dist.broadcast_object_list(told, 0, group=group)
        self.crew, joined = crew, crew.read(told[0])
        assert not any(job.first_step for job in joined), "baselines are not resumed"
        self.dealt, self.settings, self.replica = Dealt({job.number: job.dealt for job in joined}), settings, replica
        plan: list = [None, None]
        if director is not None:
            stream = laid_out(policy, self.dealt.rounds, settings)
            (plan_dir / "window-0000.json").write_text(json.dumps({"microbatches": stream_to_json(stream, self.dealt.rounds)}))
            planned = Planned(stream=stream, ended=self._ended(stream), left={}, departed=frozenset(self.dealt.jobs), used={})
            plan = [stream, director.planned(planned)[0]]
        dist.broadcast_object_list(plan, 0, group=group)
        self.stream, self.changes = plan

    def _ended(self, stream: Stream) -> tuple:
        s = self.settings
        follower = Follower(self.dealt.rounds, s.num_stages, s.capacity, s.delay)
        ended = follower.follow(stream)
        follower.finish()
        return ended

    def __iter__(self) -> Iterator[Window]:
        self.crew.prepare(self.changes)
        own = tuple(self.dealt.part(microbatch, self.replica) for microbatch in self.stream)
        yield Window(own, self._ended(self.stream), changes=self.changes)

    def close(self) -> None:
        """Do nothing."""


def laid_out(policy: str, rounds: Lengths, settings: PlanSettings) -> Stream:
    """Plan by a baseline and join its runs into one stream."""
    runs = POLICIES[policy](rounds, settings.num_stages, settings.capacity, settings.cost)
    drained = [with_drain(spaced(run, settings), settings.num_stages, settings.delay) for run in runs]
    return tuple(itertools.chain.from_iterable(drained))


def spaced(run: Stream, settings: PlanSettings) -> Stream:
    """Put no-ops where a job's next step would begin before the verdict of its last is there: policies plan without a delay."""
    gap, last, placed = settings.num_stages + settings.delay, {}, []
    for microbatch in run:
        first = max((last[s.job][1] + gap for s in microbatch.segments if s.job in last and last[s.job][0] != s.step), default=0)
        placed += [NOOP] * (first - len(placed)) if settings.delay else []
        last |= {segment.job: (segment.step, len(placed)) for segment in microbatch.segments}
        placed.append(microbatch)
    return tuple(placed)
