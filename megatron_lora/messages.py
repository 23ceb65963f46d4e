"""The pipeline's messages: a header in front of activations or gradients, over two process groups per link.

One message per slot and direction, one flat buffer:

    header  fp32 [1 + 2 E]     slot, then E squared gradient norms and E losses (E = most steps that end in one slot), rounded up to 4
    body    dtype [T_local, H] activations (forward) or their gradients (backward); absent for a no-op or evaluation gradient

Shapes are known from the plan, so nothing is negotiated. Each pair of neighbouring stages has a group of its own for each direction:
inside one NCCL group, a receive that was posted ahead would block the send behind it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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
        message.header[SLOT] = slot
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


class Sender:
    """One direction's outgoing side: posts sends and keeps their buffers until they are done."""

    def __init__(self, group: dist.ProcessGroup, peer: int):
        self.group, self.peer = group, peer
        self.pending: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Send a message without waiting for the receiver."""
        while self.pending and self.pending[0][0].is_completed():
            self.pending.popleft()
        work = dist.isend(message.buffer, self.peer, group=self.group)
        assert work is not None
        self.pending.append((work, message.buffer))

    def drain(self) -> None:
        """Wait until every message has left."""
        while self.pending:
            self.pending.popleft()[0].wait()


class Receiver:
    """One direction's incoming side: receives are posted in slot order and taken in the same order; `ahead`: before they are taken."""

    def __init__(self, group: dist.ProcessGroup, peer: int, layout: MessageLayout, device: torch.device):
        self.group, self.peer, self.layout, self.device = group, peer, layout, device
        self.ahead = device.type != "cuda"  # see executor.py
        self.posted: deque[tuple[int, dist.Work, Message]] = deque()
        self.next_slot = 0  # whose receive is posted next

    def post(self, num_rows: int) -> None:
        """Post the receive of the next slot's message, `num_rows` rows in its body."""
        message = self.layout.empty(num_rows, self.device)
        work = dist.irecv(message.buffer, self.peer, group=self.group)
        assert work is not None
        self.posted.append((self.next_slot, work, message))
        self.next_slot += 1

    def take(self, slot: int) -> Message:
        """Wait for the oldest posted message, which must be the one of `slot`."""
        expected, work, message = self.posted.popleft()
        assert expected == slot, f"the next message is of slot {expected}, not {slot}"
        work.wait()
        return message


@dataclass(frozen=True, slots=True)
class Links:
    """A stage's four ends; those that lead nowhere are None."""

    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    def again(self, layout: MessageLayout) -> Links:
        """Return ends over the same connections for another run, from its slot 0 on; this one has ended."""

        def receiver(end: Receiver | None) -> Receiver | None:
            assert end is None or not end.posted, "a receive of the last run is still posted"
            return end and Receiver(end.group, end.peer, layout, end.device)

        def sender(end: Sender | None) -> Sender | None:
            assert end is None or not end.pending, "a message of the last run has not left"
            return end and Sender(end.group, end.peer)

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
    """Make the groups of all pipelines and return this rank's ends.

    `pipeline_ranks` lists, for every pipeline of the run, its global ranks from the first stage to the last; every rank calls this with
    the same list, because making a group is collective. Ranks that share no link do not wait for each other.
    """
    rank = dist.get_rank()
    ends: dict[str, Receiver | Sender] = {}
    for ranks in pipeline_ranks:
        for before, after in zip(ranks[:-1], ranks[1:], strict=True):
            forward, backward = dist.new_group([before, after]), dist.new_group([before, after])
            assert forward is not None and backward is not None
            _greet(forward, before, after, device)
            _greet(backward, after, before, device)
            if rank == before:
                ends["forward_out"] = Sender(forward, after)
                ends["backward_in"] = Receiver(backward, after, layout, device)
            elif rank == after:
                ends["forward_in"] = Receiver(forward, before, layout, device)
                ends["backward_out"] = Sender(backward, before)
    return Links(**{name: ends.get(name) for name in ("forward_in", "forward_out", "backward_in", "backward_out")})  # type: ignore[arg-type]
