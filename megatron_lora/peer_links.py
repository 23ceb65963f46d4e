"""Links between neighbours on one host: the sender's copy engine writes into the receiver's memory, and no kernel runs on either side.

A link is one direction between two ranks. The receiver owns a ring of SLOTS buffers, and each end owns a flag, a count of messages
modulo 2^32 that the other end writes. Message n, in the order of streams of their own at either end:

    sender      wait taken >= n + 1 - SLOTS;  copy into the peer's buffer n mod SLOTS;  sent := n + 1 in the peer's memory
    receiver    wait sent >= n + 1;  copy the buffer into the message's tensor;         taken := n + 1 in the peer's memory

where a >= b means int32(a - b) >= 0, so that neither wrap-around nor the first messages are special.

Waits are the device's own (cuStreamWaitValue32): neither an SM nor the host is kept busy. Both flags are waited for where they lie and
written from afar, behind a system-wide fence, so whoever sees a count sees the bytes that it counts.

Nothing waits in a circle, even if CUDA runs all streams of a rank one after another, or its host stands still until the device has done
all it was given (it may, whenever a module is loaded). A rank's sends and takes have one order, that of its actions, and a receive is
given to the device only when its message is taken. So what a rank may be held up by is, for a take, the send of that message; for the
send of message n, the take of message n - SLOTS; and whatever precedes those on the other rank. Under 1F1B with two slots or more the
steady state never waits for the second kind: before a stage sends message n it has taken one that its neighbour sent after it took
n - 2. While the pipeline fills or drains it may wait, but never in a circle, which tests/megatron_lora/test_peer_links.py establishes by
walking the executor's orders with every wait blocking. The third slot keeps copies early where empty slots follow one another.

A rank whose peer has died waits on the device for ever, as with NCCL; torchrun ends it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.cuda_driver import CudaDriver, CudaError

SLOTS = 3
SLOT_ALIGNMENT = 512
FLAG, PROBE, PROBE_BLOCK = 0, 64, 4096  # offsets in an end's flag memory: the count; a flag and a block written once, to try the path
PROBE_BYTES = 1024
PROBE_VALUE = 0x5EED
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Link = tuple[int, int]  # global ranks: sender, receiver


class Driver(Protocol):
    """What a link asks of the device (megatron_lora.cuda_driver.CudaDriver)."""

    def new_stream(self) -> Any: ...

    def current_stream(self) -> Any: ...

    def record(self, stream: Any) -> Any: ...

    def wait_event(self, stream: Any, event: Any) -> None: ...

    def copy(self, target: int, source: int, num_bytes: int, stream: Any) -> None: ...

    def write_flag(self, address: int, value: int, stream: Any) -> None: ...

    def wait_flag(self, address: int, value: int, stream: Any) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The addresses of a link as one of its ends sees them."""

    ring: int  # SLOTS buffers in the receiver's memory
    slot_bytes: int
    own_flag: int  # what this end waits for: messages sent (receiver), messages taken (sender)
    peer_flag: int  # what this end writes

    def buffer(self, number: int, tensor: Tensor) -> int:
        """Return the address of a message's buffer, which must hold the tensor."""
        assert tensor.is_contiguous() and tensor.nbytes <= self.slot_bytes, (
            f"a message of {tensor.nbytes} bytes does not fit into a slot of {self.slot_bytes} bytes"
        )
        return self.ring + number % SLOTS * self.slot_bytes


class Outbox:
    """A link's sending end."""

    transport = "peer"

    def __init__(self, driver: Driver, ends: Ends):
        """Begin with message number 0."""
        self.driver, self.ends, self.number = driver, ends, 0
        self.stream = driver.new_stream()

    def send(self, tensor: Tensor) -> Sent:
        """Send a tensor once the current stream has written it; it must stay as it is until the result is completed."""
        driver, number, stream = self.driver, self.number, self.stream
        target = self.ends.buffer(number, tensor)
        driver.wait_event(stream, driver.record(driver.current_stream()))
        driver.wait_flag(self.ends.own_flag, number + 1 - SLOTS, stream)
        driver.copy(target, tensor.data_ptr(), tensor.nbytes, stream)
        driver.write_flag(self.ends.peer_flag, number + 1, stream)
        self.number = number + 1
        return Sent(self, number, driver.record(stream))

    def wait_taken(self, number: int) -> None:
        """Let the current stream wait until the receiver has taken message `number`."""
        self.driver.wait_flag(self.ends.own_flag, number + 1, self.stream)
        self.driver.wait_event(self.driver.current_stream(), self.driver.record(self.stream))


@dataclass(frozen=True, slots=True)
class Sent:
    """A message on its way."""

    outbox: Outbox
    number: int
    left: Any  # event

    def is_completed(self) -> bool:
        """Whether it has left, so that its memory may be used again."""
        return self.left.query()

    def wait(self) -> None:
        """Let the current stream wait until the receiver has taken it: nothing of it is under way then, in either direction."""
        self.outbox.wait_taken(self.number)


