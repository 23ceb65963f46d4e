"""The nouns of a plan: segments, microbatches, streams, actions.

A *stream* is the ordered tuple of microbatches of a run, one per pipeline slot; a microbatch without segments is a *no-op* slot.
A job's *step* is both the number of its optimizer step and the weight version that its forwards and backwards must meet.
The *index* of a training slot or a no-op is its place among the slots that have a backward; an evaluation slot has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

MAX_ENDINGS = 32  # steps and evaluations that may end in one slot, by default: what its messages have room for
VALIDATION = -1  # in a reference slot: the step of samples of the validation set; in a mismatched slot VALIDATION - steps taken
Lengths = Sequence[Sequence[Sequence[int]]]  # [job][step][sample] -> tokens


class PlanError(ValueError):
    """A plan that breaks a rule, or a workload that no plan can serve. The message names the slot, job and step."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The contiguous rows of one job, at one step, inside a microbatch.

    `samples` are indices within that step's global batch; `num_tokens` is the sum of their lengths.
    """

    job: int
    step: int
    samples: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One pipeline slot: at most one segment per job; without segments a no-op.

    With `evaluate`, the slot is forward-only: its samples index the job's validation set and `step` is the number of steps that its
    weights have taken. With `reference` too, the frozen reference of these samples is computed: `step` is the one whose global batch
    they belong to, or VALIDATION. With `mismatched`, each sample is a prompt of a batch with the completion of another of it, under the
    policy, or with `reference` under the reference: `step` is the batch's, or VALIDATION - the steps that evaluated weights have taken.
    """

    segments: tuple[Segment, ...] = ()
    evaluate: bool = False
    reference: bool = False
    mismatched: bool = False

    def of_validation(self, segment: Segment) -> bool:
        """Whether a segment's samples are those of the job's validation set."""
        return segment.step < 0 if self.reference or self.mismatched else self.evaluate

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def is_noop(self) -> bool:
        """Whether the slot carries no samples."""
        return not self.segments


NOOP = Microbatch()
Stream = tuple[Microbatch, ...]


class Ending(NamedTuple):
    """A step that is complete with the backward of a slot, or an evaluation whose sums ride on its gradient message.

    Of an evaluation, `step` is the number of steps that its weights have taken.
    """

    job: int
    step: int
    evaluation: bool = False


class Op(Enum):
    """The kinds of action of a stage."""

    FORWARD = "F"
    BACKWARD = "B"
    STEP = "S"
    EVAL = "E"
    MOVE = "M"


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction of a stage: `index` is the slot for FORWARD, BACKWARD and EVAL, the job for STEP and MOVE."""

    op: Op
    index: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.index}"
