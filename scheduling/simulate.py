"""Replay 1F1B in time: the start and end of every action, from a cost per stage and slot and a time per hop between stages.

This is the slow, obvious twin of timing.py (which knows equal stages and no hops) and the source of predictions: makespan, bubbles,
and a timeline in Chrome trace format (opens in Perfetto).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduling.pipeline import stage_actions, with_drain
from scheduling.types import Action, Microbatch, Op, Stream

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
class Timeline:
    """A simulated run: events in the order of each stage, stage after stage."""

    num_stages: int
    makespan_s: float
    events: tuple[Event, ...]

    def bubble(self, stage: int) -> float:
        """Return the share of the makespan in which a stage waits."""
        busy_s = sum(event.end_s - event.start_s for event in self.events if event.stage == stage)
        return 1 - busy_s / self.makespan_s if self.makespan_s else 0.0


def simulate(stream: Stream, forward: Times, backward: Times, hop_s: float = 0.0, step_s: float = 0.0, delay: int = 0) -> Timeline:
    """Run a stream through 1F1B with these times of every stage's forwards and backwards.

    `hop_s` passes between the end of an action and its arrival at the next stage; `step_s` is an optimizer step. Drain slots are added
    and cost nothing.
    """
    num_stages, drained = len(forward), with_drain(stream, len(forward), delay)
    queues = [deque(stage_actions(drained, stage, num_stages, delay)) for stage in range(num_stages)]
    done: dict[tuple[bool, int, int], float] = {}  # (whether backward, stage, slot) -> when its pass ended
    events: list[list[Event]] = [[] for _ in queues]
    clock = [0.0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while queue and (arrival := _arrival(done, queue[0], stage, num_stages, hop_s)) is not None:
                action, start = queue.popleft(), max(clock[stage], arrival)
                if action.op is Op.STEP:
                    clock[stage] = start + step_s
                else:
                    is_backward = action.op is Op.BACKWARD
                    times = (backward if is_backward else forward)[stage]
                    clock[stage] = start + (0.0 if drained[action.index].is_noop else times[action.index])
                    done[is_backward, stage, action.index] = clock[stage]
                events[stage].append(Event(stage, action.op, action.index, start, clock[stage]))
                moved = True
    assert not any(queues), "deadlock"
    makespan = max((event.end_s for listed in events for event in listed if event.end_s > event.start_s), default=0.0)
    return Timeline(num_stages, makespan, tuple(event for listed in events for event in listed))


def _arrival(done: dict[tuple[bool, int, int], float], action: Action, stage: int, num_stages: int, hop_s: float) -> float | None:
    """Return when the input of an action arrives, None while that is unknown."""
    if action.op is Op.STEP or (action.op is not Op.BACKWARD and not stage):
        return 0.0
    if action.op is not Op.BACKWARD:
        key, hop = (False, stage - 1, action.index), hop_s
    else:
        key, hop = ((True, stage + 1, action.index), hop_s) if stage + 1 < num_stages else ((False, stage, action.index), 0.0)
    return done[key] + hop if key in done else None


def simulate_runs(
    runs: Sequence[tuple[Stream, Times, Times]], delay: int = 0, hop_s: float = 0.0, step_s: float = 0.0
) -> tuple[Stream, Timeline]:
    """Run streams one after another with a flush between; returns them as one stream and timeline.

    Each run is (stream, forward, backward); times, delay, hop and step are as for simulate().
    """
    joined: list[Microbatch] = []
    events: list[Event] = []
    clock = 0.0
    for stream, forward, backward in runs:
        timeline = simulate(stream, forward, backward, hop_s, step_s, delay)
        for event in timeline.events:
            if event.op is Op.STEP or event.index < len(stream):
                index = event.index + (0 if event.op is Op.STEP else len(joined))
                events.append(replace(event, index=index, start_s=event.start_s + clock, end_s=event.end_s + clock))
        joined += stream
        clock += timeline.makespan_s
    return tuple(joined), Timeline(len(runs[0][1]), clock, tuple(events))
