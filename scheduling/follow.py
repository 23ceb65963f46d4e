"""Follow a stream as its windows arrive: check each before it runs, and find what ends in each of its slots.

The rules are those of validate.replay, stated so that they need only earlier slots. Of steps: every sample at most once and in its own
step, true token counts, the budget, one segment per job and slot, and the first microbatch of a step at least num_stages + delay
indices after the last of the step before (an index counts the slots that have a backward). Of evaluations: each that is due, no other,
with every validation sample once, between the STEP that made its version and the next. Of references: every one that is wanted once,
before the first slot that needs it. Of mismatched samples: those of a batch once each, under the policy at its version and under the
reference, before its first slot. Of steps and evaluations: at most max_endings end in a slot.
Under pipeline.window_actions they imply a correct replay (a property test checks it).

A step, or an evaluation, ends with its last sample, found by counting: its last slot *so far* proves nothing while later windows are
unknown. An evaluation's ending is listed at the next slot that has a backward, perhaps in a later window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduling.data_parallel import DealtJob
from scheduling.job_lengths import JobLengths, read_lengths, read_validation
from scheduling.mismatched import lengths_of
from scheduling.numbers import Numbers
from scheduling.references import Wanted
from scheduling.types import MAX_ENDINGS, VALIDATION, Ending, Lengths, Microbatch, PlanError, Segment, Stream


@dataclass(slots=True)
class _JobProgress:
    """One job so far: its open step, its version in stream order, and the evaluations that are due, each with the samples already seen."""

    lengths: JobLengths
    step: int
    version: int  # steps taken; `step` is one ahead while its STEP is still to come
    validation: JobLengths  # one batch, or none
    due: deque[int]  # versions to evaluate, ascending
    taken: set[int] = field(default_factory=set)  # samples of the open step
    evaluated: set[int] = field(default_factory=set)  # validation samples of due[0]
    ready: int = 0  # the first index at which the open step may start
    wanted: Wanted = field(default_factory=dict)  # references that no slot has computed yet
    mismatched: DealtJob | None = None  # where slots of these are due before each batch
    compared: dict[bool, tuple[int, set[int]]] = field(
        default_factory=dict
    )  # by whether under the reference: the last batch, and its samples
    drained: int = 0  # the index from which on no action of what has ended is left

    @property
    def is_over(self) -> bool:
        return self.step == len(self.lengths) and not self.due


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
        self.num_indices = 0  # slots that have a backward
        self.jobs: dict[int, _JobProgress] = {}
        self.numbers = Numbers()
        self.recent: deque[tuple[Ending, ...]] = deque()  # what ended at the last `gap` indices: their STEPs are still to come
        self.unlisted: list[Ending] = []  # evaluations that have ended since the last index
        for job, steps in enumerate(lengths):
            self.join(job, steps)

    def join(
        self,
        job: int,
        steps: Sequence[Sequence[int]],
        first_step: int = 0,
        validation: Sequence[int] = (),
        evaluate_after: Sequence[int] = (),
        wanted: Wanted | None = None,
        mismatched: DealtJob | None = None,
    ) -> None:
        """Add a job from the next window on; the number of a departed one is refused until its last slot has drained.

        The samples of `validation`, in tokens, are evaluated after each number of steps in `evaluate_after`, which count from the job's
        very first step and ascend; `first_step` itself: before its first step here. `wanted` references have slots of their own,
        and so have `mismatched` samples in front of each batch.
        """
        self.numbers.check_free(job, self.num_indices, self.jobs)
        lengths = read_lengths(job, steps, self.capacity)
        held = read_validation(job, validation, evaluate_after, range(first_step, len(lengths) + 1), self.capacity)
        progress = _JobProgress(lengths, first_step, first_step, held, deque(evaluate_after))
        progress.mismatched = mismatched
        progress.wanted = {step: set(samples) for step, samples in (wanted or {}).items()}
        if not progress.is_over:
            self.jobs[job] = progress

    def leave(self, job: int, evaluate: bool = True) -> None:
        """Remove a resident job from the next window on, after the step that it has begun and the evaluations that are due by then.

        Without `evaluate`, only an evaluation that has begun is completed.
        """
        if job not in self.jobs:
            raise PlanError(f"slot {self.num_slots}: job {job}, which is to leave, is not resident")
        progress = self.jobs[job]
        progress.lengths = progress.lengths.cut(progress.step + bool(progress.taken))
        progress.due = still_due(progress.due, bool(progress.evaluated), len(progress.lengths), evaluate)
        self._remove_if_over(job)

    def follow(self, window: Stream) -> tuple[tuple[Ending, ...], ...]:
        """Check the next window; return, per slot of it, what ends there: steps in segment order, then evaluations."""
        listed = []
        for microbatch in window:
            self._check_slot(microbatch)
            listed.append(() if microbatch.evaluate else self._indexed(microbatch))
            if microbatch.mismatched:
                self._mismatched(microbatch)
            elif microbatch.reference:
                self._reference(microbatch)
            elif microbatch.evaluate:
                self._evaluation(microbatch)
            self.num_slots += 1
        self.numbers.forget_before(self.num_indices)
        return tuple(listed)

    def finish(self) -> None:
        """Check that every step and evaluation of every job is complete, and listed."""
        for job, progress in self.jobs.items():
            due = f", evaluations due after {list(progress.due)} steps" if progress.due else ""
            raise PlanError(f"the stream ends with job {job} at step {progress.step} of {len(progress.lengths)}{due}")
        if self.unlisted:
            raise PlanError(f"the stream ends with an evaluation of job {self.unlisted[0].job}: append no-op slots to report it")

    def _remove_if_over(self, job: int) -> None:
        if self.jobs[job].is_over:
            self.numbers.release(job, self.jobs.pop(job).drained)

    def _check_slot(self, microbatch: Microbatch) -> None:
        if microbatch.num_tokens > self.capacity:
            raise PlanError(f"slot {self.num_slots}: {microbatch.num_tokens} tokens, over the budget of {self.capacity}")
        jobs = [segment.job for segment in microbatch.segments]
        if len(set(jobs)) < len(jobs):
            raise PlanError(f"slot {self.num_slots}: two segments of one job: {jobs}")
        if microbatch.evaluate and not jobs:
            raise PlanError(f"slot {self.num_slots}: an evaluation slot without samples")

    def _indexed(self, microbatch: Microbatch) -> tuple[Ending, ...]:
        """Take the STEPs that come before a slot that has a backward, then its samples; return what ends in it."""
        if len(self.recent) == self.gap:
            self._steps(self.recent.popleft())
        ended = [Ending(segment.job, segment.step) for segment in microbatch.segments if self._train(segment)]
        listed = (*ended, *self.unlisted)
        if len(listed) > self.max_endings:
            many = f"{len(ended)} steps end in it" if not self.unlisted else f"{len(listed)} steps and evaluations end in it"
            raise PlanError(f"slot {self.num_slots}: {many}, more than max_endings = {self.max_endings}")
        self.recent.append(listed)
        self.unlisted = []
        self.num_indices += 1
        return listed

    def _steps(self, ended: tuple[Ending, ...]) -> None:
        for job, step, evaluation in ended:
            progress = self.jobs.get(job)
            if evaluation or progress is None:
                continue
            if progress.due and progress.due[0] <= step:
                due = progress.due[0]
                raise PlanError(f"slot {self.num_slots}: job {job} takes step {step} before its evaluation after {due} steps is complete")
            progress.version = step + 1

    def _of(self, segment: Segment) -> _JobProgress:
        if segment.job not in self.jobs:
            raise PlanError(f"slot {self.num_slots}: there is no job {segment.job}, or none of its steps remains")
        return self.jobs[segment.job]

    def _train(self, segment: Segment) -> bool:
        """Check a segment of a training slot; return whether its step ends with it."""
        progress, slot = self._of(segment), self.num_slots
        if segment.step != progress.step or progress.step == len(progress.lengths):
            raise PlanError(f"slot {slot}: job {segment.job} is at step {progress.step}, not {segment.step}")
        if self.num_indices < progress.ready:
            wait = progress.ready - self.num_indices
            raise PlanError(
                f"slot {slot}: job {segment.job} step {segment.step} cannot begin before {wait} more slots that have a backward"
            )
        self._check_reference(progress, segment, segment.step)
        if not progress.taken:
            self._check_compared(progress, segment.job, segment.step)
        if not self._take(segment, f"step {segment.step}", progress.lengths[segment.step], progress.taken):
            return False
        progress.step, progress.taken = progress.step + 1, set()
        progress.ready = self.num_indices + self.gap
        progress.drained = progress.ready + 1
        self._remove_if_over(segment.job)
        return True

    def _evaluation(self, microbatch: Microbatch) -> None:
        """Check the segments of an evaluation slot; collect the evaluations that end with it."""
        for segment in microbatch.segments:
            progress = self._of(segment)
            where = f"slot {self.num_slots}: job {segment.job}, evaluated after {segment.step} steps,"
            if segment.step != progress.version:
                raise PlanError(f"{where} has taken {progress.version}")
            if not progress.due or progress.due[0] != segment.step:
                raise PlanError(f"{where} is due after {list(progress.due)}")
            self._check_reference(progress, segment, VALIDATION)
            if not progress.evaluated:
                self._check_compared(progress, segment.job, VALIDATION - segment.step)
            if self._take(segment, f"evaluation after {segment.step} steps", progress.validation[0], progress.evaluated):
                self.unlisted.append(Ending(segment.job, segment.step, True))
                progress.due.popleft()
                progress.evaluated, progress.drained = set(), max(progress.drained, self.num_indices + self.gap)
                self._remove_if_over(segment.job)

    def _reference(self, microbatch: Microbatch) -> None:
        """Check the segments of a reference slot."""
        for segment in microbatch.segments:
            progress, of = self._of(segment), f"reference of step {segment.step}"
            batch = (progress.validation if segment.step == VALIDATION else progress.lengths)[max(0, segment.step)]
            self._take(segment, of, batch, set(range(len(batch))) - progress.wanted.get(segment.step, set()))
            progress.wanted[segment.step].difference_update(segment.samples)

    def _mismatched(self, microbatch: Microbatch) -> None:
        """Check the segments of a mismatched slot: at the batch's version, each sample once under the policy and under the reference."""
        for segment in microbatch.segments:
            progress, step = self._of(segment), segment.step if segment.step >= 0 else VALIDATION - segment.step
            if progress.mismatched is None or step != progress.version:
                raise PlanError(f"slot {self.num_slots}: job {segment.job} has no mismatched samples of step {step} at {progress.version}")
            batch, taken = progress.compared.get(microbatch.reference, (segment.step, set()))
            taken = taken if batch == segment.step else set()
            self._take(segment, f"mismatched batch {segment.step}", lengths_of(progress.mismatched, segment.step), taken)
            progress.compared[microbatch.reference] = segment.step, taken

    def _check_compared(self, progress: _JobProgress, job: int, batch: int) -> None:
        """Check that the mismatched samples of a batch that begins are complete."""
        if progress.mismatched is not None:
            wanted = batch, set(range(len(lengths_of(progress.mismatched, batch))))
            if any(progress.compared.get(reference) != wanted for reference in (False, True)):
                raise PlanError(f"slot {self.num_slots}: job {job} begins batch {batch} before its mismatched samples are complete")

    def opened(self) -> set[tuple[int, int]]:
        """Return (job, step) of the steps that have begun, and (job, VALIDATION - steps taken) of the evaluations."""
        steps = {(job, progress.step) for job, progress in self.jobs.items() if progress.taken}
        return steps | {(job, VALIDATION - progress.due[0]) for job, progress in self.jobs.items() if progress.evaluated}

    def _check_reference(self, progress: _JobProgress, segment: Segment, step: int) -> None:
        if missing := progress.wanted.get(step, set()).intersection(segment.samples):
            raise PlanError(f"slot {self.num_slots}: job {segment.job} needs the reference of sample {min(missing)} of step {step} before")

    def _take(self, segment: Segment, of: str, batch: Sequence[int], taken: set[int]) -> bool:
        """Check a segment's samples of a batch and add them to those `taken`; return whether these are all."""
        where = f"slot {self.num_slots}: job {segment.job} {of}"
        if not segment.samples or not all(0 <= sample < len(batch) for sample in segment.samples):
            raise PlanError(f"{where} has no samples {segment.samples}")
        if len(set(segment.samples)) < len(segment.samples) or taken.intersection(segment.samples):
            raise PlanError(f"{where} takes a sample of {segment.samples} twice")
        if sum(batch[sample] for sample in segment.samples) != segment.num_tokens:
            raise PlanError(f"{where} does not hold {segment.num_tokens} tokens")
        taken.update(segment.samples)
        return len(taken) == len(batch)


def still_due(due: deque[int], begun: bool, num_steps: int, evaluate: bool) -> deque[int]:
    """Return the evaluations that remain to a job which leaves after `num_steps` steps: those due by then, or the one begun alone."""
    return deque(version for k, version in enumerate(due) if version <= num_steps and (evaluate or (begun and k == 0)))


@dataclass(frozen=True, slots=True)
class Window:
    """The next slots of this rank's stream, what ends in each (the same on all replicas), and the (job, step) after which rows move.

    `changes` is what else begins with the window, which the executor knows.
    """

    stream: Stream
    ended: tuple[tuple[Ending, ...], ...]
    moves: frozenset[tuple[int, int]] = frozenset()
    changes: object = None

    def chunks(self, num_slots: int) -> list[Window]:
        """Cut into windows of at most this number of slots, one at least; the first has the moves of all, and the changes."""
        firsts = range(0, max(1, len(self.stream)), num_slots)
        cuts = [(self.stream[first : first + num_slots], self.ended[first : first + num_slots]) for first in firsts]
        return [Window(*cuts[0], self.moves, self.changes), *(Window(*cut) for cut in cuts[1:])]
