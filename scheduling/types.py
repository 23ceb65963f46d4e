"""The nouns of a plan: segments, microbatches, streams, actions.

A *stream* is the ordered tuple of microbatches of a run, one per pipeline slot; a microbatch without segments is a *no-op* slot.
A job's *step* is both the index of its optimizer step and the weight version that its forwards and backwards must meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

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

    With `evaluate`, the slot is forward-only: its samples index the job's validation batch and `step` is the weight version they meet.
    """

    segments: tuple[Segment, ...] = ()
    evaluate: bool = False

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


class Op(Enum):
    """The kinds of action of a stage."""

    FORWARD = "F"
    BACKWARD = "B"
    STEP = "S"
    EVAL = "E"


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction of a stage: `index` is the microbatch slot for FORWARD, BACKWARD and EVAL, the job for STEP."""

    op: Op
    index: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.index}"
