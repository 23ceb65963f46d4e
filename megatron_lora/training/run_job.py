"""A job of a run as the first rank's control knows it: in the queue, resident, on its way out, or paused (control.py)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from megatron_lora.config.schema import JobConfig
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
    used: float = 0.0  # predicted time in this residence

    @property
    def name(self) -> str:
        """The job's name."""
        return self.config.name

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue."""
        return self.state == "queued" and not self.resident
