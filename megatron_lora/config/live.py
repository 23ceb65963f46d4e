"""What the command line says of a run beside its config: whether it waits for jobs, and whether it repeats another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """How a run begins and ends, beyond its config.

    `keep_alive`: without jobs to train it waits for others, and ends by a stop request alone. `replay`:
    the directory of a run whose events alone decide what changes, and when. `from_older`: jobs whose newest
    checkpoint is damaged resume from the newest whole one.
    """

    keep_alive: bool = False
    replay: Path | None = None
    from_older: bool = False

    def words(self) -> list[str]:
        """Return the options as words of a command line."""
        return [
            *(["--from-older"] if self.from_older else []),
            *(["--keep-alive"] if self.keep_alive else []),
            *(["--replay", str(self.replay)] if self.replay else []),
        ]
