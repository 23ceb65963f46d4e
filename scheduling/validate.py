"""The executable definition of a correct plan: replay every stage's actions against versions, verdicts, messages and memory.

Rules, each checked on every stage: every sample once and in its own step, every validation sample once in each evaluation that is due;
the token budget; one segment per job; every F, B and EVAL meets its adapter at weight version == step; backward in FIFO order; at most
P - stage microbatches live; each STEP finds all backwards of its step done and its verdict delivered; MOVE directly after its job's own
STEP, of a resident job without microbatches between F and B; an evaluation's sums reach the first stage with the gradient message that
is theirs; at most max_endings steps and evaluations end in a slot; no number is another's while actions of its job are left; no message
is awaited for ever (deadlock). Tests and benchmarks use it; a run checks its windows by follow.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from scheduling.pipeline import endings, stage_actions, with_drain
from scheduling.types import MAX_ENDINGS, Action, Ending, Lengths, Op, PlanError, Stream

Batches = dict[Ending, Sequence[int]]  # what is to be done: the token counts of each step's and each evaluation's samples
Seen = Counter[tuple[Ending, int]]  # how often each sample occurs


def replay(
    stream: Stream,
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int = 0,
    actions: Sequence[Sequence[Action]] | None = None,
    max_endings: int = MAX_ENDINGS,
    joins: Mapping[int, Mapping[int, Sequence[Sequence[int]]]] | None = None,
    validation: Mapping[int, Sequence[int]] | None = None,
    evaluate_after: Mapping[int, Sequence[int]] | None = None,
    moves: Collection[tuple[int, int]] = (),
) -> None:
    """Raise PlanError on the first rule that a plan breaks; `actions` (per stage, of the drained stream) default to stage_actions.

    `lengths` are those of the first jobs, `joins` [slot][number] of jobs that join later, before a slot and perhaps under the number of
    a departed one; both without the steps that a job has left before. The samples of `validation` [job] are evaluated after each number
    of steps in `evaluate_after` [job], and rows move after each (job, step) in `moves`. With `joins`, these and errors name jobs in the
    order in which they join.
    """
    stream, taken_over = with_drain(stream, num_stages, delay), {}
    if joins:
        stream, lengths, taken_over = _numbered_once(stream, lengths, joins)
    batches = _batches(lengths, validation or {}, evaluate_after or {})
    _check_complete(_check_slots(stream, batches, capacity, max_endings), batches)
    if actions is None:
        actions = [stage_actions(stream, stage, num_stages, delay, moves) for stage in range(num_stages)]
    if len(actions) != num_stages:
        raise PlanError(f"{len(actions)} action lists for {num_stages} stages")
    _Pipeline(stream, batches, actions, delay, taken_over, moves).run()


def _batches(lengths: Lengths, validation: Mapping[int, Sequence[int]], evaluate_after: Mapping[int, Sequence[int]]) -> Batches:
    steps = {Ending(job, step): batch for job, steps in enumerate(lengths) for step, batch in enumerate(steps)}
    return steps | {Ending(job, version, True): validation[job] for job, versions in evaluate_after.items() for version in versions}


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
    streams: Sequence[Stream],
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int = 1,
    max_endings: int = MAX_ENDINGS,
    validation: Mapping[int, Sequence[int]] | None = None,
    evaluate_after: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Raise PlanError unless each replica's stream is correct, all steps and evaluations end in the same slots, and together they hold
    each sample once.
    """
    batches = _batches(lengths, validation or {}, evaluate_after or {})
    drained = [with_drain(stream, num_stages, delay) for stream in streams]
    seen: Seen = Counter()
    for replica, stream in enumerate(drained):
        if list(map(set, endings(stream))) != list(map(set, endings(drained[0]))):
            raise PlanError(f"replica {replica} ends a step in another slot than replica 0")
        seen.update(_check_slots(stream, batches, capacity, max_endings))
        actions = [stage_actions(stream, stage, num_stages, delay) for stage in range(num_stages)]
        _Pipeline(stream, batches, actions, delay, {}).run()
    _check_complete(seen, batches)


def _check_slots(stream: Stream, batches: Batches, capacity: int, max_endings: int) -> Seen:
    """Check each slot: the budget, one segment per job, true token counts, few endings; returns how often each sample occurs.

    A segment may be empty: where only other replicas have samples of the step.
    """
    seen: Seen = Counter()
    for slot, ended in enumerate(endings(stream)):
        if len(ended) > max_endings:
            raise PlanError(f"slot {slot}: {len(ended)} steps end in it, more than max_endings = {max_endings}")
    for slot, microbatch in enumerate(stream):
        if microbatch.num_tokens > capacity:
            raise PlanError(f"slot {slot}: {microbatch.num_tokens} tokens, over the budget of {capacity}")
        jobs = [segment.job for segment in microbatch.segments]
        if len(set(jobs)) < len(jobs):
            raise PlanError(f"slot {slot}: two segments of one job: {jobs}")
        if microbatch.evaluate and not jobs:
            raise PlanError(f"slot {slot}: an evaluation slot without samples")
        for segment in microbatch.segments:
            of = Ending(segment.job, segment.step, microbatch.evaluate)
            try:
                tokens = sum(batches[of][sample] for sample in segment.samples)
            except (KeyError, IndexError):
                raise PlanError(f"slot {slot}: no such sample in {segment}") from None
            if min((0, *segment.samples)) < 0 or of not in batches or tokens != segment.num_tokens:
                raise PlanError(f"slot {slot}: {segment} does not hold {tokens} tokens of existing samples")
            seen.update((of, sample) for sample in segment.samples)
    return seen


