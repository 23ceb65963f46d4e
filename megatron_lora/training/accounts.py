"""What each job has used, window by window, in accounting.json: a window's seconds are divided by the predicted time of its jobs.

accounts.plan(window, used)      # the feed's thread
accounts.begin()                 # the training thread, where a window begins
accounts.write()                 # the feed's thread: windows that have ended
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from megatron_lora.output.accounting_file import AccountingFile
from megatron_lora.planning.plan_feed import Used


class Accounts:
    """The accounts of one start of a run, whose windows are counted from 0."""

    def __init__(self, output_dir: Path, start: int, num_devices: int):
        """Add to the accounts of earlier starts; every second of a window counts `num_devices` times."""
        self.file = AccountingFile(output_dir)
        self.start = start
        self.num_devices = num_devices
        self.planned: deque[tuple[int, dict[str, Used]]] = deque()
        self.begun: queue.SimpleQueue[float] = queue.SimpleQueue()  # when windows began, in their order
        self.since: float | None = None  # when the window before that of planned[0] began, or the one at planned[0]

    def plan(self, window: int, used: Mapping[str, Used]) -> None:
        """Note what the jobs use of a window, by name."""
        self.planned.append((window, dict(used)))

    def begin(self) -> None:
        """Note that the next window begins now."""
        self.begun.put(time.monotonic())

    def write(self, *, ended: bool = False) -> None:
        """Write the windows that another has followed; with `ended` the last one too."""
        begun = [self.begun.get() for _ in range(self.begun.qsize())]
        for now in [*begun, *([time.monotonic()] if ended else [])]:
            if self.since is not None and self.planned:
                self._add(*self.planned.popleft(), now - self.since)
            self.since = now

    def _add(self, window: int, used: Mapping[str, Used], seconds: float) -> None:
        total = sum(each.time for each in used.values())
        if total:
            figures = {
                name: {
                    "tokens": each.tokens,
                    "slots": each.slots,
                    "device_seconds": seconds * self.num_devices * each.time / total,
                    "padding": each.padding,
                }
                for name, each in used.items()
            }
            self.file.add(start=self.start, window=window, used=figures)
