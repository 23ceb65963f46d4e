"""One planned run on the trainer's own parts: plan feed or baseline policy, executor, messages, optimizers, timeline.

Baselines come from scheduling.policies as runs with a flush between; here they are one stream with as many no-op slots between two runs
as drain the pipeline, so that every policy goes through the same executor. Returns what was executed and what the clock and the
devices say about it.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from e2e_base import Base
from spans import align
from torch import Tensor

from megatron_lora.config.schema import RunConfig
from megatron_lora.output.timeline import Timeline
from megatron_lora.planning.plan_feed import PlanFeed, PlanSettings
from megatron_lora.training.assemble import make_executor
from megatron_lora.training.executor import StageOptimizer, StepDone
from megatron_lora.training.jobs import TrainingJob
from scheduling.data_parallel import Dealt, deal
from scheduling.follow import Follower, Window
from scheduling.pipeline import with_drain
from scheduling.plan_json import stream_from_json
from scheduling.policies import POLICIES
from scheduling.slot_cost import SlotCost
from scheduling.types import NOOP, Lengths, Microbatch, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished run: `stream` as planned for all replicas, `own` as this rank executed it, events of all ranks on one clock."""

    stream: Stream
    own: Stream
    seconds: float
    events: tuple[list[dict], ...]
    losses: tuple[tuple[int, int, float], ...]  # (job, step, loss) in the order taken; on the first rank
    norms: tuple[float, ...]


class NoOptimizer:
    """Takes the place of a job's optimizer where there are no adapters."""

    def __init__(self, device: torch.device, data: dist.ProcessGroup | None):
        """`data`: the replicas whose losses are summed, if there are several."""
        self.zero = torch.zeros((), device=device)
        self.loss, self.data = self.zero, data

    def start_reduction(self, loss: Tensor) -> None:
        """Sum the loss over replicas."""
        if self.data is not None:
            dist.all_reduce(loss, group=self.data)
        self.loss = loss

    def finish_reduction(self) -> tuple[Tensor, Tensor]:
        """Return a norm of zero and the loss."""
        return self.zero, self.loss

    def step(self, step: int, square_norm: Tensor) -> None:
        """Do nothing."""


def execute(
    base: Base,
    jobs: Sequence[TrainingJob],
    optimizers: Sequence[StageOptimizer],
    policy: str,
    settings: PlanSettings,
    real: SlotCost,
    around: AbstractContextManager | None = None,
) -> Outcome:
    """Train the jobs through all their steps, `around` them a profiler perhaps.

    `settings.cost` weighs slots for our planner, `real` for the baselines.
    """
    lengths = [job.step_samples.lengths() for job in jobs]
    done: list[StepDone] = []
    own: list[Microbatch] = []
    with tempfile.TemporaryDirectory() as folder:
        if policy == "ours":
            feed = PlanFeed(lengths, settings, base.replica, Path(folder), base.plans)
            windows = _begun(iter(feed))
        else:
            stream = base.share(joined(policy, lengths, settings, real) if base.rank == 0 else None)
            windows = iter([whole_window(stream, deal(lengths, settings.num_replicas, settings.cost), settings, base.replica)])
        timeline = Timeline(base.device)
        links, layout = base.connected()
        executor = make_executor(
            base.stage,
            base.parallel,
            links,
            layout,
            step_samples=[job.step_samples for job in jobs],
            optimizers=optimizers,
            on_step=done.append,
            on_forward=own.append,
            timeline=timeline,
        )
        base.wait()
        start = time.time()
        with timeline.span("begin", 0):
            pass
        with around or nullcontext():
            executor.run(windows)
        base.wait()
        end = time.time()
        with timeline.span("end", 0):
            pass
        if policy == "ours":
            feed.close()
            stream = _filed(Path(folder)) if base.rank == 0 else ()
    events = base.gather(align(timeline.events(base.rank, base.position.stage), start, end))
    numbers = torch.stack([torch.stack([each.square_norm, each.loss]) for each in done]).tolist() if done else []
    return Outcome(
        stream=base.share(stream),
        own=tuple(own),
        seconds=max(base.gather(end - start)),
        events=tuple(events),
        losses=tuple((each.job, each.step, loss) for each, (_, loss) in zip(done, numbers, strict=True)),
        norms=tuple(square**0.5 for square, _ in numbers),
    )


def _begun(windows: Iterator[Window]) -> Iterator[Window]:
    """Wait for the first window, as a run does while its model is built."""
    first = next(windows)
    return itertools.chain([first], windows)


def whole_window(stream: Stream, dealt: Dealt, settings: PlanSettings, replica: int) -> Window:
    """Return a stream of rounds, which ends with the slots that drain it, as one window of a replica; PlanError where it breaks a rule."""
    follower = Follower(dealt.rounds, settings.num_stages, settings.capacity, settings.delay)
    ended = follower.follow(stream)
    follower.finish()
    return Window(tuple(dealt.part(microbatch, replica) for microbatch in stream), ended)


def plan_settings(config: RunConfig, weights: SlotCost) -> PlanSettings:
    """Return what the plan of a resolved config depends on; our planner weighs slots with `weights`."""
    parallel = config.parallel
    return PlanSettings(
        num_stages=parallel.pipeline,
        num_replicas=parallel.data,
        capacity=int(config.microbatch_tokens),
        delay=int(parallel.tensor * parallel.data > 1),
        cost=weights,
    )


def joined(policy: str, lengths: Lengths, settings: PlanSettings, real: SlotCost) -> Stream:
    """Plan by a baseline, which weighs slots with `real`, and join its runs into one stream."""
    rounds = deal(lengths, settings.num_replicas, settings.cost).rounds
    runs = POLICIES[policy](rounds, settings.num_stages, settings.capacity, real)
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


def _filed(plan_dir: Path) -> Stream:
    """Read the windows that the feed has written, all replicas' rounds, and drain them."""
    slots = [slot for file in sorted(plan_dir.glob("window-*.json")) for slot in json.loads(file.read_text())["microbatches"]]
    return stream_from_json(slots)