def _check_complete(seen: Seen, batches: Batches) -> None:
    """Check that every sample of every step and evaluation occurs exactly once."""
    for (of, sample), count in seen.items():
        if count > 1:
            raise PlanError(f"{of} sample {sample} is scheduled {count} times")
    for of, batch in batches.items():
        for sample in range(len(batch)):
            if (of, sample) not in seen:
                raise PlanError(f"{of} sample {sample} is never scheduled")


class _Stage:
    """One stage during a replay: versions of its adapters, live forwards, delivered verdicts, and messages that have arrived."""

    def __init__(self, stage: int, num_jobs: int, queue: Sequence[Action]):
        self.stage = stage
        self.queue = deque(queue)
        self.previous: Action | None = None
        self.version = [0] * num_jobs
        self.moved: set[tuple[int, int]] = set()
        self.live: deque[int] = deque()  # slots whose backward is due, in the order of their forwards
        self.next_forward = 0  # slot
        self.num_forwards = 0  # of slots that have a backward
        self.num_backwards = 0
        self.num_judged = 0
        self.known: set[Ending] = set()
        self.news: list[Ending] = []  # verdicts to send on with the next forward of a slot that has a backward
        self.evaluated: Counter[Ending] = Counter()  # samples that went forward
        self.reported: list[Ending] = []  # first stage: evaluations whose sums have arrived
        self.forwards: deque[tuple[int, list[Ending]]] = deque()  # arrived messages: (slot, verdicts)
        self.gradients: deque[tuple[int, list[Ending]]] = deque()  # (slot, evaluations whose sums ride on it)


