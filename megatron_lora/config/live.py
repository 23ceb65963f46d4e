"""What the command line says of a run beside its config: whether it waits for jobs, repeats another run, or is started again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lora.config.rules import number, whole_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """How a run begins and ends, beyond its config.

    `keep_alive`: without jobs to train it waits for others, and ends by a stop request alone. `replay`:
    the directory of a run whose events alone decide what changes, and when. `from_older`: jobs whose newest
    checkpoint is damaged resume from the newest whole one. After a crash a run is started again, up to
    `max_restarts` times within `restart_window_s`. `memory_share`: of the memory that is there, what
    choices left `auto` may count on.
    """

    keep_alive: bool = False
    replay: Path | None = None
    from_older: bool = False
    max_restarts: int = 0
    restart_window_s: float = 3600.0
    memory_share: float = 1.0

    def __post_init__(self):
        whole_number("a number of restarts", 0)("--max-restarts", self.max_restarts)
        number("a time in seconds", 0, above=True)("--restart-window-s", self.restart_window_s)
        number("a share of the memory", 0, 1, above=True)("--memory-share", self.memory_share)

    def words(self) -> list[str]:
        """Return the options of a rank as words of a command line."""
        words = [flag for flag, is_set in (("--keep-alive", self.keep_alive), ("--from-older", self.from_older)) if is_set]
        words += ["--replay", str(self.replay)] if self.replay else []
        return words + (["--memory-share", repr(self.memory_share)] if self.memory_share != 1.0 else [])
