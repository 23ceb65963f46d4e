"""The pipeline's messages: a header in front of activations or gradients, and the links that carry them.

One message per slot and direction, one flat buffer:

    header  fp32 [1 + 2 E]     slot, then E squared gradient norms and E losses (E = most steps that end in one slot), rounded up to 4
    body    dtype [T_local, H] activations (forward) or their gradients (backward); absent for a no-op or evaluation gradient

Shapes are known from the plan, so nothing is negotiated. A link is one direction between two neighbouring stages: a process group of
its own (inside one NCCL group, a receive that was posted ahead would block the send behind it).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.parallel.process_groups import rank_timeout

SLOT, FIRST_VERDICT = 0, 1


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """Sizes that all messages of a run share."""

    max_endings: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def header_floats(self) -> int:
        """Length of the header, rounded up so that the body starts on 16 bytes."""
        return -(-(FIRST_VERDICT + 2 * self.max_endings) // 4) * 4

    @property
    def header_items(self) -> int:
        """Numbers of the compute dtype that the header takes up."""
        return self.header_floats * 4 // self.dtype.itemsize

    def empty(self, num_rows: int, device: torch.device) -> Message:
        """Return an unwritten message for `num_rows` rows (0: header alone)."""
        return Message(self, torch.empty(self.header_items + num_rows * self.hidden_size, dtype=self.dtype, device=device))

    def blank(self, slot: int, num_rows: int, device: torch.device) -> Message:
        """Return a message with a fresh header (sums zero) and an unwritten body."""
        message = self.empty(num_rows, device)
        message.header.zero_()
        message.header[SLOT].fill_(slot)  # an assignment would wait for the device
        return message


@dataclass(frozen=True, slots=True)
class Message:
    """One buffer with its header and body views."""

    layout: MessageLayout
    buffer: Tensor

    @property
    def header(self) -> Tensor:
        """View of the header, fp32."""
        return self.buffer[: self.layout.header_items].view(torch.float32)

    @property
    def body(self) -> Tensor:
        """View of the body, [T_local, H]."""
        return self.buffer[self.layout.header_items :].view(-1, self.layout.hidden_size)

    @property
    def square_norms(self) -> Tensor:
        """View of the squared gradient norms of the steps that end in the slot that the message speaks of, [E]."""
        return self.header[FIRST_VERDICT : FIRST_VERDICT + self.layout.max_endings]

    @property
    def losses(self) -> Tensor:
        """View of those steps' losses, [E]."""
        first = FIRST_VERDICT + self.layout.max_endings
        return self.header[first : first + self.layout.max_endings]


class Work(Protocol):
    """A message under way: `is_completed` once its memory is free again, `wait` lets the current stream (CPU: the host) wait for it."""

    def is_completed(self) -> bool: ...

    def wait(self) -> object: ...


class Arrival(Protocol):
    """A message to come: `wait` lets the current stream (CPU: the host) wait for it."""

    def wait(self) -> object: ...


class Link:
    """Either end of a link: a process group of two."""

    def __init__(self, group: dist.ProcessGroup, peer: int):
        self.group = group
        self.peer = peer

    @property
    def transport(self) -> str:
        """What carries the messages, "nccl" or "gloo"; on the two ranks of the link alone."""
        return dist.get_backend(self.group)

    def send(self, tensor: Tensor) -> Work:
        """Send a tensor without waiting for the receiver."""
        work = dist.isend(tensor, self.peer, group=self.group)
        assert work is not None
        return work

    def receive(self, tensor: Tensor) -> Arrival:
        """Give the next message to a tensor."""
        work = dist.irecv(tensor, self.peer, group=self.group)
        assert work is not None
        return work


