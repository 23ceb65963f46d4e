"""Runs one stage's actions over the pipeline's messages, window after window.

It makes no decisions: `scheduling.pipeline.window_actions` turns the plan into this stage's list of
actions. With P stages, and the delay d = 1 where gradient norms must be summed over other ranks of
a stage (tensor or data parallelism) and d = 0 otherwise (P + d is the gap):

    F(t)     forward of slot t       its message's header holds the verdicts of the steps that ended at slot t - P - d
    B(t)     backward of slot t      its message's header holds partial sums for what ended at slot t - d
    MOVE(j)  the rows of job j move, directly after its STEP
    STEP(j)  optimizer step of job j with the verdict in the next forward message's header
    EVAL(s)  forward of an evaluation, reference or mismatched slot, without a graph and without dropout; its message's header holds nothing

Here t counts the slots that have a backward (their index, scheduling.rolling): evaluation slots lie between them.

A verdict is a step's squared gradient norm, summed over all stages; the optimizer skips the step if
it is not finite. The sum is made on the way: a step ends with slot e, and the gradient message of
slot e + d collects each stage's part (and the step's loss) as it travels to the first stage. The
first stage then has the total and sends it forward again in the header of slot e + P + d, so that
every stage takes the step in front of that slot. This needs neither an all-reduce over stages nor a
device synchronisation. A no-op's message is a header without a body. The sums of an evaluation travel to the
first stage like those of a step: it is an ending of the next slot that has a backward.

When receives are posted. On the CPU the next slot's receive is posted ahead. On a GPU a receive is
posted only when its message is needed. A waiting NCCL receive is a running kernel, and CUDA may
wait for running kernels whenever it loads a module or allocates memory. If two neighbours had
receives posted ahead, each could block in such a call while its running receive waits for the
other: a deadlock. Without them, a rank only ever waits for a message that its neighbour sends
earlier in the plan's order than anything that the neighbour may itself be waiting for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lora.data.microbatch import Part, StageInput
from megatron_lora.model.stage import Stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import NUM_SUMS, SLOT, Links, Message, MessageLayout, Receiver
from megatron_lora.parallel.process_groups import Position
from megatron_lora.training.evaluate import EvaluationSums
from megatron_lora.training.jobs import Jobs
from scheduling.follow import Window
from scheduling.pipeline import final_backwards, window_actions
from scheduling.rolling import RollingStream
from scheduling.types import VALIDATION, Action, Ending, Microbatch, Op


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that this stage has taken. The scalars stay on the device, so that the host waits for nothing.

    `sums` [NUM_SUMS] are the step's loss and what its objective reports on the first stage, and meaningless on the others.
    """

    job: int
    step: int
    square_norm: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """An evaluation that is complete, on the first stage: sums [NUM_SUMS] over the job's validation set, on the device.

    `step` is the number of steps that the evaluated weights have taken.
    """

    job: int
    step: int
    sums: Tensor
    num_right: Tensor


@dataclass(slots=True)
class _InFlight:
    """A microbatch between its forward and its backward."""

    hidden: Tensor | None  # the stage's input, a leaf; None on the first stage
    root: Tensor | None = None  # the scalar that backward starts from: the loss (last stage), or what _Outlet returned
    gradient: Tensor | None = None  # of the stage's output, as the next stage sent it; None on the last stage


class _Outlet(torch.autograd.Function):
    """Copies a stage's output into its message; its backward returns the gradient that was received in the meantime.

    The graph keeps only the scalar that `forward` returns, so the output's memory is freed once it
    is copied (what Megatron does with `deallocate_output_tensor`).
    """

    @staticmethod
    def forward(ctx, output: Tensor, body: Tensor, in_flight: _InFlight) -> Tensor:
        body.copy_(output)
        ctx.in_flight = in_flight
        return output.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.in_flight.gradient, None, None


