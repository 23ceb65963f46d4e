"""The pipeline's messages, a header and activations or gradients, and the links between stages that carry them.

There is one message per slot and direction, in one flat buffer:

    header  fp32 [1 + 10 E]    the slot, then for each ending (E: the most that a slot may have) ten numbers; padded to 4
    body    dtype [T_local, H] activations (forward) or their gradients (backward); none for a no-op or an evaluation's gradient

The first number of a step is its squared gradient norm, and the others are its loss and what else its objective reports; the first of an
evaluation is how many predictions are right, and the others are the same sums over the validation set. A slot without a backward has a
message forward, and none back.

Both sides know the shapes from the plan. A link is one direction between two neighbouring stages, with
a process group of its own: NCCL runs the operations of one group in order, so in a shared group a
receive that was posted ahead would block every later send.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.parallel.process_groups import new_group

SLOT, FIRST_VERDICT = 0, 1
NUM_SUMS = 9  # of an ending: its loss, and up to eight numbers that its objective reports (training/objectives.py)


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """The sizes that all messages of a run have in common."""

    max_endings: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def header_items(self) -> int:
        """Length of the header in numbers of the compute dtype; it is fp32, rounded up so that the body is aligned to 16 bytes."""
        return -(-(FIRST_VERDICT + (1 + NUM_SUMS) * self.max_endings) // 4) * 16 // self.dtype.itemsize

    def empty(self, num_rows: int, device: torch.device) -> Message:
        """Return an uninitialised message with `num_rows` rows (0: header alone)."""
        return Message(self, torch.empty(self.header_items + num_rows * self.hidden_size, dtype=self.dtype, device=device))

    def blank(self, slot: int, num_rows: int, device: torch.device) -> Message:
        """Return a message with the slot and zero sums in its header, and an uninitialised body."""
        message = self.empty(num_rows, device)
        message.header.zero_()
        message.header[SLOT].fill_(slot)  # an assignment would wait for the device
        return message


@dataclass(frozen=True, slots=True)
class Message:
    """A buffer, and views of its header and body."""

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
        """View of the first numbers [E], squared gradient norms, of what ended at the header's earlier slot (executor.py says which)."""
        return self.header[FIRST_VERDICT : FIRST_VERDICT + self.layout.max_endings]

    @property
    def sums(self) -> Tensor:
        """View of the other numbers, losses and what objectives report, [E, NUM_SUMS]."""
        first = FIRST_VERDICT + self.layout.max_endings
        return self.header[first : first + NUM_SUMS * self.layout.max_endings].view(-1, NUM_SUMS)


class Sender:
    """The sending end of a link: posts sends, and keeps their buffers until they are complete."""

    def __init__(self, group: dist.ProcessGroup, peer: int):
        self.group = group
        self.peer = peer
        self.pending: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Start to send a message."""
        while self.pending and self.pending[0][0].is_completed():
            self.pending.popleft()
        work = dist.isend(message.buffer, self.peer, group=self.group)
        assert work is not None
        self.pending.append((work, message.buffer))

    def drain(self) -> None:
        """Wait until all messages are sent."""
        while self.pending:
            self.pending.popleft()[0].wait()


class Receiver:
    """The receiving end of a link: receives are posted in the order of the slots that have a message on it, and taken in the same order."""

    def __init__(self, group: dist.ProcessGroup, peer: int, layout: MessageLayout, device: torch.device):
        self.group = group
        self.peer = peer
        self.layout = layout
        self.device = device
        self.ahead = device.type != "cuda"  # whether the next receive is posted before its message is needed (executor.py)
        self.posted: deque[tuple[int, dist.Work, Message]] = deque()

    def post(self, slot: int, num_rows: int) -> None:
        """Post the receive of a slot's message, which has `num_rows` rows."""
        message = self.layout.empty(num_rows, self.device)
        work = dist.irecv(message.buffer, self.peer, group=self.group)
        assert work is not None
        self.posted.append((slot, work, message))

    def take(self, slot: int) -> Message:
        """Wait for the oldest posted message, which must be that of `slot`, and return it."""
        expected, arrival, message = self.posted.popleft()
        assert expected == slot, f"the next message is of slot {expected}, not {slot}"
        arrival.wait()  # on a GPU the current stream waits, and not the host
        return message


@dataclass(frozen=True, slots=True)
class Links:
    """A stage's ends of its links; None where it has no neighbour."""

    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    def drain(self) -> None:
        """Wait until all messages are sent."""
        for sender in (self.forward_out, self.backward_out):
            if sender is not None:
                sender.drain()


def connect(pipeline_ranks: list[list[int]], layout: MessageLayout, device: torch.device) -> Links:
    """Connect the stages of all pipelines, and return this rank's ends. Collective: every rank passes the same list.

    `pipeline_ranks` lists, for every pipeline of the run, its global ranks from the first stage to the last.
    """
    rank = dist.get_rank()
    forward_in = forward_out = backward_in = backward_out = None
    for ranks in pipeline_ranks:
        for before, after in zip(ranks[:-1], ranks[1:], strict=True):
            forward, backward = _group_of_two(before, after, device), _group_of_two(after, before, device)
            if rank == before:
                forward_out, backward_in = Sender(forward, after), Receiver(backward, after, layout, device)
            elif rank == after:
                forward_in, backward_out = Receiver(forward, before, layout, device), Sender(backward, before)
    return Links(forward_in, forward_out, backward_in, backward_out)


def _group_of_two(sender: int, receiver: int, device: torch.device) -> dist.ProcessGroup:
    """Make the process group of a link, and send one number through it. Collective over all ranks; the others cannot use it.

    NCCL connects ranks at their first message, and both wait for it. All links do so here, in the same order on every rank.
    """
    group, number = new_group(sorted((sender, receiver))), torch.zeros(1, device=device)
    if dist.get_rank() == sender:
        dist.send(number, receiver, group=group)
    elif dist.get_rank() == receiver:
        dist.recv(number, sender, group=group)
    return group