class Inbox:
    """A link's receiving end."""

    transport = "peer"

    def __init__(self, driver: Driver, ends: Ends):
        """Begin with message number 0."""
        self.driver, self.ends, self.number = driver, ends, 0
        self.stream = driver.new_stream()

    def receive(self, tensor: Tensor) -> Arrival:
        """Give the next message to a tensor of its size, which nobody may use before the result's `wait`."""
        driver, number, stream = self.driver, self.number, self.stream
        source = self.ends.buffer(number, tensor)
        driver.wait_event(stream, driver.record(driver.current_stream()))  # who had the tensor's memory before may still be at work
        driver.wait_flag(self.ends.own_flag, number + 1, stream)
        driver.copy(tensor.data_ptr(), source, tensor.nbytes, stream)
        driver.write_flag(self.ends.peer_flag, number + 1, stream)
        self.number = number + 1
        return Arrival(driver, driver.record(stream))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message to come."""

    driver: Driver
    arrived: Any  # event; the sender knows by then that its buffer is free

    def wait(self) -> None:
        """Let the current stream wait for the message."""
        self.driver.wait_event(self.driver.current_stream(), self.arrived)


def connect_peers(links: Sequence[Link], slot_bytes: int, device: torch.device) -> dict[Link, Outbox | Inbox | None]:
    """Return the links that can go over peer memory, each with this rank's end of it (None: other ranks' link).

    Collective: every rank gives the same links, in the same order; all find the same ones. `slot_bytes` bounds the messages. A path is
    used once a flag and a block have come through it; where both ranks share a host and one cannot reach the other, the link is left
    out. CudaError when the ring of a link that works cannot be made.
    """
    host = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    try:
        driver = CudaDriver(device)
    except CudaError:
        driver = None
    names = _gather((_host_name() if driver else None), host)
    links = [link for link in links if names[link[0]] is not None and names[link[0]] == names[link[1]]]
    ours = [link for link in links if rank in link]
    flags = {link: driver.allocate(PROBE_BLOCK + PROBE_BYTES) for link in ours} if driver else {}

    # Try every path. A rank's own flag memory of a link is written by the other rank of that link alone.
    opened = _open(driver, ours, _gather(_exports(driver, flags), host), rank)
    _gather(None, host)  # all that could be written has been written
    reached = {link for link in opened if driver is not None and _probed(driver, flags[link])}
    known = _gather(reached, host)
    links = [link for link in links if link in known[link[0]] and link in known[link[1]]]
    ours = [link for link in links if rank in link]

    slot_bytes = -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    rings = {link: driver.allocate(SLOTS * slot_bytes) for link in ours if driver and link[1] == rank}
    handles = _gather({link: driver.export(ring) for link, ring in rings.items() if driver}, host)
    ends: dict[Link, Outbox | Inbox | None] = dict.fromkeys(links)
    for link in ours:
        assert driver is not None
        ring = rings[link] if link[1] == rank else driver.open(handles[link[1]][link])
        place = Ends(ring=ring, slot_bytes=slot_bytes, own_flag=flags[link] + FLAG, peer_flag=opened[link] + FLAG)
        ends[link] = Inbox(driver, place) if link[1] == rank else Outbox(driver, place)
    dist.barrier(group=host)
    dist.destroy_process_group(host)
    return ends


def _host_name() -> str:
    """Name this boot of this machine: containers on one host share it, hosts do not."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()


def _gather(value: Any, group: dist.ProcessGroup | None) -> list:
    """Return every rank's value on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _exports(driver: CudaDriver | None, memory: dict[Link, int]) -> dict[Link, bytes]:
    """Name memory to other processes, as far as the device allows it."""
    try:
        return {link: driver.export(address) for link, address in memory.items()} if driver else {}
    except CudaError:
        return {}  # this device shares no memory


def _open(driver: CudaDriver | None, links: Sequence[Link], handles: list[dict[Link, bytes]], rank: int) -> dict[Link, int]:
    """Map the other ends' flag memory and write a probe into it; return its addresses, without those out of reach."""
    opened = {}
    for link in links if driver else ():
        other = link[0] + link[1] - rank
        try:
            address = driver.open(handles[other][link])
            _write_probe(driver, address)
        except (KeyError, CudaError):
            continue
        opened[link] = address
    return opened


def _write_probe(driver: CudaDriver, address: int) -> None:
    """Send a block and a flag the way that messages go; waits for them."""
    block = torch.full((PROBE_BYTES,), 0xA5, dtype=torch.uint8, device=driver.device)
    torch.cuda.synchronize(driver.device)
    stream = driver.new_stream()
    driver.copy(address + PROBE_BLOCK, block.data_ptr(), PROBE_BYTES, stream)
    driver.write_flag(address + PROBE, PROBE_VALUE, stream)
    driver.synchronize(stream)


def _probed(driver: CudaDriver, flags: int) -> bool:
    """Whether the other end's probe is in this end's memory, and a stream's wait for it ends."""
    came = driver.read(flags + PROBE, 4) == PROBE_VALUE.to_bytes(4, "little")
    came = came and driver.read(flags + PROBE_BLOCK, PROBE_BYTES) == b"\xa5" * PROBE_BYTES
    if not came:
        return False
    stream = driver.new_stream()
    try:
        driver.wait_flag(flags + PROBE, PROBE_VALUE, stream)
        driver.synchronize(stream)
    except CudaError:
        return False
    return True
