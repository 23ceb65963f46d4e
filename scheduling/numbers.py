"""When a new job may take the number of a departed one: after that one's last slot has drained.

    last step ends at index e             ->  STEP stands before F(e + gap) on every stage  ->  free from index e + gap + 1 on
    last evaluation listed at index e     ->  sums reach the first stage before F(e + gap)  ->  free from index e + gap on

An index is a slot's place among those that have a backward.
A new job joins with a window that begins there or later, so every action of the departed job lies
in earlier windows. Only the numbers of jobs that departed within the last gap of slots are kept.
"""

from __future__ import annotations

from collections.abc import Container

from scheduling.types import PlanError


class Numbers:
    """The numbers of departed jobs whose last slots have not drained yet."""

    __slots__ = ("_free_at",)

    def __init__(self) -> None:
        """Make every number free."""
        self._free_at: dict[int, int] = {}

    def __len__(self) -> int:
        """Return how many numbers are kept."""
        return len(self._free_at)

    def is_free(self, number: int, index: int, resident: Container[int]) -> bool:
        """Whether a job may join under this number before `index`."""
        return number >= 0 and number not in resident and index >= self._free_at.get(number, 0)

    def check_free(self, number: int, index: int, resident: Container[int]) -> None:
        """Raise PlanError unless a job may join under this number before `index`."""
        if not self.is_free(number, index, resident):
            why = "numbers begin at 0" if number < 0 else f"it is free from index {self._free_at.get(number)} on"
            why = "it is resident" if number in resident else why
            raise PlanError(f"index {index}: a job cannot join as number {number}: {why}")

    def release(self, number: int, free_at: int) -> None:
        """Make the number of a job that departs free from an index on; the last of several calls for one job counts."""
        self._free_at[number] = max(free_at, self._free_at.get(number, 0))

    def forget_before(self, index: int) -> None:
        """Forget the numbers that are free at `index`."""
        self._free_at = {number: free_at for number, free_at in self._free_at.items() if free_at > index}
