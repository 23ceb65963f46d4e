"""Predicts what a plan achieves, by replaying it with a cost model: slots, fill, padding, bubble, seconds, tokens in flight.

All replicas run the same slots, each with its own samples. A slot's time is that of the slowest replica.
A "run" here is one stream that starts with an empty pipeline: all jobs together are one run, jobs
trained one after another are several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

from megatron_lora.config.resolved import ResolvedConfig
from scheduling.cost import CostModel, pass_features
from scheduling.data_parallel import Dealt
from scheduling.memory import tokens_in_flight
from scheduling.policies import Runs
from scheduling.simulate import Timeline, simulate_runs
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch, Segment, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained, and on which pipeline."""

    config: ResolvedConfig
    dealt: Dealt  # all jobs' samples, dealt to the replicas; the planner sees their rounds
    cost: CostModel  # times the replay
    weights: SlotCost  # what the planner and the dealing minimise

    def parts(self, slot: Microbatch) -> list[tuple[int, int, int]]:
        """Return (rows, sum of squared lengths, sum of rows x rank) of a slot on each replica."""
        parts = (self.dealt.part(slot, replica) for replica in range(self.config.parallel.data))
        samples = (
            [(tokens, self.config.jobs[s.job].lora_rank) for s in part.segments for tokens in self._tokens(s, s.samples)] for part in parts
        )
        return [pass_features(of_replica, self.config.parallel.row_multiple) for of_replica in samples]

    def tokens_of(self, slot: Microbatch) -> int:
        """Return a slot's tokens on all replicas together."""
        replicas = range(self.config.parallel.data)
        return sum(sum(self._tokens(s, self.dealt.jobs[s.job].samples_of(s, replica))) for s in slot.segments for replica in replicas)

    def _tokens(self, segment: Segment, samples: Iterable[int]) -> list[int]:
        batch = self.dealt.jobs[segment.job].lengths[segment.step]
        return [batch[sample] for sample in samples]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What runs achieve, in numbers."""

    tokens: int
    slots: int
    noops: int
    fill: float  # tokens / budget of all slots
    uneven: float  # 1 - mean / longest time of a slot
    padding: float  # share of rows without a token
    bubble: float  # share of time that stages are idle
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Runs replayed one after another."""

    runs: Runs
    workload: Workload
    stream: Stream
    timeline: Timeline

    @cached_property
    def figures(self) -> Figures:
        """The figures of all runs together."""
        w, timeline, parallel = self.workload, self.timeline, self.workload.config.parallel
        busy = [slot for slot in self.stream if not slot.is_noop]
        parts = [w.parts(slot) for slot in busy]
        times = [max(max(stage.seconds(*part) for part in of_slot) for stage in w.cost.stages) for of_slot in parts]
        tokens, rows = sum(map(w.tokens_of, busy)), sum(part[0] for of_slot in parts for part in of_slot)
        return Figures(
            tokens=tokens,
            slots=len(self.stream),
            noops=len(self.stream) - len(busy),
            fill=tokens / (len(self.stream) * w.config.microbatch_tokens * parallel.data),
            uneven=1 - sum(times) / len(times) / max(times),
            padding=1 - tokens / rows,
            bubble=sum(map(timeline.bubble, range(parallel.pipeline))) / parallel.pipeline,
            seconds=timeline.makespan_s,
        )

    def of_job(self, job: int) -> Figures:
        """Return the figures of the runs that train only this job."""
        return forecast(tuple(run for run in self.runs if {s.job for slot in run for s in slot.segments} == {job}), self.workload).figures

    def shares(self) -> list[float]:
        """Return each job's share of the compute time, which sum to 1; a slot's time is divided among its jobs by their tokens."""
        work = [0.0] * len(self.workload.dealt.jobs)
        for slot in self.stream:
            seconds = sum(stage.seconds(*part) for part in self.workload.parts(slot) for stage in self.workload.cost.stages)
            for segment in slot.segments:
                work[segment.job] += seconds * segment.num_tokens / slot.num_tokens
        return [part / sum(work) for part in work]

    def tokens_in_flight(self, stage: int) -> int:
        """Return the most tokens in flight on a stage at any time; an upper bound for each replica."""
        return max(tokens_in_flight(run, stage, self.workload.config.parallel.pipeline) for run in self.runs)

    @property
    def largest_slot(self) -> int:
        """Tokens of the largest microbatch."""
        return max(slot.num_tokens for slot in self.stream)


def forecast(runs: Runs, workload: Workload, hop_s: float = 0.0, step_s: float = 0.0) -> Forecast:
    """Replay runs with the workload's cost model; `hop_s` (between stages) and `step_s` (optimizer step) are as in simulate()."""
    timed = [(run, *workload.cost.pass_times([workload.parts(slot) for slot in run])) for run in runs]
    stream, timeline = simulate_runs(timed, workload.config.parallel.norm_delay if len(runs) == 1 else 0, hop_s, step_s)
    return Forecast(runs, workload, stream, timeline)