class _Pipeline:
    """All stages of a replay and the messages between them."""

    def __init__(
        self,
        stream: Stream,
        batches: Batches,
        actions: Sequence[Sequence[Action]],
        delay: int,
        taken_over: Mapping[int, int],
        moves: Collection[tuple[int, int]] = (),
    ):
        self.stream = stream
        self.taken_over = taken_over  # job -> slot from which on its number is another's
        self.moves = set(moves)
        with_backward = [slot for slot, microbatch in enumerate(stream) if not microbatch.evaluate]
        ended = endings(stream)
        self.ended = [ended[slot] for slot in with_backward]  # by index
        self.index_of = {slot: index for index, slot in enumerate(with_backward)}
        self.delay = delay
        self.evaluations = {of: batch for of, batch in batches.items() if of.evaluation}
        self.num_samples = Counter[Ending]()  # of each evaluation in this stream
        for microbatch in stream:
            if microbatch.evaluate:
                self.num_samples.update({Ending(s.job, s.step, True): len(s.samples) for s in microbatch.segments})
        steps = Counter(of.job for of in batches if not of.evaluation)
        self.num_steps = [steps[job] for job in range(max((of.job for of in batches), default=-1) + 1)]
        self.stages = [_Stage(stage, len(self.num_steps), queue) for stage, queue in enumerate(actions)]
        self.num_stages = len(self.stages)

    def run(self) -> None:
        """Execute all actions until all are done or no stage can move."""
        moved = True
        while moved:
            moved = False
            for stage in self.stages:
                while stage.queue and self._ready(stage, stage.queue[0]):
                    action = stage.queue.popleft()
                    self._execute(stage, action)
                    stage.previous, moved = action, True
        for stage in self.stages:
            if stage.queue:
                raise PlanError(f"deadlock: stage {stage.stage} waits for ever at {stage.queue[0]}")
            if stage.live or stage.next_forward != len(self.stream) or stage.version != self.num_steps:
                raise PlanError(
                    f"stage {stage.stage} ends after {stage.next_forward} of {len(self.stream)} slots, "
                    f"with live slots {list(stage.live)} and steps taken {stage.version} of {self.num_steps}"
                )
            if stage.moved != self.moves:
                raise PlanError(f"stage {stage.stage}: rows have moved after {sorted(stage.moved)}, not {sorted(self.moves)}")
        if sorted(self.stages[0].reported) != sorted(self.evaluations):
            missing = sorted(self.evaluations.keys() - set(self.stages[0].reported))
            raise PlanError(f"the sums of {missing} have not reached the first stage")

    def _ready(self, stage: _Stage, action: Action) -> bool:
        """Whether the message that an action needs has arrived; a STEP needs the next forward's, which carries its verdict."""
        if action.op is Op.MOVE:
            return True
        if action.op is Op.BACKWARD:
            return stage.stage == self.num_stages - 1 or bool(stage.gradients)
        return stage.stage == 0 or bool(stage.forwards)

    def _execute(self, stage: _Stage, action: Action) -> None:
        if action.op is Op.STEP:
            self._step(stage, action.index)
        elif action.op is Op.MOVE:
            self._move(stage, action.index)
        elif not 0 <= action.index < len(self.stream):
            raise PlanError(f"stage {stage.stage}: {action} is outside the stream of {len(self.stream)} slots")
        elif action.op is Op.BACKWARD:
            self._backward(stage, action)
        else:
            self._forward(stage, action)
        if stage.stage == 0:  # a verdict exists after stage 0's B, and `delay` forwards later where other ranks take part in it
            judged = min(stage.num_backwards, stage.num_forwards - self.num_stages - self.delay + 1)
            for index in range(stage.num_judged, judged):
                verdicts = [ending for ending in self.ended[index] if not ending.evaluation]
                stage.news += verdicts
                stage.known.update(verdicts)
            stage.num_judged = max(stage.num_judged, judged)

    def _check_number(self, stage: _Stage, job: int, what: str, slot: int) -> None:
        if job in self.taken_over and slot >= self.taken_over[job]:
            raise PlanError(f"stage {stage.stage}: {what} of job {job} in slot {slot}, when its number is another's already")

    def _step(self, stage: _Stage, job: int) -> None:
        if stage.stage:
            stage.known.update(stage.forwards[0][1])
        self._check_number(stage, job, "STEP", stage.next_forward)
        if stage.next_forward == len(self.stream):
            raise PlanError(f"stage {stage.stage}: STEP of job {job} after the last forward")
        key = Ending(job, stage.version[job])
        if key not in stage.known:
            raise PlanError(f"stage {stage.stage}: STEP of job {job} step {key.step} before its verdict is delivered")
        stage.known.remove(key)
        stage.version[job] += 1

    def _move(self, stage: _Stage, job: int) -> None:
        version = stage.version[job]
        if stage.previous != Action(Op.STEP, job):
            raise PlanError(f"stage {stage.stage}: MOVE of job {job} after {stage.previous}, not directly after its STEP")
        if any(segment.job == job for slot in stage.live for segment in self.stream[slot].segments):
            raise PlanError(f"stage {stage.stage}: MOVE of job {job}, which has microbatches between F and B")
        if version == self.num_steps[job] and Ending(job, version, True) not in self.evaluations:
            raise PlanError(f"stage {stage.stage}: MOVE of job {job}, which is over")
        stage.moved.add((job, version - 1))

    def _forward(self, stage: _Stage, action: Action) -> None:
        slot, evaluate = action.index, action.op is Op.EVAL
        if slot != stage.next_forward or self.stream[slot].evaluate != evaluate:
            raise PlanError(f"stage {stage.stage}: {action} where slot {stage.next_forward} is next")
        if stage.stage:
            sent, verdicts = stage.forwards.popleft()
            assert sent == slot, "forwards are sent in slot order"
            stage.news += verdicts
            stage.known.update(ending for ending in verdicts if ending.step >= stage.version[ending.job])
        self._meet(stage, action)
        stage.next_forward += 1
        if evaluate:
            stage.evaluated.update({Ending(s.job, s.step, True): len(s.samples) for s in self.stream[slot].segments})
        else:
            stage.live.append(slot)
            stage.num_forwards += 1
        if len(stage.live) > self.num_stages - stage.stage:
            raise PlanError(
                f"stage {stage.stage}: {len(stage.live)} microbatches live at {action}, more than {self.num_stages - stage.stage}"
            )
        if stage.stage < self.num_stages - 1:
            self.stages[stage.stage + 1].forwards.append((slot, [] if evaluate else stage.news))
        if not evaluate:
            stage.news = []

    def _backward(self, stage: _Stage, action: Action) -> None:
        slot = action.index
        if not stage.live or stage.live.popleft() != slot:
            raise PlanError(f"stage {stage.stage}: {action} is not the oldest live forward")
        ended_at = self.index_of[slot] - self.delay
        sums = [ending for ending in (self.ended[ended_at] if ended_at >= 0 else ()) if ending.evaluation]
        if stage.stage < self.num_stages - 1:
            sent, sums = stage.gradients.popleft()
            if sent != slot:
                raise PlanError(f"stage {stage.stage}: {action} receives another slot's gradient")
        else:
            early = [ending for ending in sums if stage.evaluated[ending] < self.num_samples[ending]]
            if early:
                raise PlanError(f"stage {stage.stage}: {action} carries the sums of {early[0]}, which is not complete")
        self._meet(stage, action)
        stage.num_backwards += 1
        if stage.stage:
            self.stages[stage.stage - 1].gradients.append((slot, sums))
            return
        for ending in sums:
            self._check_number(stage, ending.job, "the evaluation", stage.next_forward - 1)
        stage.reported += sums

    def _meet(self, stage: _Stage, action: Action) -> None:
        """Check that every adapter in the microbatch is at the planned version."""
        for segment in self.stream[action.index].segments:
            if stage.version[segment.job] != segment.step:
                raise PlanError(
                    f"stage {stage.stage}: {action} meets job {segment.job} at version {stage.version[segment.job]}, "
                    f"planned for {segment.step}"
                )
