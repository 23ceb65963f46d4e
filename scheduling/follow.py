"""Follow a stream as its windows arrive: check each before it runs, and find the steps that end in each of its slots.

The rules are those of validate.replay, stated so that they need only earlier slots: every sample at most once and in its own step,
true token counts, the budget, one segment per job and slot, and the first microbatch of a step at least num_stages + delay slots
after the last of the step before. Under pipeline.window_actions they imply a correct replay (a property test checks it).

A step ends with its last sample, found by counting: its last slot *so far* proves nothing while later windows are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduling.pipeline import Ending
from scheduling.types import Lengths, Microbatch, PlanError, Segment, Stream


@dataclass(slots=True)
class _JobProgress:
    """One job so far: its open step, the samples of it already seen, and the first slot in which the step may start."""

    step: int = 0
    taken: set[int] = field(default_factory=set)
    ready: int = 0


class Follower:
    """Checks windows in order. Raises PlanError, naming slot and job, on the first rule that one breaks."""

    def __init__(self, lengths: Lengths, num_stages: int, capacity: int, delay: int = 0, first_steps: Sequence[int] = ()):
        """Begin before the first slot of a stream over `lengths`, each job at its first step (0 where none are given)."""
        self.lengths = lengths
        self.gap = num_stages + delay
        self.capacity = capacity
        self.num_slots = 0
        self.jobs = [_JobProgress(step) for step in first_steps or [0] * len(lengths)]

    def follow(self, window: Stream) -> tuple[tuple[Ending, ...], ...]:
        """Check the next window; return, per slot of it, the (job, step) pairs that end there, in segment order."""
        ended = []
        for microbatch in window:
            ended.append(self._slot(microbatch))
            self.num_slots += 1
        return tuple(ended)

    def finish(self, departed: Sequence[int] = ()) -> None:
        """Check that every step of every job is complete; `departed` jobs may have ended early, but not inside a step."""
        for job, progress in enumerate(self.jobs):
            if progress.taken or (progress.step < len(self.lengths[job]) and job not in departed):
                raise PlanError(f"the stream ends with job {job} at step {progress.step} of {len(self.lengths[job])}")

    def _slot(self, microbatch: Microbatch) -> tuple[Ending, ...]:
        slot = self.num_slots
        if microbatch.num_tokens > self.capacity:
            raise PlanError(f"slot {slot}: {microbatch.num_tokens} tokens, over the budget of {self.capacity}")
        jobs = [segment.job for segment in microbatch.segments]
        if len(set(jobs)) < len(jobs):
            raise PlanError(f"slot {slot}: two segments of one job: {jobs}")
        return tuple((segment.job, segment.step) for segment in microbatch.segments if self._segment(slot, segment))

    def _segment(self, slot: int, segment: Segment) -> bool:
        """Check one segment; return whether its step ends with it."""
        if not 0 <= segment.job < len(self.jobs):
            raise PlanError(f"slot {slot}: there is no job {segment.job}")
        progress = self.jobs[segment.job]
        if segment.step != progress.step or progress.step >= len(self.lengths[segment.job]):
            raise PlanError(f"slot {slot}: job {segment.job} is at step {progress.step}, not {segment.step}")
        if slot < progress.ready:
            raise PlanError(f"slot {slot}: job {segment.job} step {segment.step} cannot begin before slot {progress.ready}")
        batch = self.lengths[segment.job][segment.step]
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
        return True


@dataclass(frozen=True, slots=True)
class Window:
    """The next slots of this rank's stream, and the steps that end in each (the same on all replicas)."""

    stream: Stream
    ended: tuple[tuple[Ending, ...], ...]
