"""The token counts of one job's samples, in one buffer for as long as the job is resident.

    key    int32, big-endian: of each step, the tokens of its samples and then a 0
    ends   of each step, the place of its 0 in the key

A list of a job's steps would take about 100 bytes a sample as Python objects, the buffer takes 4. Since no sample has 0 tokens, the bytes
of two keys compare as the nested lists do: the planner sorts jobs by them. A JobLengths is itself a sequence [step][sample] of ints;
`job[step]` makes a list, so loops over samples take it once per step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from scheduling.types import Lengths, PlanError

NUMBER = np.dtype(">i4")
LARGEST = int(np.iinfo(NUMBER).max)


@dataclass(slots=True, eq=False)
class JobLengths(Sequence[list[int]]):
    """[step][sample] -> tokens of one job; not changed once made. See read_lengths for nested lists."""

    key: bytes
    ends: np.ndarray  # int64 [num_steps]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.ends)

    def __getitem__(self, step: int) -> list[int]:  # type: ignore[override]  # no slices: see from_step and cut
        """Return the tokens of a step's samples; IndexError outside 0 .. num_steps - 1."""
        return self.array(step).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the steps in order."""
        return (self[step] for step in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether two jobs have the same lengths."""
        return isinstance(other, JobLengths) and self.key == other.key

    def __hash__(self) -> int:
        """Agree with __eq__."""
        return hash(self.key)

    def array(self, step: int) -> np.ndarray:
        """Return the tokens of a step's samples as a view, int32 [samples]; IndexError outside 0 .. num_steps - 1."""
        span = self.span(step)
        return np.frombuffer(self.key, NUMBER, span.stop - span.start, NUMBER.itemsize * span.start)

    def span(self, step: int) -> slice:
        """Return the places of a step's samples in the key; IndexError outside 0 .. num_steps - 1."""
        if not 0 <= step < len(self.ends):
            raise IndexError(f"step {step} of {len(self.ends)}")
        return slice(self._first(step), int(self.ends[step]))

    def cut(self, num_steps: int) -> JobLengths:
        """Return the first `num_steps` steps."""
        return JobLengths(self.key[: NUMBER.itemsize * self._first(num_steps)], self.ends[:num_steps].copy())

    def from_step(self, first: int) -> JobLengths:
        """Return the steps from `first` on, renumbered from 0."""
        start = self._first(first)
        return JobLengths(self.key[NUMBER.itemsize * start :], self.ends[first:] - start)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return, of every step, its tokens and the sum of its samples' squared tokens: int64 [num_steps] each."""
        if not len(self.ends):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        tokens = np.frombuffer(self.key, NUMBER).astype(np.int64)
        firsts = np.concatenate([[0], self.ends[:-1] + 1])
        return np.add.reduceat(tokens, firsts), np.add.reduceat(tokens * tokens, firsts)

    def _first(self, step: int) -> int:
        """Return the place in the key where a step begins."""
        return int(self.ends[step - 1]) + 1 if step else 0


def read_lengths(job: int, steps: Sequence[Sequence[int]], capacity: int = LARGEST) -> JobLengths:
    """Return the lengths of one job, given as [step][sample].

    Raises PlanError, naming job, step and sample, where no plan can exist: empty steps, empty samples, samples over the budget.
    """
    lengths = steps if isinstance(steps, JobLengths) else _packed(job, steps)
    tokens = np.frombuffer(lengths.key, NUMBER)
    if tokens.size and tokens.max() > capacity:
        step = int(np.searchsorted(lengths.ends, int(np.argmax(tokens > capacity))))
        _refuse(job, step, lengths[step], capacity)
    return lengths


def read_validation(job: int, validation: Sequence[int], evaluate_after: Sequence[int], steps: range, capacity: int) -> JobLengths:
    """Return the lengths of a job's validation set as those of one step (of none without samples).

    Raises PlanError where a sample is not in the budget, or `evaluate_after` does not ascend through `steps`.
    """
    if list(evaluate_after) != sorted(set(evaluate_after)) or not all(version in steps for version in evaluate_after):
        raise PlanError(f"job {job} cannot be evaluated after {list(evaluate_after)} steps: at most {steps[-1]} steps, ascending")
    if evaluate_after and not len(validation):
        raise PlanError(f"job {job} is to be evaluated after {evaluate_after[0]} steps, without validation samples")
    wrong = next((k for k, tokens in enumerate(validation) if not 0 < tokens <= capacity), None)
    if wrong is not None:
        raise PlanError(f"job {job} validation sample {wrong} has {validation[wrong]} tokens; the budget is 1 to {capacity}")
    return read_lengths(job, [validation] if len(validation) else [], capacity)


def read_all(lengths: Lengths, capacity: int = LARGEST) -> tuple[JobLengths, ...]:
    """Return the lengths of a workload's jobs; PlanError as read_lengths."""
    return tuple(read_lengths(job, steps, capacity) for job, steps in enumerate(lengths))


def _packed(job: int, steps: Sequence[Sequence[int]]) -> JobLengths:
    counts = np.fromiter(map(len, steps), np.int64, len(steps))
    if not counts.all():
        raise PlanError(f"job {job} step {int(np.argmin(counts))} has no samples")
    samples = itertools.chain.from_iterable((*batch, 0) for batch in steps)
    tokens = np.fromiter(samples, np.int64, int(counts.sum()) + len(steps))
    ends = np.cumsum(counts + 1) - 1
    wrong = (tokens <= 0) | (tokens > LARGEST)
    wrong[ends] = False
    if wrong.any():
        step = int(np.searchsorted(ends, int(np.argmax(wrong))))
        _refuse(job, step, steps[step], LARGEST)
    return JobLengths(tokens.astype(NUMBER).tobytes(), ends)


def _refuse(job: int, step: int, batch: Sequence[int], capacity: int) -> None:
    sample, tokens = next((k, tokens) for k, tokens in enumerate(batch) if not 0 < tokens <= capacity)
    raise PlanError(f"job {job} step {step} sample {sample} has {tokens} tokens; the budget is 1 to {capacity}")
