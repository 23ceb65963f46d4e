"""Evaluations in the plan: which are due, and a planned window with their slots between its training slots.

    version v of a job may be evaluated before index n, for  end[v - 1] + gap < n <= end[v] + gap

where step v ends at index end[v]: between the STEP that made the version and the next one. The range has at least `gap` places. The
evaluation is then listed as an ending at index n. While evaluations are due, steps may take half of a slot's endings, so that every
evaluation can be listed at the end of its range whatever the others do: as many ranges end there as steps have ended a gap before.

An evaluation that need not end in this window and would fill little of a slot waits for the next window, once. When no training
remains, no-ops lead to the places of the last evaluations. evaluation_slots.py packs and places.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduling.evaluation_slots import OpenEvaluation, PackedSlot, Room, TrainingWindow, place
from scheduling.follow import still_due
from scheduling.job_lengths import JobLengths, read_validation
from scheduling.slot_cost import SlotCost
from scheduling.types import NOOP, PlanError, Stream


@dataclass(slots=True)
class _Job:
    """One job's validation set, and the evaluations of it that are still to be planned."""

    num_steps: int  # of the job
    validation: JobLengths  # one batch
    due: deque[int]  # versions, ascending
    left: list[int] | None = None  # validation samples of due[0] still to be planned, shortest first; None before it has begun
    ends: dict[int, int] = field(default_factory=dict)  # of the last steps: the index at which each ended


class Evaluations:
    """The evaluations of a run's jobs that are still to be planned; `jobs` are those that have any."""

    def __init__(self, num_stages: int, gap: int, capacity: int, max_endings: int, cost: SlotCost):
        """Begin without jobs; `capacity` is the token budget of a slot, in which at most `max_endings` steps and evaluations end."""
        self.num_stages = num_stages
        self.gap = gap
        self.capacity = capacity
        self.max_endings = max_endings
        self.cost = cost
        self.jobs: dict[int, _Job] = {}
        self.waited: set[tuple[int, int]] = set()  # (job, version) that have waited for a window
        self.listed: Counter[int] = Counter()  # index -> evaluations that are listed there

    def step_endings(self, first: int) -> int:
        """Return how many steps may end in a slot of the next window, which begins at index `first`."""
        return self.max_endings // 2 if self.jobs or first in self.listed else self.max_endings

    @property
    def validation(self) -> dict[int, list[int]]:
        """Tokens of the validation samples of the jobs, by number."""
        return {number: job.validation[0] for number, job in self.jobs.items()}

    def join(self, number: int, num_steps: int, validation: Sequence[int], evaluate_after: Sequence[int]) -> None:
        """Add a job that is evaluated after each of these numbers of steps; raises PlanError where no plan exists."""
        held = read_validation(number, validation, evaluate_after, range(num_steps + 1), self.capacity)
        if evaluate_after and self.max_endings < 2:
            raise PlanError(
                f"job {number} is to be evaluated, but only {self.max_endings} may end in a slot: max_endings is at least 2 then"
            )
        if evaluate_after:
            self.jobs[number] = _Job(num_steps, held, deque(evaluate_after))

    def leave(self, number: int, num_steps: int, evaluate: bool) -> None:
        """Forget what is not due after `num_steps` steps; without `evaluate`, all but an evaluation that has begun."""
        if number in self.jobs:
            job, self.jobs[number].num_steps = self.jobs[number], num_steps
            job.due = still_due(job.due, job.left is not None, num_steps, evaluate)
            if not job.due:
                del self.jobs[number]

    def insert(self, training: TrainingWindow, num_slots: int, cut: Callable[[Sequence[float]], int]) -> tuple[Stream, dict[int, int]]:
        """Return the next window, at most `num_slots` slots of training and evaluation, and of each job of which an evaluation ends in it
        the index at which the last one is listed.

        `cut` gets the slots' times, of forward and backward together, and returns how many the window has.
        """
        opened = self._open(training)
        end = training.end if not training.is_last else max([training.end, *(one.first for one in opened)])
        room = Room(self.max_endings - self.max_endings // 2, self.listed, opened)
        # More places where more evaluations are than a slot can list, with those of earlier windows.
        end += (len(opened) + sum(self.listed.values())) // room.limit if training.is_last else 0
        for one in opened:
            one.last = end if one.deadline is None else min(one.deadline, end)
        placed, waiting = place(training, opened, end, num_slots, room, self.num_stages, self.capacity, self.cost)
        self.waited.update(waiting)
        merged: list[tuple[int, PackedSlot | None, float]] = []  # index that it has or precedes, evaluation slot or None, time
        for n in range(training.first, end + 1):
            merged += [(n, slot, slot.time) for slot in placed.get(n, ())]
            if n < training.end or any(later > n for later in placed):
                merged.append((n, None, 2 * training.cost_at(n)))
        merged = merged[:num_slots]
        return self._commit(training, merged[: cut([time for _, _, time in merged])])

    def _open(self, training: TrainingWindow) -> list[OpenEvaluation]:
        """Return the evaluations that may begin in the window; all, when no training remains."""
        opened = []
        for number, job in self.jobs.items():
            ends, tokens = {**job.ends, **training.ends.get(number, {})}, job.validation[0]
            for version in job.due:
                if version and version - 1 not in ends:
                    break
                first = max(training.first, ends[version - 1] + self.gap + 1 if version else 0)
                deadline = ends[version] + self.gap if version in ends else None
                if first > training.end and not training.is_last:
                    break
                assert deadline is None or deadline >= first, f"job {number} was not evaluated after {version} steps"
                samples = None if version > job.due[0] else job.left
                samples = sorted(range(len(tokens)), key=tokens.__getitem__) if samples is None else list(samples)
                urgent = training.is_last or (number, version) in self.waited or (deadline is not None and deadline <= training.end)
                opened.append(OpenEvaluation.of(number, version, first, deadline, urgent, samples, tokens, self.cost))
        return opened

    def _commit(self, training: TrainingWindow, merged: Sequence[tuple[int, PackedSlot | None, float]]) -> tuple[Stream, dict[int, int]]:
        """Take over what a window holds; returns it as a stream, and where evaluations that end in it are listed."""
        stream, listed_at = [], {}
        for n, slot, _ in merged:
            if slot is None:
                stream.append(training.stream[n - training.first] if n < training.end else NOOP)
                continue
            stream.append(slot.microbatch())
            for one, samples, _ in slot.segments:
                job = self.jobs[one.number]
                assert job.due[0] == one.version
                taken, tokens = set(samples), job.validation[0]
                left = sorted(range(len(tokens)), key=tokens.__getitem__) if job.left is None else job.left
                job.left = [sample for sample in left if sample not in taken]
                if job.left:
                    continue
                job.left = None
                self.waited.discard((one.number, job.due.popleft()))
                self.listed[n] += 1
                listed_at[one.number] = n
                if not job.due:
                    del self.jobs[one.number]
        end = training.first + sum(slot is None for _, slot, _ in merged)
        self._advance(training.ends, end)
        return tuple(stream), listed_at

    def _advance(self, ends: Mapping[int, Mapping[int, int]], end: int) -> None:
        """Keep where the last two steps of each job ended before index `end`, and what is listed from there on."""
        for number, job in self.jobs.items():
            job.ends |= {step: index for step, index in ends.get(number, {}).items() if index < end}
            job.ends = {step: job.ends[step] for step in sorted(job.ends)[-2:]}
        self.listed = Counter({n: count for n, count in self.listed.items() if n >= end})
