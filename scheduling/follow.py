"""Follow a stream as its windows arrive: check each before it runs, and find the steps that end in each of its slots.

The rules are those of validate.replay, stated so that they need only earlier slots: every sample at most once and in its own step,
true token counts, the budget, one segment per job and slot, at most max_endings steps that end in a slot, and the first microbatch
of a step at least num_stages + delay slots after the last of the step before. Under pipeline.window_actions they imply a correct
replay (a property test checks it).

A step ends with its last sample, found by counting: its last slot *so far* proves nothing while later windows are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduling.job_lengths import JobLengths, read_lengths
from scheduling.numbers import Numbers
from scheduling.pipeline import Ending
from scheduling.types import MAX_ENDINGS, Lengths, Microbatch, PlanError, Segment, Stream


@dataclass(slots=True)
class _JobProgress:
    """One job so far: its open step, the samples of it already seen, and the first slot in which the step may start."""

    lengths: JobLengths
    step: int = 0
    taken: set[int] = field(default_factory=set)
    ready: int = 0


class Follower:
    """Checks windows in order; holds the resident jobs alone. Raises PlanError, naming slot and job, on the first broken rule."""

    def __init__(
        self,
        lengths: Lengths,
        num_stages: int,
        capacity: int,
        delay: int = 0,
        max_endings: int = MAX_ENDINGS,
    ):
        """Begin before the first slot of a stream over `lengths` [job][step][sample]; jobs may join as well."""
        self.gap = num_stages + delay
        self.capacity = capacity
        self.max_endings = max_endings
        self.num_slots = 0
        self.jobs: dict[int, _JobProgress] = {}
        self.numbers = Numbers()
        for job, steps in enumerate(lengths):
            self.join(job, steps)

    def join(self, job: int, steps: Sequence[Sequence[int]], first_step: int = 0) -> None:
        """Add a job from the next window on; the number of a departed one is refused until its last slot has drained."""
        self.numbers.check_free(job, self.num_slots, self.jobs)
        lengths = read_lengths(job, steps, self.capacity)
        if first_step < len(lengths):
            self.jobs[job] = _JobProgress(lengths, first_step)

    def leave(self, job: int) -> None:
        """Remove a resident job from the next window on, after the step that it has begun."""
        if job not in self.jobs:
            raise PlanError(f"slot {self.num_slots}: job {job}, which is to leave, is not resident")
        progress = self.jobs[job]
        progress.lengths = progress.lengths.cut(progress.step + bool(progress.taken))
        if not progress.taken:
            self._remove(job)

    def follow(self, window: Stream) -> tuple[tuple[Ending, ...], ...]:
        """Check the next window; return, per slot of it, the (job, step) pairs that end there, in segment order."""
        ended = []
        for microbatch in window:
            ended.append(self._slot(microbatch))
            self.num_slots += 1
        self.numbers.forget_before(self.num_slots)
        return tuple(ended)

    def finish(self) -> None:
        """Check that every step of every job is complete."""
        for job, progress in self.jobs.items():
            raise PlanError(f"the stream ends with job {job} at step {progress.step} of {len(progress.lengths)}")

    def _remove(self, job: int) -> None:
        self.numbers.release(job, self.jobs.pop(job).ready)

    def _slot(self, microbatch: Microbatch) -> tuple[Ending, ...]:
        slot = self.num_slots
        if microbatch.num_tokens > self.capacity:
            raise PlanError(f"slot {slot}: {microbatch.num_tokens} tokens, over the budget of {self.capacity}")
        jobs = [segment.job for segment in microbatch.segments]
        if len(set(jobs)) < len(jobs):
            raise PlanError(f"slot {slot}: two segments of one job: {jobs}")
        ended = tuple((segment.job, segment.step) for segment in microbatch.segments if self._segment(slot, segment))
        if len(ended) > self.max_endings:
            raise PlanError(f"slot {slot}: {len(ended)} steps end in it, more than max_endings = {self.max_endings}")
        return ended

    def _segment(self, slot: int, segment: Segment) -> bool:
        """Check one segment; return whether its step ends with it."""
        progress = self.jobs.get(segment.job)
        if progress is None:
            raise PlanError(f"slot {slot}: there is no job {segment.job}, or none of its steps remains")
        if segment.step != progress.step:
            raise PlanError(f"slot {slot}: job {segment.job} is at step {progress.step}, not {segment.step}")
        if slot < progress.ready:
            raise PlanError(f"slot {slot}: job {segment.job} step {segment.step} cannot begin before slot {progress.ready}")
        batch = progress.lengths[segment.step]
        if not segment.samples or not all(0 <= sample < len(batch) for sample in segment.samples):
            raise PlanError(f"slot {slot}: job {segment.job} step {segment.step} has no samples {segment.samples}")
        if len(set(segment.samples)) < len(segment.samples) or progress.taken.intersection(segment.samples):
            raise PlanError(f"slot {slot}: job {segment.job} step {segment.step} takes a sample of {segment.samples} twice")
        if sum(batch[sample] for sample in segment.samples) != segment.num_tokens:
            raise PlanError(f"slot {slot}: job {segment.job} step {segment.step} does not hold {segment.num_tokens} tokens")
        progress.taken.update(segment.samples)
        if len(progress.taken) < len(batch):
            return False
        progress.step, progress.taken, progress.ready = progress.step + 1, set(), slot + self.gap
        if progress.step == len(progress.lengths):
            self._remove(segment.job)
        return True


@dataclass(frozen=True, slots=True)
class Window:
    """The next slots of this rank's stream, and the steps that end in each (the same on all replicas)."""

    stream: Stream
    ended: tuple[tuple[Ending, ...], ...]
