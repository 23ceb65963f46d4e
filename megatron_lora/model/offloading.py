"""Layer inputs that wait in host memory between a microbatch's forward and its backward.

    forward     layer l begins              its input goes to the host while the layer computes, and leaves the GPU when the next begins
    backward    layer l's backward begins   its input is there; that of the layer below starts to come back while layer l computes

Copies run on a stream of their own, in both directions. The compute stream waits for a copy only where it needs what was copied, or its
memory, so results are the same bits. Host memory is pinned, and belongs to a stage's pool: a buffer goes back to it when its input has come
back, and the next microbatch takes it. As copies run one after another, a buffer is written again only after it was read.

    pool = HostPool(device)
    inputs = LayerInputs(pool)              # of one microbatch
    place = inputs.put(hidden)              # in forward, layer after layer
    hidden = inputs.take(place)             # in backward, in the opposite order

On a CPU the same calls copy to a buffer and back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HostPool:
    """Buffers in host memory, and the stream that copies to and from them."""

    def __init__(self, device: torch.device):
        """Make an empty pool for tensors of a device."""
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.free: list[Tensor] = []
        self.num_buffers = 0

    def reserve(self, number: int, num_elements: int, dtype: torch.dtype) -> None:
        """Make `number` free buffers, so that none is allocated while the pipeline runs."""
        self.free = [self._allocate(num_elements, dtype) for _ in range(number)]
        self.num_buffers = number

    def _allocate(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_elements, dtype=dtype, pin_memory=self.on_gpu)

    def buffer(self, like: Tensor) -> Tensor:
        """Take a buffer with room for a tensor: a free one, made anew if it is too small, or one more."""
        buffer = self.free.pop() if self.free else None
        if buffer is None:
            self.num_buffers += 1
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._allocate(like.numel(), like.dtype)
        return buffer

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy once all that was launched before has run; return what to wait for (`wait`)."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.stream)
            return copied

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let what is launched from now on run after a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class _Moving(NamedTuple):
    """A tensor on the device that is being copied, from or to host memory."""

    tensor: Tensor
    copied: torch.cuda.Event | None


class _OnHost(NamedTuple):
    """An input in host memory."""

    buffer: Tensor
    shape: torch.Size


class LayerInputs:
    """The inputs of one microbatch's layers. One is on its way at a time in each direction, so the device holds no other."""

    def __init__(self, pool: HostPool):
        self.pool = pool
        self.kept: list[Tensor | _OnHost | _Moving | None] = []  # by place; None once it is taken
        self.leaving: _Moving | None = None

    def put(self, hidden: Tensor, stays: bool = False) -> int:
        """Keep a layer's input, in host memory unless it `stays`, and return its place; the input before has left by then."""
        self._let_go()
        if stays:
            self.kept.append(hidden)
        else:
            buffer = self.pool.buffer(hidden)
            self.leaving = _Moving(hidden, self.pool.copy(buffer[: hidden.numel()].view(hidden.shape), hidden))
            self.kept.append(_OnHost(buffer, hidden.shape))
        return len(self.kept) - 1

    def take(self, place: int) -> Tensor:
        """Return the input at a place on the device, and start to bring back the one before it."""
        self._let_go()
        self._fetch(place)
        found, self.kept[place] = self.kept[place], None
        if place:
            self._fetch(place - 1)
        if isinstance(found, _Moving):
            self.pool.wait(found.copied)
            return found.tensor
        assert isinstance(found, Tensor), f"the input at place {place} was taken before"
        return found

    def _let_go(self) -> None:
        """Drop the last input that left: what uses its memory next runs after its copy."""
        if self.leaving is not None:
            self.pool.wait(self.leaving.copied)
            self.leaving = None

    def _fetch(self, place: int) -> None:
        """Start to bring an input back, if it is on the host, and give its buffer back: later copies run after this one."""
        waiting = self.kept[place]
        if isinstance(waiting, _OnHost):
            size = waiting.shape.numel()
            tensor = torch.empty(waiting.shape, dtype=waiting.buffer.dtype, device=self.pool.device)
            self.kept[place] = _Moving(tensor, self.pool.copy(tensor, waiting.buffer[:size].view(waiting.shape)))
            self.pool.free.append(waiting.buffer)
