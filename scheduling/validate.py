"""The executable definition of a correct plan: replay every stage's actions against versions, verdicts, messages and memory.

Rules, each checked on every stage: every sample once and in its own step; the token budget; one segment per job; every F and B
meets its adapter at weight version == step; backward in FIFO order; at most P - stage microbatches live; each STEP finds all
backwards of its step done and its verdict delivered; at most max_endings steps end in a slot; no number is another's while actions
of its job are left; no message is awaited for ever (deadlock). Tests and benchmarks use it;
a run checks its windows by follow.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduling.pipeline import Ending, endings, stage_actions, with_drain
from scheduling.types import MAX_ENDINGS, Action, Lengths, Op, PlanError, Stream


def replay(
    stream: Stream,
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int = 0,
    actions: Sequence[Sequence[Action]] | None = None,
    max_endings: int = MAX_ENDINGS,
    joins: Mapping[int, Mapping[int, Sequence[Sequence[int]]]] | None = None,
) -> None:
    """Raise PlanError on the first rule that a plan breaks; `actions` (per stage, of the drained stream) default to stage_actions.

    `lengths` are those of the first jobs, `joins` [slot][number] of jobs that join later, before a slot and perhaps under the number of
    a departed one; both without the steps that a job has left before. With `joins`, errors name jobs in the order in which they join.
    """
    stream, taken_over = with_drain(stream, num_stages, delay), {}
    if joins:
        stream, lengths, taken_over = _numbered_once(stream, lengths, joins)
    _check_complete(_check_slots(stream, lengths, capacity, max_endings), lengths)
    if actions is None:
        actions = [stage_actions(stream, stage, num_stages, delay) for stage in range(num_stages)]
    if len(actions) != num_stages:
        raise PlanError(f"{len(actions)} action lists for {num_stages} stages")
    _Pipeline(stream, [len(steps) for steps in lengths], actions, delay, taken_over).run()


def _numbered_once(
    stream: Stream, lengths: Lengths, joins: Mapping[int, Mapping[int, Sequence[Sequence[int]]]]
) -> tuple[Stream, Lengths, dict[int, int]]:
    """Give every job a number of its own; returns, besides, the slot before which each replaced job's number is another's."""
    every, holder, taken_over, numbered = list(lengths), dict(enumerate(range(len(lengths)))), {}, []
    late = [number for slot, jobs in joins.items() if slot >= len(stream) for number, steps in jobs.items() if len(steps)]
    if late:
        raise PlanError(f"job {late[0]} joins after the end of the stream")
    for slot, microbatch in enumerate(stream):
        for number, steps in joins.get(slot, {}).items():
            if number in holder:
                taken_over[holder[number]] = slot
            holder[number] = len(every)
            every.append(steps)
        unknown = [segment.job for segment in microbatch.segments if segment.job not in holder]
        if unknown:
            raise PlanError(f"slot {slot}: there is no job {unknown[0]}")
        segments = tuple(replace(segment, job=holder[segment.job]) for segment in microbatch.segments)
        numbered.append(replace(microbatch, segments=segments))
    return tuple(numbered), every, taken_over


def replay_replicas(
    streams: Sequence[Stream], lengths: Lengths, num_stages: int, capacity: int, delay: int = 1, max_endings: int = MAX_ENDINGS
) -> None:
    """Raise PlanError unless each replica's stream is correct, all steps end in the same slots, and together they hold each sample once."""
    drained = [with_drain(stream, num_stages, delay) for stream in streams]
    seen: Counter[tuple[int, int, int]] = Counter()
    for replica, stream in enumerate(drained):
        if list(map(set, endings(stream))) != list(map(set, endings(drained[0]))):
            raise PlanError(f"replica {replica} ends a step in another slot than replica 0")
        seen.update(_check_slots(stream, lengths, capacity, max_endings))
        actions = [stage_actions(stream, stage, num_stages, delay) for stage in range(num_stages)]
        _Pipeline(stream, [len(steps) for steps in lengths], actions, delay, {}).run()
    _check_complete(seen, lengths)


