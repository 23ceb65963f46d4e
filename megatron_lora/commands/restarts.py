"""Whether a run that has crashed is started again without a hand: at most so often within so long.

    restarts = Restarts(live)
    while (ending := start()).status == CRASH and restarts.again(ending.out_of_memory): ...     # restarts.live: how it starts now

A rank that ran out of memory may have been given too much by what was left `auto`: from then on it is
chosen for less memory.
"""

import dataclasses
import time
from collections import deque

from megatron_lora.config.live import Live

LESS_MEMORY = 0.85  # of what was planned with before


class Restarts:
    """The restarts of one run."""

    def __init__(self, live: Live):
        """Begin with the options of the command line, which bound the restarts."""
        self.live = live
        self._times: deque[float] = deque()

    def again(self, out_of_memory: bool) -> str | None:
        """Return what to say before the run is started again after a crash; None where it is not."""
        now, live = time.monotonic(), self.live
        while self._times and now - self._times[0] > live.restart_window_s:
            self._times.popleft()
        if len(self._times) == live.max_restarts:
            return None
        self._times.append(now)
        less = ""
        if out_of_memory:
            self.live = dataclasses.replace(live, memory_share=live.memory_share * LESS_MEMORY)
            less = f"; what is auto is now chosen for {self.live.memory_share:.0%} of the memory"
        within = f"of at most {live.max_restarts} within {live.restart_window_s:g} s"
        return f"restart {len(self._times)} {within}, from the newest checkpoints{less}"
