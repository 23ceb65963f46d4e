"""What each job used of planned slots: tokens, slots and predicted device time.

    a job's time in a slot = time(slot) * time of its samples / time of all the slot's samples

so that the slot's fixed part, its segments' and its waste are divided likewise, and the jobs' times add up to the slots'. A training slot
takes its SlotCost twice, forward and backward, one without a backward once; planning.predict.window_time has the seconds of this unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduling.data_parallel import DealtJob
from scheduling.mismatched import lengths_of
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch, Stream


@dataclass(frozen=True, slots=True)
class Usage:
    """What one job used."""

    tokens: int = 0
    slots: int = 0
    time: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        """Add up what was used at two times."""
        return Usage(self.tokens + other.tokens, self.slots + other.slots, self.time + other.time)


def usage(
    stream: Stream,
    lengths: Lengths | Mapping[int, Sequence[Sequence[int]]],
    cost: SlotCost,
    validation: Mapping[int, Sequence[int]] | None = None,
    mismatched: Mapping[int, DealtJob] | None = None,
) -> dict[int, Usage]:
    """Return what each job of a stream used, by its number.

    `lengths` [job][step][sample] and `validation` [job][sample] are in tokens: those that were planned, or those of one replica with its
    part of the stream. `mismatched` samples are in rounds.
    """
    used: dict[int, Usage] = {}
    for slot in stream:
        for job, part in _of_slot(slot, lengths, cost, validation or {}, mismatched or {}).items():
            used[job] = used.get(job, Usage()) + part
    return used


def _of_slot(
    slot: Microbatch,
    lengths: Lengths | Mapping,
    cost: SlotCost,
    validation: Mapping[int, Sequence[int]],
    mismatched: Mapping[int, DealtJob],
) -> dict[int, Usage]:
    held: dict[int, list[int]] = {}
    for segment in slot.segments:
        if segment.samples:  # a replica may have none
            if slot.mismatched:
                batch = lengths_of(mismatched[segment.job], segment.step)
            else:
                batch = validation[segment.job] if slot.of_validation(segment) else lengths[segment.job][segment.step]
            held[segment.job] = [batch[sample] for sample in segment.samples]
    work = {job: math.fsum(map(cost.sample, tokens)) for job, tokens in held.items()}
    time = cost.slot([tokens for of_job in held.values() for tokens in of_job], len(held)) * (1 if slot.evaluate else 2)
    total = math.fsum(work.values())
    return {job: Usage(sum(tokens), 1, time * work[job] / total) for job, tokens in held.items()}