class Sender:
    """One direction's outgoing side: posts sends and keeps their buffers until they are done."""

    def __init__(self, link: Link):
        self.link = link
        self.pending: deque[tuple[Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Send a message without waiting for the receiver."""
        while self.pending and self.pending[0][0].is_completed():
            self.pending.popleft()
        self.pending.append((self.link.send(message.buffer), message.buffer))

    def drain(self) -> None:
        """Wait until every message has left."""
        while self.pending:
            self.pending.popleft()[0].wait()


class Receiver:
    """One direction's incoming side: receives are posted in slot order and taken in the same order; `ahead`: before they are taken."""

    def __init__(self, link: Link, layout: MessageLayout, device: torch.device):
        self.link, self.layout, self.device = link, layout, device
        self.ahead = device.type != "cuda"  # see executor.py
        self.posted: deque[tuple[int, Arrival, Message]] = deque()
        self.next_slot = 0  # whose receive is posted next

    def post(self, num_rows: int) -> None:
        """Post the receive of the next slot's message, `num_rows` rows in its body."""
        message = self.layout.empty(num_rows, self.device)
        self.posted.append((self.next_slot, self.link.receive(message.buffer), message))
        self.next_slot += 1

    def take(self, slot: int) -> Message:
        """Wait for the oldest posted message, which must be the one of `slot`."""
        expected, arrival, message = self.posted.popleft()
        assert expected == slot, f"the next message is of slot {expected}, not {slot}"
        arrival.wait()
        return message


@dataclass(frozen=True, slots=True)
class Links:
    """A stage's four ends; those that lead nowhere are None."""

    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    @property
    def transports(self) -> dict[str, str]:
        """What carries each end's messages: "nccl" or "gloo"."""
        ends = {name: getattr(self, name) for name in ("forward_in", "forward_out", "backward_in", "backward_out")}
        return {name: end.link.transport for name, end in ends.items() if end is not None}

    def again(self, layout: MessageLayout) -> Links:
        """Return ends over the same connections for another run, from its slot 0 on; this one has ended."""

        def receiver(end: Receiver | None) -> Receiver | None:
            assert end is None or not end.posted, "a receive of the last run is still posted"
            return end and Receiver(end.link, layout, end.device)

        def sender(end: Sender | None) -> Sender | None:
            assert end is None or not end.pending, "a message of the last run has not left"
            return end and Sender(end.link)

        return Links(receiver(self.forward_in), sender(self.forward_out), receiver(self.backward_in), sender(self.backward_out))

    def drain(self) -> None:
        """Wait until every sent message has left."""
        for sender in (self.forward_out, self.backward_out):
            if sender is not None:
                sender.drain()


def _greet(group: dist.ProcessGroup, sender: int, receiver: int, device: torch.device) -> None:
    """Send one number. NCCL connects two ranks at their first message and both wait for it: all links do so here, in one order."""
    number = torch.zeros(1, device=device)
    if dist.get_rank() == sender:
        dist.send(number, receiver, group=group)
    elif dist.get_rank() == receiver:
        dist.recv(number, sender, group=group)


def connect(pipeline_ranks: list[list[int]], layout: MessageLayout, device: torch.device) -> Links:
    """Connect the stages of all pipelines and return this rank's ends.

    `pipeline_ranks` lists, for every pipeline of the run, its global ranks from the first stage to the last; every rank calls this with
    the same list, because it is collective.
    """
    rank = dist.get_rank()
    forward_in = forward_out = backward_in = backward_out = None
    for ranks in pipeline_ranks:
        for before, after in zip(ranks[:-1], ranks[1:], strict=True):
            forward, backward = _link(before, after, device), _link(after, before, device)
            if forward is None or backward is None:
                continue
            if rank == before:
                forward_out, backward_in = Sender(forward), Receiver(backward, layout, device)
            else:
                forward_in, backward_out = Receiver(forward, layout, device), Sender(backward)
    return Links(forward_in, forward_out, backward_in, backward_out)


def _link(sender: int, receiver: int, device: torch.device) -> Link | None:
    """Connect two ranks in one direction. Every rank calls this; those two get their ends, the others None."""
    group = dist.new_group(sorted((sender, receiver)), timeout=rank_timeout())
    if dist.get_rank() not in (sender, receiver):
        return None
    _greet(group, sender, receiver, device)
    return Link(group, sender + receiver - dist.get_rank())
