"""Runs one stage's actions over the pipeline's messages, window after window. No policy: what happens when is in the plan.

    F(t)     take the message of slot t, compute, pass it on               header: verdicts of the steps that ended at slot t - P - d
    B(t)     take the gradient of slot t, go back, pass it on              header: sums so far for the steps that ended at slot t - d
    STEP(j)  update job j with the verdict that came with the next forward

A verdict is a squared gradient norm. Each stage adds its own part to the gradient message of the slot where the step ends (d slots
later when the parts must first be summed over other ranks), the first stage then knows the whole and sends it along with the forward
messages. Neither an all-reduce over stages nor a device synchronisation is needed.

On the CPU a receive is posted one slot ahead. On a GPU it is posted when its message is taken: a waiting receive is a running kernel,
and CUDA may wait for running kernels whenever it loads a module or allocates. Two neighbours that both wait so, each for a message that
the other's host has yet to come to, would wait for ever; with nothing posted ahead, every message that a rank waits for precedes, in the
plan's order, whatever its neighbour's host may be held up by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lora.data.microbatch import StageInput
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import SLOT, Links, Message, MessageLayout, Receiver
from megatron_lora.parallel.process_groups import Position
from scheduling.follow import Window
from scheduling.pipeline import Ending, final_backwards, window_actions
from scheduling.types import NOOP, Action, Microbatch, Op


class StageModel(Protocol):
    """What the executor asks of a stage's model (megatron_lora.model.stage.Stage)."""

    def __call__(self, microbatch: StageInput, hidden: Tensor | None) -> Tensor: ...

    def losses(self, hidden: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor: ...


class StageOptimizer(Protocol):
    """What the executor asks of a job's optimizer on this rank (megatron_lora.training.optimizer.JobOptimizer)."""

    def start_reduction(self, loss: Tensor) -> None: ...

    def finish_reduction(self) -> tuple[Tensor, Tensor]: ...

    def step(self, step: int, square_norm: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that this stage has taken; tensors [] on the device, so that nobody waits for them. `loss` counts on the first stage only."""

    job: int
    step: int
    square_norm: Tensor
    loss: Tensor


@dataclass(slots=True)
class _Live:
    """A microbatch between its forward and its backward."""

    hidden: Tensor | None  # the stage's input, a leaf; None on the first stage
    output: Tensor | None = None  # what backward starts from, []: the loss, or the end of a hand-over
    gradient: Tensor | None = None  # what a hand-over's backward gives to the stage's output


class _HandOver(torch.autograd.Function):
    """Copy a stage's output into its message, keep nothing of it, and give back the gradient that arrives later."""

    @staticmethod
    def forward(ctx, output: Tensor, body: Tensor, live: _Live) -> Tensor:
        body.copy_(output)
        ctx.live = live
        return output.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.live.gradient, None, None


class Executor:
    """One stage of one pipeline, from the first slot of a run to its last."""

    def __init__(
        self,
        model: StageModel,
        position: Position,
        links: Links,
        layout: MessageLayout,
        *,
        load: Callable[[Microbatch], StageInput],
        num_rows: Callable[[Microbatch], int],
        optimizers: Sequence[StageOptimizer],
        on_step: Callable[[StepDone], None],
        on_forward: Callable[[Microbatch], None],
        timeline: Timeline,
        device: torch.device,
    ):
        """Bind a stage to its place.

        `load(microbatch)` gives its tensors, `num_rows(microbatch)` the rows of its messages on this rank (0: header alone);
        `on_forward(microbatch)` and `on_step(done)` are told what began and what was taken.
        """
        self.model, self.position, self.links, self.layout = model, position, links, layout
        self.load, self.num_rows, self.optimizers = load, num_rows, optimizers
        self.on_step, self.on_forward, self.timeline, self.device = on_step, on_forward, timeline, device
        self.stream: list[Microbatch] = []  # of the windows so far; slots before `forgotten` are blank
        self.forgotten = 0
        self.endings: list[tuple[Ending, ...]] = []
        self.next_slot = 0
        self.arrived: Message | None = None  # forward message of next_slot, once taken
        self.verdicts: dict[int, Message] = {}  # first stage: slot where steps ended -> the gradient message with their sums
        self.live: dict[int, _Live] = {}
        self.losses = torch.zeros(len(optimizers), dtype=torch.float32, device=device)  # last stage: of each job's current step
        self.misplaced = torch.zeros((), dtype=torch.float32, device=device)  # messages whose header names another slot

    def run(self, windows: Iterable[Window]) -> None:
        """Execute this stage's actions of all windows, then wait for what was sent."""
        place = self.position
        feed = iter(windows)
        while (window := self._next_window(feed)) is not None:
            first = len(self.stream)
            self.stream += window.stream
            self.endings += window.ended
            end = len(self.stream)
            self._perform(window_actions(self.stream, self.endings, place.stage, place.num_stages, place.delay, first, end))
            self._forget(end - place.lag)
        self._perform(final_backwards(len(self.stream), place.stage, place.num_stages))
        self.links.drain()
        assert not self.live and not bool(self.misplaced), "messages and slots went out of step"

    def _next_window(self, feed) -> Window | None:
        with self.timeline.span("wait plan", len(self.stream)):
            return next(feed, None)

    def _forget(self, end: int) -> None:
        """Let go of the slots before `end`, which no later action looks at, so that a long run does not pile them up."""
        for slot in range(self.forgotten, end):
            self.stream[slot], self.endings[slot] = NOOP, ()
        self.forgotten = max(end, self.forgotten)

    def _perform(self, actions: Iterable[Action]) -> None:
        perform = {Op.FORWARD: self._forward, Op.BACKWARD: self._backward, Op.STEP: self._step}
        for action in actions:
            perform[action.op](action.index)

    def _take(self, receiver: Receiver, name: str, slot: int) -> Message:
        """Take a slot's message and post the receive of the next one, where it is known and may be posted ahead."""
        if not receiver.posted:
            receiver.post(self.num_rows(self.stream[slot]))
        with self.timeline.span(name, slot):
            message = receiver.take(slot)
        if receiver.ahead and slot + 1 < len(self.stream):
            receiver.post(self.num_rows(self.stream[slot + 1]))
        self.misplaced += message.header[SLOT] != slot
        return message

    def _next_message(self) -> Message:
        """Take the forward message of the next slot (on the first stage: make it), once."""
        if self.arrived is None:
            slot, lag = self.next_slot, self.position.lag
            if self.links.forward_in is None:
                self.arrived = self.layout.blank(slot, 0, self.device)
                if slot >= lag and self.endings[slot - lag]:
                    self.arrived.square_norms.copy_(self.verdicts[slot - lag].square_norms)
            else:
                self.arrived = self._take(self.links.forward_in, "wait F", slot)
        return self.arrived

    def _forward(self, slot: int) -> None:
        message = self._next_message()
        self.arrived, self.next_slot = None, slot + 1
        self.verdicts.pop(slot - self.position.lag, None)
        microbatch = self.stream[slot]
        self.on_forward(microbatch)
        if not microbatch.num_tokens:
            self._pass_on(self._onward(message, 0))
            return
        data = self.load(microbatch)
        with self.timeline.span("F", slot):
            hidden = None if self.position.is_first else message.body.detach().requires_grad_()
            output = self.model(data, hidden)
            if self.position.is_last:
                self.live[slot] = _Live(hidden, self._loss(output, data))
            else:
                onward = self._onward(message, output.shape[0])
                live = _Live(hidden)
                live.output = _HandOver.apply(output, onward.body, live)
                self.live[slot] = live
                self._pass_on(onward)

    def _loss(self, output: Tensor, data: StageInput) -> Tensor:
        weighted = self.model.losses(output, data.labels, data.targets) * data.weights
        for first, end, job in data.route.segments:
            self.losses[job] += weighted[first:end].detach().sum()
        return weighted.sum()

    def _onward(self, message: Message, num_rows: int) -> Message:
        """Begin the message for the next stage: the same header, an unwritten body."""
        onward = self.layout.empty(num_rows, self.device)
        onward.header.copy_(message.header)
        return onward

    def _pass_on(self, message: Message) -> None:
        if self.links.forward_out is not None:
            self.links.forward_out.post(message)

    def _backward(self, slot: int) -> None:
        message = self._gradient_message(slot)
        gradient = None
        if slot in self.live:
            live = self.live.pop(slot)
            live.gradient = None if self.position.is_last else message.body
            output, live.output = live.output, None  # a hand-over knows `live`: in a circle its graph would wait for the collector
            with self.timeline.span("B", slot):
                output.backward()
            gradient = None if live.hidden is None else live.hidden.grad
        for job, _ in self.endings[slot]:
            self.optimizers[job].start_reduction(self.losses[job].clone())
            self.losses[job].zero_()  # an assignment would wait for the device
        ended = slot - self.position.delay
        self._add_own_part(message, ended)
        if self.links.backward_out is None:
            self.verdicts[ended] = self._onward(message, 0)
            return
        upward = self._onward(message, 0 if gradient is None else gradient.shape[0])
        if gradient is not None:
            upward.body.copy_(gradient)
        self.links.backward_out.post(upward)

    def _gradient_message(self, slot: int) -> Message:
        """Take the gradient message of a slot; the last stage begins a new one."""
        if self.links.backward_in is None:
            return self.layout.blank(slot, 0, self.device)
        return self._take(self.links.backward_in, "wait B", slot)

    def _add_own_part(self, message: Message, slot: int) -> None:
        """Add this stage's squared norms, and losses (of the last stage alone not zero), of the steps that ended at `slot`."""
        for i, (job, _) in enumerate(self.endings[slot] if slot >= 0 else ()):
            square_norm, loss = self.optimizers[job].finish_reduction()
            message.square_norms[i] += square_norm
            message.losses[i] += loss

    def _step(self, job: int) -> None:
        message = self._next_message()
        slot = self.next_slot - self.position.lag
        i, step = next((i, step) for i, (ended, step) in enumerate(self.endings[slot]) if ended == job)
        square_norm = message.square_norms[i]
        with self.timeline.span("STEP", job):
            self.optimizers[job].step(step, square_norm)
        losses = self.verdicts[slot].losses if self.position.is_first else message.losses
        self.on_step(StepDone(job, step, square_norm.clone(), losses[i].clone()))
