"""Replay 1F1B in time: the start and end of every action, from a cost per stage and slot and a time per hop between stages.

This is the slow, obvious twin of timing.py (which knows equal stages and no hops) and the source of predictions: makespan, bubbles,
progress of every job, and a timeline in Chrome trace format (opens in Perfetto).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduling.pipeline import endings, stage_actions, with_drain
from scheduling.types import Microbatch, Op, Stream

Times = Sequence[Sequence[float]]  # [stage][slot] -> seconds


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one stage in time; `index` is the slot, for a STEP the job."""

    stage: int
    op: Op
    index: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class StepSpan:
    """One optimizer step of one job: from its first forward on stage 0 to its STEP there."""

    job: int
    step: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated run: events in the order of each stage, stage after stage."""

    num_stages: int
    makespan_s: float
    events: tuple[Event, ...]
    steps: tuple[StepSpan, ...]

    def busy_s(self, stage: int) -> float:
        """Return the seconds that a stage computes."""
        return sum(event.end_s - event.start_s for event in self.events if event.stage == stage)

    def bubble(self, stage: int) -> float:
        """Return the share of the makespan in which a stage waits."""
        return 1 - self.busy_s(stage) / self.makespan_s if self.makespan_s else 0.0


def simulate(
    stream: Stream,
    num_stages: int,
    forward: Times | Sequence[float],
    backward: Times | Sequence[float] | None = None,
    hop_s: float = 0.0,
    step_s: float = 0.0,
    delay: int = 0,
) -> Timeline:
    """Run a stream through 1F1B with [stage][slot] (or, equal on all stages, [slot]) times of forward and backward.

    `backward` defaults to `forward`; `hop_s` passes between the end of an action and its arrival at the next stage; `step_s` is an
    optimizer step. Drain slots are added and cost nothing.
    """
    drained = with_drain(stream, num_stages, delay)
    forward = _per_stage(forward, num_stages)
    backward = forward if backward is None else _per_stage(backward, num_stages)
    actions = [stage_actions(drained, stage, num_stages, delay) for stage in range(num_stages)]
    done: dict[tuple[Op, int, int], float] = {}
    events: list[list[Event]] = [[] for _ in range(num_stages)]
    clock, position = [0.0] * num_stages, [0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage in range(num_stages):
            while position[stage] < len(actions[stage]):
                action = actions[stage][position[stage]]
                arrival = 0.0 if action.op is Op.STEP else _arrival(done, action.op, stage, action.index, num_stages, hop_s)
                if arrival is None:
                    break
                start = max(clock[stage], arrival)
                clock[stage] = start + (step_s if action.op is Op.STEP else _duration(drained, forward, backward, action, stage))
                if action.op is not Op.STEP:
                    done[Op.BACKWARD if action.op is Op.BACKWARD else Op.FORWARD, stage, action.index] = clock[stage]
                events[stage].append(Event(stage, action.op, action.index, start, clock[stage]))
                position[stage] += 1
                moved = True
    assert all(position[stage] == len(actions[stage]) for stage in range(num_stages)), "deadlock"
    makespan = max((event.end_s for listed in events for event in listed if event.end_s > event.start_s), default=0.0)
    return Timeline(num_stages, makespan, tuple(event for listed in events for event in listed), _steps(drained, events[0]))


def _per_stage(times: Times | Sequence[float], num_stages: int) -> Times:
    return times if len(times) and isinstance(times[0], Sequence) else [times] * num_stages  # type: ignore[return-value]


def _arrival(done: dict[tuple[Op, int, int], float], op: Op, stage: int, slot: int, num_stages: int, hop_s: float) -> float | None:
    """Return when the input of an action arrives, None while that is unknown."""
    if op is Op.BACKWARD:
        key, hop = ((op, stage + 1, slot), hop_s) if stage + 1 < num_stages else ((Op.FORWARD, stage, slot), 0.0)
    elif stage:
        key, hop = (Op.FORWARD, stage - 1, slot), hop_s
    else:
        return 0.0
    return done[key] + hop if key in done else None


def _duration(stream: Stream, forward: Times, backward: Times, action, stage: int) -> float:
    slot = action.index
    if stream[slot].is_noop or (stream[slot].evaluate and action.op is Op.BACKWARD):
        return 0.0
    return (backward if action.op is Op.BACKWARD else forward)[stage][slot]


def _steps(stream: Stream, events: Sequence[Event]) -> tuple[StepSpan, ...]:
    """Match the STEPs of stage 0, which come in the order of the stream's endings, with the first forwards of their samples."""
    started: dict[tuple[int, int], float] = {}
    for event in events:
        if event.op is Op.FORWARD:
            for segment in stream[event.index].segments:
                started.setdefault((segment.job, segment.step), event.start_s)
    ended = [ending for slot_endings in endings(stream) for ending in slot_endings]
    taken = [event for event in events if event.op is Op.STEP]
    return tuple(StepSpan(job, step, started[job, step], event.end_s) for (job, step), event in zip(ended, taken, strict=True))


def simulate_runs(
    runs: Sequence[tuple], num_stages: int, delay: int = 0, hop_s: float = 0.0, step_s: float = 0.0
) -> tuple[Stream, Timeline]:
    """Run streams one after another with a flush between; returns them as one stream and timeline.

    Each run is (stream, forward) or (stream, forward, backward), times, delay, hop and step as for simulate().
    """
    joined: list[Microbatch] = []
    events: list[Event] = []
    steps: list[StepSpan] = []
    clock = 0.0
    for stream, *times in runs:
        timeline = simulate(stream, num_stages, *times, delay=delay, hop_s=hop_s, step_s=step_s)
        for event in timeline.events:
            index = event.index if event.op is Op.STEP else event.index + len(joined)
            if event.op is Op.STEP or event.index < len(stream):
                events.append(Event(event.stage, event.op, index, event.start_s + clock, event.end_s + clock))
        steps += [StepSpan(span.job, span.step, span.start_s + clock, span.end_s + clock) for span in timeline.steps]
        joined += stream
        clock += timeline.makespan_s
    return tuple(joined), Timeline(num_stages, clock, tuple(events), tuple(steps))
