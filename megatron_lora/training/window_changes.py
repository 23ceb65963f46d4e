"""What changes where a window of the plan begins: plain data that the first rank sends to all ranks with the window.

On every rank, in this order, between the last action of one window and the first of the next:

    freed     rows of jobs whose last STEP and evaluation are done are given back
    joined    jobs take the rows that the first rank has chosen for them
    continued points of a sweep that rest at a rung, with their rows, are planned further
    left      jobs learn after which step they leave, and whether a checkpoint is written then
    set       keys of jobs that decide no update get other values

`moves` belong to steps inside the window: rows move directly after them, to other places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_lora.config.schema import JobConfig
from megatron_lora.output.standing import ResumePoint
from scheduling.types import Stream

Places = Mapping[str, Sequence[int]]  # module -> first rank rows (planning/adapter_rows.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """A job that becomes resident: where its adapter lies, and from where it resumes."""

    number: int
    config: JobConfig
    point: ResumePoint
    places: Places
    rungs: int = 0  # that it has passed, of a point of a sweep, which leaves at the next one


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuing:
    """A point that rests at its rung after `step` steps continues; it has passed `rungs` of them."""

    number: int
    step: int
    rungs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A job leaves after `step` steps; its state then, "paused" or "queued" with a checkpoint, or one that needs none."""

    step: int
    state: str

    @property
    def saves(self) -> bool:
        """Whether the job is to resume from where it leaves."""
        return self.state in ("paused", "queued")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowChanges:
    """All changes of a window, by the jobs' numbers."""

    freed: Sequence[int] = ()
    joined: Sequence[Joining] = ()
    continued: Sequence[Continuing] = ()
    left: Mapping[int, Leaving] = field(default_factory=dict)
    configs: Mapping[int, JobConfig] = field(default_factory=dict)  # of jobs of which keys were set
    moves: Mapping[tuple[int, int], Places] = field(default_factory=dict)  # (job, step) -> where it moves

    def as_used_by(self, stream: Stream) -> WindowChanges:
        """Return them with the jobs that join in the order in which `stream`, the window's slots, needs them."""
        first = {segment.job: -behind for behind, slot in enumerate(reversed(stream)) for segment in slot.segments}
        return replace(self, joined=tuple(sorted(self.joined, key=lambda joining: first.get(joining.number, 1))))
