"""From a stream to what each stage executes: non-interleaved 1F1B without flush.

Training slots and no-ops have a backward, and are counted by their index among themselves. On stage s of P, with w = P - s - 1
warm-up forwards, the slot at index i triggers, in this order:

    STEP(job)  for each (job, step) that ended at index i - P - delay, followed by MOVE(job) where the job's rows move after it
    F(i)
    B(i - w)   when there is such an index; after the last slot the remaining w backwards follow

so that STEP comes directly before the same forward on every stage. Stage 0 finishes B(m) just before F(m + P). With a gap of P + delay
between the last microbatch of a step and the first of the next, every stage has the verdict before it needs it: the message of
F(m + P + delay) carries it forward. A no-op keeps its F and B, as messages without computation.

An evaluation slot triggers EVAL alone: a forward message, no gradient message. So it costs its neighbours no round trip. What it
evaluates are the weights at its place between the STEPs. Its sums ride on gradient messages like a step's: an evaluation is listed as
an ending at the next index after its last slot.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduling.follow import Window
from scheduling.rolling import RollingStream
from scheduling.types import NOOP, Action, Ending, Op, PlanError, Stream


def endings(stream: Stream) -> tuple[tuple[Ending, ...], ...]:
    """List, per slot of a complete stream, the steps whose last microbatch it is, in segment order, then the evaluations that have ended
    since the slot before that has a backward.

    Raises PlanError where no such slot follows an evaluation (see with_drain).
    """
    last: dict[Ending, int] = {}
    for slot, microbatch in enumerate(stream):
        last.update((Ending(segment.job, segment.step, microbatch.evaluate), slot) for segment in microbatch.segments)
    listed, evaluated = [], []
    for slot, microbatch in enumerate(stream):
        ends = [Ending(segment.job, segment.step, microbatch.evaluate) for segment in microbatch.segments]
        ends = [ending for ending in ends if last[ending] == slot]
        if microbatch.evaluate:
            evaluated += ends
            listed.append(())
        else:
            listed.append((*ends, *evaluated))
            evaluated = []
    if evaluated:
        raise PlanError(f"the stream ends with an evaluation of job {evaluated[0].job}: append no-op slots to report it")
    return tuple(listed)


def with_drain(stream: Stream, num_stages: int, delay: int = 0) -> Stream:
    """Strip trailing no-ops and append num_stages + delay of them, so that the last verdicts and evaluations are delivered."""
    end = len(stream)
    while end and stream[end - 1].is_noop:
        end -= 1
    return tuple(stream[:end]) + (NOOP,) * (num_stages + delay if end else 0)


def stage_actions(
    stream: Stream, stage: int, num_stages: int, delay: int = 0, moves: Collection[tuple[int, int]] = ()
) -> tuple[Action, ...]:
    """Return everything that one stage executes for a complete drained stream, in order; rows move after the (job, step) in `moves`.

    Raises PlanError when the stream ends before the last steps can be taken (see with_drain).
    """
    ended = endings(stream)
    by_index = [ends for microbatch, ends in zip(stream, ended, strict=True) if not microbatch.evaluate]
    late = [ending for ends in by_index[max(0, len(by_index) - num_stages - delay) :] for ending in ends if not ending.evaluation]
    if late:
        raise PlanError(f"the stream ends before job {late[0].job} can take step {late[0].step}: append {num_stages + delay} no-op slots")
    rolling = RollingStream()
    slots = rolling.append(Window(stream, ended, frozenset(moves)))
    actions = window_actions(rolling, stage, num_stages, delay, slots.start, slots.stop)
    return actions + final_backwards(rolling, stage, num_stages)


def final_backwards(rolling: RollingStream, stage: int, num_stages: int) -> tuple[Action, ...]:
    """Return the backwards that remain on one stage after the last forward of a stream."""
    warmup, end = num_stages - stage - 1, rolling.num_indices
    return tuple(Action(Op.BACKWARD, rolling.slot_at(index)) for index in range(max(0, end - warmup), end))


def window_actions(rolling: RollingStream, stage: int, num_stages: int, delay: int, first: int, end: int) -> tuple[Action, ...]:
    """Return the actions that slots first .. end - 1 trigger on one stage; of those before `first`, the last num_stages + delay that
    have a backward are read.

    Concatenated over consecutive windows, plus final_backwards, they are stage_actions of the complete stream.
    """
    warmup, gap = num_stages - stage - 1, num_stages + delay
    actions: list[Action] = []
    for slot in range(first, end):
        index = rolling.index_of(slot)
        if index is None:
            actions.append(Action(Op.EVAL, slot))
            continue
        for job, step, evaluation in rolling.ended_at(index - gap):
            if not evaluation:
                actions.append(Action(Op.STEP, job))
                if rolling.moves_after(job, step):
                    actions.append(Action(Op.MOVE, job))
        actions.append(Action(Op.FORWARD, slot))
        if index >= warmup:
            actions.append(Action(Op.BACKWARD, rolling.slot_at(index - warmup)))
    return tuple(actions)