def _check_slots(stream: Stream, lengths: Lengths, capacity: int, max_endings: int) -> Counter[tuple[int, int, int]]:
    """Check each slot: the budget, one segment per job, true token counts, few endings; returns how often each (job, step, sample) occurs.

    A segment may be empty: where only other replicas have samples of the step.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    for slot, ended in enumerate(endings(stream)):
        if len(ended) > max_endings:
            raise PlanError(f"slot {slot}: {len(ended)} steps end in it, more than max_endings = {max_endings}")
    for slot, microbatch in enumerate(stream):
        if microbatch.num_tokens > capacity:
            raise PlanError(f"slot {slot}: {microbatch.num_tokens} tokens, over the budget of {capacity}")
        jobs = [segment.job for segment in microbatch.segments]
        if len(set(jobs)) < len(jobs):
            raise PlanError(f"slot {slot}: two segments of one job: {jobs}")
        for segment in () if microbatch.evaluate else microbatch.segments:
            try:
                batch = lengths[segment.job][segment.step]
                tokens = sum(batch[sample] for sample in segment.samples)
            except IndexError:
                raise PlanError(f"slot {slot}: no such sample in {segment}") from None
            if min((segment.job, segment.step, *segment.samples)) < 0 or tokens != segment.num_tokens:
                raise PlanError(f"slot {slot}: {segment} does not hold {tokens} tokens of existing samples")
            seen.update((segment.job, segment.step, sample) for sample in segment.samples)
    return seen


def _check_complete(seen: Counter[tuple[int, int, int]], lengths: Lengths) -> None:
    """Check that every sample of the workload occurs exactly once."""
    twice = next((key for key, count in seen.items() if count > 1), None)
    if twice:
        raise PlanError(f"(job, step, sample) {twice} is scheduled {seen[twice]} times")
    for job, steps in enumerate(lengths):
        for step, batch in enumerate(steps):
            for sample in range(len(batch)):
                if (job, step, sample) not in seen:
                    raise PlanError(f"(job, step, sample) {(job, step, sample)} is never scheduled")


class _Stage:
    """One stage during a replay: versions of its adapters, live forwards, delivered verdicts, and messages that have arrived."""

    def __init__(self, stage: int, num_jobs: int, queue: Sequence[Action]):
        self.stage = stage
        self.queue = deque(queue)
        self.version = [0] * num_jobs
        self.live: deque[int] = deque()  # slots whose backward is due, in the order of their forwards
        self.next_forward = 0
        self.next_backward = 0
        self.num_judged = 0
        self.known: set[Ending] = set()
        self.news: list[Ending] = []  # verdicts to send on with the next forward
        self.forwards: deque[tuple[int, list[Ending]]] = deque()  # arrived messages: (slot, verdicts)
        self.gradients: deque[int] = deque()


class _Pipeline:
    """All stages of a replay and the messages between them."""

    def __init__(
        self, stream: Stream, num_steps: Sequence[int], actions: Sequence[Sequence[Action]], delay: int, taken_over: Mapping[int, int]
    ):
        self.stream = stream
        self.taken_over = taken_over  # job -> slot from which on its number is another's
        self.ended = endings(stream)
        self.delay = delay
        self.num_steps = list(num_steps)
        self.stages = [_Stage(stage, len(num_steps), queue) for stage, queue in enumerate(actions)]
        self.num_stages = len(self.stages)

    def run(self) -> None:
        """Execute all actions until all are done or no stage can move."""
        moved = True
        while moved:
            moved = False
            for stage in self.stages:
                while stage.queue and self._ready(stage, stage.queue[0]):
                    self._execute(stage, stage.queue.popleft())
                    moved = True
        for stage in self.stages:
            if stage.queue:
                raise PlanError(f"deadlock: stage {stage.stage} waits for ever at {stage.queue[0]}")
            if stage.live or stage.next_forward != len(self.stream) or stage.version != self.num_steps:
                raise PlanError(
                    f"stage {stage.stage} ends after {stage.next_forward} of {len(self.stream)} slots, "
                    f"with live slots {list(stage.live)} and steps taken {stage.version} of {self.num_steps}"
                )

    def _ready(self, stage: _Stage, action: Action) -> bool:
        """Whether the message that an action needs has arrived; a STEP needs the next forward's, which carries its verdict."""
        if action.op is Op.BACKWARD:
            return stage.stage == self.num_stages - 1 or bool(stage.gradients)
        return stage.stage == 0 or bool(stage.forwards)

    def _execute(self, stage: _Stage, action: Action) -> None:
        if action.op is Op.STEP:
            self._step(stage, action.index)
        elif not 0 <= action.index < len(self.stream):
            raise PlanError(f"stage {stage.stage}: {action} is outside the stream of {len(self.stream)} slots")
        elif action.op is Op.BACKWARD:
            self._backward(stage, action)
        else:
            self._forward(stage, action)
        if stage.stage == 0:  # a verdict exists after stage 0's B, and `delay` forwards later where other ranks take part in it
            judged = min(stage.next_backward, stage.next_forward - self.num_stages - self.delay + 1)
            for slot in range(stage.num_judged, judged):
                stage.news += self.ended[slot]
                stage.known.update(self.ended[slot])
            stage.num_judged = max(stage.num_judged, judged)

    def _step(self, stage: _Stage, job: int) -> None:
        if stage.stage:
            stage.known.update(stage.forwards[0][1])
        if stage.next_forward >= self.taken_over.get(job, len(self.stream)):
            raise PlanError(f"stage {stage.stage}: STEP of job {job} in slot {stage.next_forward}, when its number is another's already")
        key = (job, stage.version[job])
        if key not in stage.known:
            raise PlanError(f"stage {stage.stage}: STEP of job {job} step {key[1]} before its verdict is delivered")
        stage.known.remove(key)
        stage.version[job] += 1

    def _forward(self, stage: _Stage, action: Action) -> None:
        slot = action.index
        if slot != stage.next_forward or self.stream[slot].evaluate != (action.op is Op.EVAL):
            raise PlanError(f"stage {stage.stage}: {action} where slot {stage.next_forward} is next")
        if stage.stage:
            sent, stage.news = stage.forwards.popleft()
            assert sent == slot, "forwards are sent in slot order"
            stage.known.update(key for key in stage.news if key[1] >= stage.version[key[0]])
        self._meet(stage, action)
        stage.live.append(slot)
        stage.next_forward += 1
        if len(stage.live) > self.num_stages - stage.stage:
            raise PlanError(
                f"stage {stage.stage}: {len(stage.live)} microbatches live at {action}, more than {self.num_stages - stage.stage}"
            )
        if stage.stage < self.num_stages - 1:
            self.stages[stage.stage + 1].forwards.append((slot, stage.news))
        stage.news = []

    def _backward(self, stage: _Stage, action: Action) -> None:
        slot = action.index
        if not stage.live or stage.live.popleft() != slot:
            raise PlanError(f"stage {stage.stage}: {action} is not the oldest live forward")
        if stage.stage < self.num_stages - 1 and stage.gradients.popleft() != slot:
            raise PlanError(f"stage {stage.stage}: {action} receives another slot's gradient")
        self._meet(stage, action)
        stage.next_backward += 1
        if stage.stage:
            self.stages[stage.stage - 1].gradients.append(slot)

    def _meet(self, stage: _Stage, action: Action) -> None:
        """Check that every adapter in the microbatch is at the planned version (evaluation slots: in their forward alone)."""
        microbatch = self.stream[action.index]
        if microbatch.evaluate and action.op is Op.BACKWARD:
            return
        for segment in microbatch.segments:
            if stage.version[segment.job] != segment.step:
                raise PlanError(
                    f"stage {stage.stage}: {action} meets job {segment.job} at version {stage.version[segment.job]}, "
                    f"planned for {segment.step}"
                )
