"""The slots of a run that an action may still read, as windows of the plan arrive.

Slots are numbered in stream order, and those that have a backward (training slots and no-ops) also
among themselves, by *index*. Warm-up, gap, endings and verdicts are counted by index, so that an
evaluation slot changes no training slot's place. Memory is that of one window and the gap.

    rolling = RollingStream()
    slots = rolling.append(window)      then, when their actions are done:  rolling.forget(gap)
"""

from __future__ import annotations

from scheduling.follow import Window
from scheduling.types import Ending, Microbatch


class RollingStream:
    """The last slots of a stream: their microbatches, indices and endings, and the steps after which rows move."""

    def __init__(self) -> None:
        """Begin before the first slot."""
        self.num_slots = 0  # of all windows so far
        self.num_indices = 0  # those of them that have a backward
        self._microbatches: dict[int, Microbatch] = {}  # by slot
        self._indices: dict[int, int] = {}  # slot -> index
        self._slots: dict[int, int] = {}  # index -> slot
        self._endings: dict[int, tuple[Ending, ...]] = {}  # by slot
        self._moves: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        """Return how many slots are held."""
        return len(self._microbatches)

    def __getitem__(self, slot: int) -> Microbatch:
        """Return a slot's microbatch."""
        return self._microbatches[slot]

    def endings(self, slot: int) -> tuple[Ending, ...]:
        """Return what ends in a slot; nothing in an evaluation slot."""
        return self._endings[slot]

    def index_of(self, slot: int) -> int | None:
        """Return a slot's place among those that have a backward, None for an evaluation slot."""
        return self._indices.get(slot)

    def slot_at(self, index: int) -> int:
        """Return the slot at a place among those that have a backward."""
        return self._slots[index]

    def ended_at(self, index: int) -> tuple[Ending, ...]:
        """Return what ends at an index; nothing before the first."""
        return self._endings[self._slots[index]] if index >= 0 else ()

    def moves_after(self, job: int, step: int) -> bool:
        """Whether the job's rows move after this step."""
        return (job, step) in self._moves

    def append(self, window: Window) -> range:
        """Add the next window; returns its slots."""
        first = self.num_slots
        self._moves |= window.moves
        for microbatch, ended in zip(window.stream, window.ended, strict=True):
            slot = self.num_slots
            self._microbatches[slot], self._endings[slot] = microbatch, ended
            self.num_slots += 1
            if microbatch.evaluate:
                assert not ended, f"slot {slot}: what ends is listed at a slot that has a backward"
                continue
            self._indices[slot], self._slots[self.num_indices] = self.num_indices, slot
            self.num_indices += 1
        return range(first, self.num_slots)

    def forget(self, gap: int) -> None:
        """Drop the slots before the last `gap` that have a backward."""
        end = self._slots.get(self.num_indices - gap, 0)
        for slot in [slot for slot in self._microbatches if slot < end]:
            del self._microbatches[slot]
            self._moves -= {(ending.job, ending.step) for ending in self._endings.pop(slot) if not ending.evaluation}
            if (index := self._indices.pop(slot, None)) is not None:
                del self._slots[index]
