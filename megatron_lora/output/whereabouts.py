"""Where each rank is: the action that it has begun last, in a file that outlives it, so that a hang can be explained.

    timeline = Timeline(device, on_begin=Whereabouts(folder, rank).begin)      # in a rank: a write into mapped memory per span
    read_whereabouts(folder)[3].words == "in the forward of slot 17"           # once the ranks have ended

On a GPU that is the host's place, which may be some slots ahead of the device.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import NamedTuple

NUM_BYTES = 64
WORDS = {  # of the timeline's spans
    "wait plan": "waiting for the plan of slot {}",
    "wait F": "waiting for the forward message of slot {}",
    "wait B": "waiting for the backward message of slot {}",
    "F": "in the forward of slot {}",
    "E": "in the evaluation of slot {}",
    "B": "in the backward of slot {}",
    "STEP": "in a step of job {}",
    "MOVE": "in a move of job {}",
}


class Whereabout(NamedTuple):
    """What a rank has begun last, and when, by the clock of its machine."""

    since_s: float
    action: str
    index: int

    @property
    def waits(self) -> bool:
        """Whether the rank waits for another."""
        return self.action.startswith("wait")

    @property
    def words(self) -> str:
        """What the rank does, for a message."""
        return WORDS[self.action].format(self.index)


class Whereabouts:
    """Writes where one rank is."""

    def __init__(self, folder: Path, rank: int):
        file = folder / f"rank-{rank}"
        file.write_bytes(bytes(NUM_BYTES))
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), NUM_BYTES)

    def begin(self, action: str, index: int) -> None:
        """Note that the rank begins an action."""
        self._memory[:] = f"{time.monotonic():.6f} {index} {action}".encode().ljust(NUM_BYTES)


def read_whereabouts(folder: Path) -> dict[int, Whereabout]:
    """Return where the ranks of this machine were last, by rank; those that have begun nothing are left out."""
    found = {}
    for file in folder.glob("rank-*"):
        since_s, _, rest = file.read_bytes().decode().rstrip("\0 ").partition(" ")
        index, _, action = rest.partition(" ")
        if action:
            found[int(file.name.removeprefix("rank-"))] = Whereabout(float(since_s), action, int(index))
    return found
