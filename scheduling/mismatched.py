"""Mismatched slots: in front of a batch, the divergence of its policy from the reference is estimated on prompts with others' completions.

An objective may need a number that depends on a job's weights at a step, over its whole global batch, before any sample of the batch is
trained. Its samples are planned as forward-only slots, first under the policy and then under the reference, directly before the first
slot that trains the step, or that evaluates these weights. The STEP before must be taken by then: it stands in front of the slot whose
index is the gap after the step's end, so such a job's next step begins one index later than others' (windows.py).

    due = {0: dealt.mismatched}                                       # [job] -> its mismatched samples, as rounds
    found = insert_mismatched(slots, evaluate, due, opened={(0, 3)}, capacity=4096)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from scheduling.data_parallel import DealtJob
from scheduling.references import OpenSlot, Slot, Wanted, insert, put_in_front
from scheduling.types import VALIDATION


class Inserted(NamedTuple):
    """A window's slots, and the places that its slots had before have now; those of mismatched slots, and of these under a reference."""

    slots: list[Slot]
    moved: list[int]
    mismatched: list[int]
    reference: list[int]


def lengths_of(mismatched: DealtJob, batch: int) -> list[int]:
    """Return the tokens of a batch's mismatched rounds; below 0 the batch is the validation set."""
    return list(mismatched.validation_rounds) if batch < 0 else mismatched.rounds[batch]


def insert_mismatched(
    slots: Sequence[Slot], evaluate: Collection[int], due: Mapping[int, DealtJob], opened: Collection[tuple[int, int]], capacity: int
) -> Inserted:
    """Put the mismatched slots into a window; `opened`: (job, batch) of which slots stand in earlier windows."""
    filled: list[tuple[bool, OpenSlot]] = []  # whether under the reference
    begun = set(opened)
    for place, slot in enumerate(slots):
        batches = dict.fromkeys((job, VALIDATION - step if place in evaluate else step) for job, step, _, _ in slot if job in due)
        for reference in (False, True):
            first = len(filled)
            for job, batch in (each for each in batches if each not in begun):
                for sample, tokens in enumerate(lengths_of(due[job], batch)):
                    if len(filled) == first or not filled[-1][1].fits(job, batch, tokens, capacity):
                        filled.append((reference, OpenSlot(place)))
                    filled[-1][1].add(job, batch, sample, tokens)
        begun.update(batches)
    merged, moved, places = put_in_front(slots, [held for _, held in filled])
    return Inserted(merged, moved, places, [place for place, (reference, _) in zip(places, filled, strict=True) if reference])


def with_needed(
    window: Mapping[str, Any],
    wanted: Mapping[int, Wanted],
    due: Mapping[int, DealtJob | None],
    opened: Collection[tuple[int, int]],
    capacity: int,
) -> dict[str, Any]:
    """Return a planned window's slots with those that training and evaluations need in front of them, and which are of what kind."""
    held = {job: mismatched for job, mismatched in due.items() if mismatched is not None}
    first = insert_mismatched(window["microbatches"], window["evaluate"], held, opened, capacity)
    evaluated = [first.moved[place] for place in window["evaluate"]]
    slots, moved, reference = insert(first.slots, evaluated, wanted, capacity, skipped=first.mismatched)
    mismatched = [moved[place] for place in first.mismatched]
    reference += [moved[place] for place in first.reference]
    forward_only = sorted({*mismatched, *reference, *(moved[place] for place in evaluated)})
    return {"microbatches": slots, "evaluate": forward_only, "reference": sorted(reference), "mismatched": mismatched}
