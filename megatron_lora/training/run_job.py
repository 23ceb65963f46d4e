"""A job of a run as the first rank's control knows it: in the queue, resident, on its way out, or paused (control.py).

A point of a sweep that has come to a rung either leaves, with a checkpoint, or rests there: it keeps its rows, and all of it is planned
up to there. Once it is promoted it is planned further, without a checkpoint written or read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_lora.config.schema import JobConfig
from megatron_lora.errors import UserError
from megatron_lora.output.events import utc_now


@dataclass(slots=True, kw_only=True)
class Entry:
    """A job of the run that is not over, as the first rank knows it."""

    number: int
    config: JobConfig
    state: str = "queued"  # queued | running | paused
    since: str = field(default_factory=utc_now)  # in the queue
    since_s: float = field(default_factory=time.monotonic)  # in the queue, or resident
    is_read: bool = False
    fits: bool = False  # whether that has been checked
    passed: int = 0  # later jobs that have joined because this one did not fit
    resident: bool = False
    leaving: str | None = None  # the state in which it leaves; None while it stays
    departed: bool = False  # everything of it is planned, of one that rests up to its rung
    drained: bool = False  # ... and nothing of it is in flight
    exported: bool = False  # its adapter at the rung where it rests is written
    last_index: int | None = None  # of its slots so far
    saved: bool = True  # False from its leaving on until the checkpoint that it resumes from is written
    left_after: int = 0  # steps taken when it left last
    at_rung: bool = False  # of its sweep, where it waits for a decision (sweeps.py)
    used: float = 0.0  # predicted time in this residence

    @property
    def name(self) -> str:
        """The job's name."""
        return self.config.name

    @property
    def rests(self) -> bool:
        """Whether the job keeps its rows at a rung."""
        return self.resident and self.departed and self.at_rung and self.leaving is None

    @property
    def waits_for(self) -> str:
        """What keeps the job in the queue, in words."""
        if self.at_rung:
            return "waits at a rung of its sweep"
        return "waits for rows" if self.is_read and self.saved else "is read"

    @property
    def can_join(self) -> bool:
        """Whether the job could join if there were rows."""
        return self.waits and self.is_read and self.saved and self.fits

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue, and may join."""
        return self.state == "queued" and not self.resident and not self.at_rung

    @property
    def held(self) -> bool:
        """Whether the job is in the queue, and may join once its sweep promotes it."""
        return self.state == "queued" and not self.resident and self.at_rung


class RunFiles(Protocol):
    """What the control has written of the run."""

    def add_jobs(self, jobs: Sequence[JobConfig]) -> None: ...

    def set_state(self, name: str, state: str, reason: str) -> None: ...


def misfits(entries: Iterable[Entry], check_fits: Callable[[JobConfig], None]) -> list[tuple[str, str, str]]:
    """Return the jobs of the queue that could never have rows, as failed and with the reasons."""
    found = []
    for entry in entries:
        if entry.waits and not entry.fits:
            try:
                check_fits(entry.config)
                entry.fits = True
            except UserError as error:
                found.append(("failed", entry.name, str(error)))
    return found
