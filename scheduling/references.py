"""Reference slots: the frozen reference of a preference job's samples is computed by forward-only slots of the stream, once per sample.

A sample's reference has to be known where its loss is formed: on the last stage of the replica that trains or evaluates it. There the
slots run in the order of the stream, so it is enough that a sample's reference slot comes before the first other slot that has it:
no gap, and no phase in front of training. Slots are filled in the order in which a window needs their samples, up to the budget; each
stands directly before the first slot that needs one of them. Whose reference is wanted is known when a job joins: a step's samples that no
earlier step has had, and the validation set.

    wanted = {0: {3: {0, 1, 2}, VALIDATION: {0}}}            # [job][step] -> samples
    slots, moved, reference = insert(slots, evaluate, wanted, capacity)

`mismatched.py` puts slots in front of others in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from scheduling.types import VALIDATION

Wanted = dict[int, set[int]]  # of a job: step, or VALIDATION -> the samples whose reference is not planned yet
Slot = Sequence[Sequence[int]]  # [job, step, sample, tokens] of each sample


@dataclass(slots=True)
class OpenSlot:
    """A forward-only slot that is being filled; it stands before slot `before`."""

    before: int
    entries: list[list[int]] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)  # job -> the step of its samples here: a slot has one segment of a job
    num_tokens: int = 0

    def fits(self, job: int, step: int, tokens: int, capacity: int) -> bool:
        """Whether a sample has room."""
        return self.num_tokens + tokens <= capacity and self.steps.get(job, step) == step

    def add(self, job: int, step: int, sample: int, tokens: int) -> None:
        """Add a sample."""
        self.entries.append([job, step, sample, tokens])
        self.steps[job] = step
        self.num_tokens += tokens


def insert(
    slots: Sequence[Slot], evaluate: Collection[int], wanted: Mapping[int, Wanted], capacity: int, skipped: Collection[int] = ()
) -> tuple[list[Slot], list[int], list[int]]:
    """Return a window's slots with the reference slots that they need, the places that they have then, and those of the reference slots.

    `evaluate` are the places of evaluation slots, `skipped` of those that need no reference.
    """
    filled: list[OpenSlot] = []
    planned: set[tuple[int, int, int]] = set()
    for place, slot in ((place, slot) for place, slot in enumerate(slots) if place not in skipped):
        for job, of_step, sample, tokens in slot:
            step = VALIDATION if place in evaluate else of_step
            if (job, step, sample) in planned or sample not in wanted.get(job, {}).get(step, ()):
                continue
            if not filled or not filled[-1].fits(job, step, tokens, capacity):
                filled.append(OpenSlot(place))
            filled[-1].add(job, step, sample, tokens)
            planned.add((job, step, sample))
    return put_in_front(slots, filled)


def put_in_front(slots: Sequence[Slot], filled: Sequence[OpenSlot]) -> tuple[list[Slot], list[int], list[int]]:
    """Return slots with others in front of some of them, in the order given; the places of the slots then, and those of the others."""
    merged: list[Slot] = []
    moved: list[int] = []
    places: list[int] = []
    for place, slot in enumerate(slots):
        for held in (each for each in filled if each.before == place):
            places.append(len(merged))
            merged.append(held.entries)
        moved.append(len(merged))
        merged.append(slot)
    return merged, moved, places