class Executor:
    """One stage of one pipeline, from the first slot of a run to its last."""

    def __init__(
        self,
        model: Stage,
        position: Position,
        links: Links,
        layout: MessageLayout,
        *,
        load: Callable[[Microbatch], StageInput],
        num_rows: Callable[[Microbatch], int],
        jobs: Jobs,
        evaluations: EvaluationSums,
        on_step: Callable[[StepDone], None],
        on_evaluation: Callable[[EvaluationDone], None],
        on_forward: Callable[[Microbatch], None],
        on_window: Callable[[Window], None],
        move: Callable[[int, int], None],
        with_references: Callable[[Microbatch], AbstractContextManager[None]],
        is_stopped: Callable[[], bool] = lambda: False,
        timeline: Timeline,
        device: torch.device,
    ):
        """Make the executor of the stage at `position`, which `links` connect to the stages beside it.

        `load(microbatch)` returns the microbatch's tensors. `num_rows(microbatch)` returns the rows
        of its activations on this rank, 0 for a no-op. `jobs[number].optimizer` takes the job's
        steps, and `evaluations` sums up what the last stage evaluates. `on_forward` is called before
        each slot's forward, `on_step` after each step, `on_evaluation` on the first stage, and `on_window`
        where a window begins, which may change `jobs`. `move(job, step)` moves the job's rows. Inside
        `with_references` adapters are what a reference slot computes with.
        `is_stopped` says whether the run ends early with the window that runs now.
        """
        self.model = model
        self.position = position
        self.links = links
        self.layout = layout
        self.load = load
        self.num_rows = num_rows
        self.jobs = jobs
        self.evaluations = evaluations
        self.on_step = on_step
        self.on_evaluation = on_evaluation
        self.on_forward = on_forward
        self.on_window = on_window
        self.move = move
        self.with_references = with_references
        self.is_stopped = is_stopped
        self.timeline = timeline
        self.device = device
        self.stream = RollingStream()  # the slots that an action may still read
        self.next_slot = 0  # the next slot to run forward
        self.next_message: Message | None = None  # forward message of `next_slot`, once a STEP or F has asked for it
        self.verdicts: dict[int, Message] = {}  # first stage: index where steps ended -> the gradient message with their sums
        self.in_flight: dict[int, _InFlight] = {}  # by slot
        self.sums: dict[int, Tensor] = {}  # last stage: job -> sums of its current step so far, fp32 [NUM_SUMS]
        self.no_sums = torch.zeros(NUM_SUMS, dtype=torch.float32, device=device)
        self.misplaced = torch.zeros((), dtype=torch.float32, device=device)  # messages whose header names another slot

    def run(self, windows: Iterable[Window]) -> None:
        """Execute this stage's actions of all windows, then wait until its last messages are sent.

        The last P + d slots are no-ops, which deliver the last steps' verdicts.
        """
        position = self.position
        feed = iter(windows)
        while (window := self._next_window(feed)) is not None:
            self.on_window(window)
            slots = self.stream.append(window)
            self._perform(window_actions(self.stream, position.stage, position.num_stages, position.delay, slots.start, slots.stop))
            self.stream.forget(position.gap)
        self._perform(final_backwards(self.stream, position.stage, position.num_stages))
        self.links.drain()
        assert not self.in_flight and not bool(self.misplaced), "messages and slots went out of step"

    def _next_window(self, feed) -> Window | None:
        with self.timeline.span("wait plan", self.stream.num_slots):
            return next(feed, None)

    def _perform(self, actions: Iterable[Action]) -> None:
        perform = {
            Op.FORWARD: self._forward,
            Op.EVAL: self._evaluate,
            Op.BACKWARD: self._backward,
            Op.STEP: self._step,
            Op.MOVE: self._move,
        }
        for action in actions:
            perform[action.op](action.index)

    def _take(self, receiver: Receiver, name: str, slot: int, following: int | None) -> Message:
        """Receive and return a slot's message; `name` is that of the wait in the timeline.

        Posts the receive of the `following` message's slot, if that slot is known already and
        receives may be posted ahead.
        """
        if not receiver.posted:
            receiver.post(slot, self.num_rows(self.stream[slot]))
        with self.timeline.span(name, slot):
            message = receiver.take(slot)
        if receiver.ahead and following is not None:
            receiver.post(following, self.num_rows(self.stream[following]))
        self.misplaced += message.header[SLOT] != slot
        return message

    def _peek(self) -> Message:
        """Return the forward message of the next slot without consuming it: the steps in front of that slot read it first.

        The first stage makes the message, and puts the verdicts into its header.
        """
        if self.next_message is None:
            slot, index = self.next_slot, self.stream.index_of(self.next_slot)
            if self.links.forward_in is None:
                self.next_message = self.layout.blank(slot, 0, self.device)
                if index is not None and self.stream.ended_at(index - self.position.gap):
                    self.next_message.square_norms.copy_(self.verdicts[index - self.position.gap].square_norms)
            else:
                following = slot + 1 if slot + 1 < self.stream.num_slots else None
                self.next_message = self._take(self.links.forward_in, "wait F", slot, following)
        return self.next_message

    def _index(self, slot: int) -> int:
        """Return the place of a slot among those that have a backward."""
        index = self.stream.index_of(slot)
        assert index is not None
        return index

    def _begin(self, slot: int) -> tuple[Message, StageInput | None]:
        """Consume a slot's forward message; return it and the microbatch's tensors.

        A slot without tokens has none, and its message is sent on at once.
        """
        message = self._peek()
        self.next_message, self.next_slot = None, slot + 1
        microbatch = self.stream[slot]
        self.on_forward(microbatch)
        if microbatch.num_tokens:
            return message, self.load(microbatch)
        self._send_forward(self._with_same_header(message, 0))
        return message, None

    def _forward(self, slot: int) -> None:
        message, data = self._begin(slot)
        self.verdicts.pop(self._index(slot) - self.position.gap, None)
        for job, step, evaluation in self.stream.endings(slot):
            if evaluation:
                self.jobs[job].evaluated_after = step
        if data is None:
            return
        with self.timeline.span("F", slot):
            hidden = None if self.position.is_first else message.body.detach().requires_grad_()
            output = self.model(data, hidden)
            if self.position.is_last:
                self.in_flight[slot] = _InFlight(hidden, self._loss(output, data))
            else:
                outgoing = self._with_same_header(message, output.shape[0])
                in_flight = _InFlight(hidden)
                in_flight.root = _Outlet.apply(output, outgoing.body, in_flight)
                self.in_flight[slot] = in_flight
                self._send_forward(outgoing)

    def _evaluate(self, slot: int) -> None:
        message, data = self._begin(slot)
        microbatch = self.stream[slot]
        if data is None:
            if microbatch.mismatched and self.position.is_last:
                self._compare(microbatch, self.no_sums, ())
            return
        with self.timeline.span("E", slot), torch.no_grad(), self.with_references(microbatch):
            output = self.model(data, None if self.position.is_first else message.body)
            if self.position.is_last:
                self._add_to_evaluations(microbatch, output, data)
            else:
                outgoing = self._with_same_header(message, output.shape[0])
                outgoing.body.copy_(output)
                self._send_forward(outgoing)

    def _add_to_evaluations(self, microbatch: Microbatch, output: Tensor, data: StageInput) -> None:
        """Add each segment's outcome and right predictions to the sums of its job's evaluation, or keep its references."""
        losses, right = self.model.evaluate(output, data.labels, data.targets)
        if microbatch.mismatched:
            return self._compare(microbatch, losses, data.parts)
        for part in data.parts:
            job, rows = self.jobs[part.job], losses[part.first : part.end]
            if microbatch.reference:
                assert job.references is not None and part.pairs is not None
                job.references.keep(rows, part.pairs)
                continue
            weights = data.weights[part.first : part.end]
            outcome = job.outcome(rows, part, weights)
            self.evaluations.add(part.job, part.step, outcome.sums, (right[part.first : part.end] & (weights > 0)).sum())

    def _compare(self, microbatch: Microbatch, losses: Tensor, parts: Sequence[Part]) -> None:
        """Add mismatched samples' log-probabilities to their batches' divergences, those under the reference negatively, over replicas."""
        sums = self.evaluations.sums_over_replicas(microbatch, losses, parts)
        for segment, found in zip(microbatch.segments, sums if microbatch.reference else -sums, strict=True):
            held = self.jobs[segment.job].divergences
            held[segment.step] = held[segment.step] + found if segment.step in held else found

    def _loss(self, output: Tensor, data: StageInput) -> Tensor:
        """Return what the microbatch's backward starts from, and add each segment's part to the sums of its job's current step."""
        rows, weights = self.model.losses(output, data.labels, data.targets), data.weights
        for part in data.parts:
            held = weights[part.first : part.end]
            outcome = self.jobs[part.job].outcome(rows.detach()[part.first : part.end], part, held)
            if outcome.row_weights is not held:
                held.copy_(outcome.row_weights)
            self.sums[part.job] = self.sums.get(part.job, self.no_sums) + outcome.sums
        return (rows * weights).sum()

    def _with_same_header(self, message: Message, num_rows: int) -> Message:
        """Return a new message with a copy of the header and an unwritten body of `num_rows` rows."""
        outgoing = self.layout.empty(num_rows, self.device)
        outgoing.header.copy_(message.header)
        return outgoing

    def _send_forward(self, message: Message) -> None:
        if self.links.forward_out is not None:
            self.links.forward_out.post(message)

    def _backward(self, slot: int) -> None:
        index = self._index(slot)
        if self.links.backward_in is None:  # on the last stage
            message = self.layout.blank(slot, 0, self.device)
        else:
            following = self.stream.slot_at(index + 1) if index + 1 < self.stream.num_indices else None
            message = self._take(self.links.backward_in, "wait B", slot, following)
        gradient = None
        if slot in self.in_flight:  # not for a no-op
            in_flight = self.in_flight.pop(slot)
            in_flight.gradient = None if self.position.is_last else message.body
            # The graph refers to `in_flight` (_Outlet). Without a reference back it is freed at once, not by the garbage collector.
            root, in_flight.root = in_flight.root, None
            assert root is not None
            with self.timeline.span("B", slot):
                root.backward()
            gradient = None if in_flight.hidden is None else in_flight.hidden.grad
        for job, step, evaluation in self.stream.endings(slot):
            if not evaluation:
                self.jobs[job].optimizer.start_reduction(self.sums.pop(job, self.no_sums).clone())
            elif self.position.is_last:
                self.evaluations.start_reduction(job, step)
            if self.position.is_last and (references := self.jobs[job].references) is not None:
                references.share(VALIDATION if evaluation else step, self.evaluations.group, self.device)
                self.jobs[job].divergences.pop(VALIDATION - step if evaluation else step, None)
        ended_at = index - self.position.delay
        self._add_own_part(message, self.stream.ended_at(ended_at))
        if self.links.backward_out is None:
            self.verdicts[ended_at] = self._with_same_header(message, 0)
            self._report_evaluations(self.verdicts[ended_at], self.stream.ended_at(ended_at))
            return
        outgoing = self._with_same_header(message, 0 if gradient is None else gradient.shape[0])
        if gradient is not None:
            outgoing.body.copy_(gradient)
        self.links.backward_out.post(outgoing)

    def _add_own_part(self, message: Message, ended: Sequence[Ending]) -> None:
        """Add this stage's part to the numbers of each ending: squared norms; on the last stage sums, and all of an evaluation's."""
        for i, (job, step, evaluation) in enumerate(ended):
            if not evaluation:
                first, others = self.jobs[job].optimizer.finish_reduction()
            elif self.position.is_last:
                found = self.evaluations.finish_reduction(job, step)
                first, others = found[0], found[1:]
            else:
                continue
            message.square_norms[i] += first
            message.sums[i] += others

    def _report_evaluations(self, message: Message, ended: Sequence[Ending]) -> None:
        for i, (job, step, evaluation) in enumerate(ended):
            if evaluation:
                self.on_evaluation(EvaluationDone(job, step, message.sums[i].clone(), message.square_norms[i].clone()))

    def _step(self, job: int) -> None:
        """Take a job's step; not where a stop has cut off the evaluation before it, which comes first when the run resumes."""
        message = self._peek()
        ended_at, i, step = self._ended(job)
        if self.is_stopped() and self.jobs[job].owes_evaluation(step):
            return
        square_norm = message.square_norms[i]
        with self.timeline.span("STEP", job):
            self.jobs[job].optimizer.step(step, square_norm)
        sums = self.verdicts[ended_at].sums if self.position.is_first else message.sums
        self.on_step(StepDone(job, step, square_norm.clone(), sums[i].clone()))

    def _move(self, job: int) -> None:
        with self.timeline.span("MOVE", job):
            self.move(job, self._ended(job)[2])

    def _ended(self, job: int) -> tuple[int, int, int]:
        """Return the step of a job that the next slot's verdicts decide: the index where it ended, its place there, and the step."""
        index = self._index(self.next_slot) - self.position.gap
        return next((index, i, of.step) for i, of in enumerate(self.stream.ended_at(index)) if of.job == job and not of.evaluation)
