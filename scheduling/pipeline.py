"""From a stream to what each stage executes: non-interleaved 1F1B without flush.

On stage s of P, with w = P - s - 1 warm-up forwards, slot i triggers, in this order:

    STEP(job)  for each (job, step) that ended at slot i - P - delay
    F(i)       (EVAL(i) for an evaluation slot)
    B(i - w)   when that slot exists; after the last slot the remaining w backwards follow

so that STEP comes directly before the same forward on every stage. Stage 0 finishes B(m) just before F(m + P). With a gap of P + delay
slots between the last microbatch of a step and the first of the next, every stage has the verdict before it needs it: the message of
F(m + P + delay) carries it forward. No-op and evaluation slots keep their B, as a message without computation: one message per slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from scheduling.types import NOOP, Action, Microbatch, Op, PlanError, Stream

Ending = tuple[int, int]  # (job, step)
Value = TypeVar("Value")
Slots = Sequence[Value] | Mapping[int, Value]  # by slot


def endings(stream: Stream) -> tuple[tuple[Ending, ...], ...]:
    """List, per slot, the (job, step) pairs whose last microbatch the slot is, in segment order."""
    last: dict[Ending, int] = {}
    for slot, microbatch in enumerate(stream):
        if not microbatch.evaluate:
            last.update(((segment.job, segment.step), slot) for segment in microbatch.segments)
    return tuple(
        tuple((s.job, s.step) for s in microbatch.segments if not microbatch.evaluate and last[s.job, s.step] == slot)
        for slot, microbatch in enumerate(stream)
    )


def with_drain(stream: Stream, num_stages: int, delay: int = 0) -> Stream:
    """Strip trailing no-ops and append num_stages + delay of them, so that the last verdicts are delivered."""
    end = len(stream)
    while end and stream[end - 1].is_noop:
        end -= 1
    return tuple(stream[:end]) + (NOOP,) * (num_stages + delay if end else 0)


def stage_actions(stream: Stream, stage: int, num_stages: int, delay: int = 0) -> tuple[Action, ...]:
    """Return everything that one stage executes for a complete drained stream, in order.

    Raises PlanError when the stream ends before the last steps can be taken (see with_drain).
    """
    num_slots = len(stream)
    late = [e for slot_endings in endings(stream)[max(0, num_slots - num_stages - delay) :] for e in slot_endings]
    if late:
        raise PlanError(f"the stream ends before job {late[0][0]} can take step {late[0][1]}: append {num_stages + delay} no-op slots")
    return window_actions(stream, endings(stream), stage, num_stages, delay, 0, num_slots) + final_backwards(num_slots, stage, num_stages)


def final_backwards(num_slots: int, stage: int, num_stages: int) -> tuple[Action, ...]:
    """Return the backwards that remain on one stage after the last forward of a stream."""
    warmup = min(num_stages - stage - 1, num_slots)
    return tuple(Action(Op.BACKWARD, slot) for slot in range(num_slots - warmup, num_slots))


def window_actions(
    stream: Slots[Microbatch], ended: Slots[Sequence[Ending]], stage: int, num_stages: int, delay: int, first: int, end: int
) -> tuple[Action, ...]:
    """Return the actions that slots first .. end - 1 trigger on one stage, read from the microbatch of each slot and the steps that end
    in it; of the slots before `first` the last num_stages + delay are read.

    Concatenated over consecutive windows, plus final_backwards, they are stage_actions of the complete stream.
    """
    warmup, gap = num_stages - stage - 1, num_stages + delay
    actions: list[Action] = []
    for slot in range(first, end):
        if slot >= gap:
            actions += [Action(Op.STEP, job) for job, _ in ended[slot - gap]]
        actions.append(Action(Op.EVAL if stream[slot].evaluate else Op.FORWARD, slot))
        if slot >= warmup:
            actions.append(Action(Op.BACKWARD, slot - warmup))
    return tuple(actions)
