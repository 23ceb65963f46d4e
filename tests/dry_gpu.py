"""A GPU's allocations without a GPU: the Triton path on CPU tensors, with kernels and collectives that do nothing, every storage counted.

    with dry_gpu(), Allocations() as memory:
        ...
    memory.peak                         # bytes, as torch.cuda.max_memory_allocated would count them

Launchers, autograd and Python references are the real ones, so what is alive when, and for how long, is what a GPU would see. Flash
attention alone is a stand-in that keeps and allocates what torch's varlen attention does.
"""

from __future__ import annotations

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fused_ops.elementwise import cross_entropy, rms_norm, rope, swiglu
from fused_ops.experts import layer
from fused_ops.experts.rows_by_job import RowsByJob
from fused_ops.lora import linear
from megatron_lora.model import attention
from megatron_lora.parallel import compat


class Allocations(TorchDispatchMode):
    """Counts the storages that operators make: `current` and `peak` bytes."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given or not size:
            return
        self.known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.current -= size


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and logsumexp; backward takes float32 sums of dq, and dk and dv of every query head where heads share."""

    @staticmethod
    def forward(ctx, query, key, value, cu_seqlens):
        out, sums = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, cu_seqlens, cu_seqlens, out, sums)
        return out

    @staticmethod
    def backward(ctx, _):
        query, key, value, *_ = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        scratch = [torch.empty_like(query, dtype=torch.float32)]
        scratch += [torch.empty_like(query) for _ in range(2)] if query.shape[1] != key.shape[1] else []
        del scratch
        return *grads, None


def _varlen_attention(query, key, value, packing, scale, window):
    return _Attention.apply(query, key, value, packing.cu_seqlens)


def _rows_by_job(route, expert_Tk, segments, first_expert):
    """Return what rows_by_job keeps; where rows lie was never written."""
    num_experts, num_segments = len(route.first_E) - 1, len(segments.segments)
    bounds = torch.zeros(num_experts, num_segments, 2, dtype=torch.int32)
    keys = torch.zeros(expert_Tk.numel(), dtype=torch.int32)
    return RowsByJob(bounds=bounds, keys_R=keys, segments=segments.segment_table, adapters=tuple(a for _, _, a in segments.segments))


def _nothing(*args, **kwargs):
    pass


@contextlib.contextmanager
def dry_gpu():
    """Run the GPU's path of all operators, on CPU tensors that are never written."""
    triton = [
        mock.patch.object(module, "backend_name", lambda device, backend=None: "triton")
        for module in (cross_entropy, layer, linear, rms_norm, rope, swiglu)
    ]
    with contextlib.ExitStack() as stack:
        for patch in (
            *triton,
            mock.patch.object(JITFunction, "run", lambda self, *args, **kwargs: None),
            mock.patch.object(layer, "rows_by_job", _rows_by_job),
            mock.patch.object(attention, "can_varlen", lambda query: True),
            mock.patch.object(attention, "varlen_attention", _varlen_attention),
            *(mock.patch.object(compat, name, _nothing) for name in ("all_gather_single", "reduce_scatter_single")),
            mock.patch.object(torch.distributed, "all_reduce", _nothing),  # gloo's thread would keep tensors alive longer
        ):
            stack.enter_context(patch)
        yield
