"""A job of a run as the first rank's control knows it: in the queue, resident, on its way out, or paused (control.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
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
    departed: bool = False  # everything of it is planned
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


def furthest_past_its_share(entries: Iterable[Entry], limit_s: float | None, changed: Collection[str]) -> tuple[Entry, Entry] | None:
    """Return who makes room for a job that has waited for `limit_s`, and that job: the resident that has used most for its priority."""
    entries, now = list(entries), time.monotonic()
    if limit_s is None or any(entry.leaving == "queued" for entry in entries):
        return None
    late = [entry for entry in entries if entry.can_join and now - entry.since_s > limit_s]
    residents = [entry for entry in entries if entry.resident and entry.leaving is None and entry.name not in changed]
    rested = [entry for entry in residents if late and now - entry.since_s > limit_s]
    if not rested:
        return None
    furthest = max(rested, key=lambda entry: (entry.used / entry.config.priority, -entry.number))
    return furthest, min(late, key=lambda entry: entry.since)
