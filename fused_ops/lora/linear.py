"""One frozen linear with the LoRA adapters of many jobs: the autograd.Function that connects the operators.

    forward    S = c' (M * X) A^T                Y  = X W^T (+ bias) + S B^T
    backward   dS = c' dY B     dB += dY^T S     dX = dY W + M * (dS A)      dA += dS^T (M * X)

X is saved by `save_for_backward` and shares its producer's storage, or its producer recomputes it in backward (refill.py). S, the
weight, the group and the route are attributes of the context, because another job's optimizer step between forward and backward
changes the arena in place. Adapter gradients are added to the group's float32 views, not returned. The output requires a gradient only
if X does: a trainer makes the embedding's output require one. Tensor and sequence parallelism enter through `Collectives` alone;
everything between them is linear in partial sums, so no operator here communicates.
"""

import threading
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from fused_ops.launch.backend import backend_name
from fused_ops.lora import reference
from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.fp8 import Fp8Matrix, Rounded
from fused_ops.lora.frozen import FrozenWeight
from fused_ops.lora.refill import Refill
from fused_ops.lora.route import Route


class Collectives:
    """What a parallel layer does around the operators; this base class is a single rank's identity."""

    def gather_input(self, x: Tensor) -> Tensor:
        """Return X of all rows, before the GEMM (column-parallel under sequence parallelism: all-gather)."""
        return x

    def reduce_output(self, y: Tensor) -> Tensor:
        """Return Y summed over ranks (row-parallel: all-reduce, or reduce-scatter under sequence parallelism)."""
        return y

    def gather_grad(self, dy: Tensor) -> Tensor:
        """Return dY of all rows (row-parallel under sequence parallelism: all-gather)."""
        return dy

    def reduce_grad(self, dx: Tensor) -> Tensor:
        """Return dX summed over ranks (column-parallel: all-reduce, or reduce-scatter under sequence parallelism)."""
        return dx

    def reduce_ds(self, ds: Tensor) -> Tensor:
        """Return the dS of dA, from the partial dS [T, width]: the rows of `local_rows`, summed over ranks when X is a shard of rows."""
        return ds

    def local_rows(self, num_rows: int) -> tuple[int, int]:
        """Return (first, end): the rows of X that this rank holds, of `num_rows`."""
        return 0, num_rows


_IDENTITY = Collectives()


def backend_for(device: torch.device, backend: str | None = None) -> ModuleType:
    """Return the module of operators for a device: Triton kernels on CUDA, plain torch elsewhere, unless `backend` names one."""
    if backend_name(device, backend) == "reference":
        return reference
    from fused_ops.lora import fused

    return fused


def multi_lora_linear(
    x_TK: Tensor,
    weight_NK: Tensor | FrozenWeight,
    bias_N: Tensor | None,
    group: LoraGroup | None,
    route: Route | None,
    collectives: Collectives = _IDENTITY,
    backend: str | None = None,
    refill: Refill | None = None,
    rounded: Rounded | None = None,
    output_shape: torch.Size | None = None,
) -> Tensor:
    """Return Y [T, N] = X W^T (+ bias) + each row's adapter; without group or route, the frozen linear alone.

    x_TK [T_local, K], weight_NK [N, K] (frozen, as it is stored), bias_N [N] or None. With `refill`,
    shared with X's producer, X is not kept; `rounded` has X and dY in 8 bits where neighbours made them. With `output_shape`, that of an
    output that was computed before, this is for backward alone: Y has no values, takes no memory, and neither its product nor its
    reduction is computed. Raises ValueError where shapes or dtypes do not fit.
    """
    if group is None or route is None or not route.segments or group.width == 0:
        group = route = None
    if group is not None and route is not None and not route.dropout:
        group = group.without_dropout
    _check(x_TK, weight_NK, bias_N, group)
    ops = backend_for(x_TK.device, backend)
    return _MultiLoraLinear.apply(x_TK, weight_NK, bias_N, group, route, collectives, ops, refill, rounded, output_shape)


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight_NK, bias_N, group, route, collectives, ops, refill, rounded, output_shape):
        full_x = collectives.gather_input(x_TK)
        if route is not None and route.num_rows != full_x.shape[0]:
            raise ValueError(f"the route has {route.num_rows} rows but X has {full_x.shape[0]}")
        s_TR = None if group is None else ops.down(full_x, group, route)
        if group is not None and refill is None:
            ctx.save_for_backward(x_TK)
        ctx.s_TR, ctx.weight_NK, ctx.group, ctx.route = s_TR, weight_NK, group, route
        ctx.collectives, ctx.ops, ctx.refill, ctx.rounded = collectives, ops, refill, rounded
        x8 = _same_rows(rounded and rounded.take_x(), full_x)
        if output_shape is not None:
            return x_TK.new_empty(()).expand(output_shape)
        return collectives.reduce_output(ops.up(full_x, weight_NK, bias_N, s_TR, group, route, x8))

    @staticmethod
    def backward(ctx, dy_TN):
        group, route, ops = ctx.group, ctx.route, ctx.ops
        _bind_thread(dy_TN)
        x_TK = ctx.saved_tensors[0] if group is not None and ctx.refill is None else None  # now: unpacking it may launch kernels
        dy_TN = ctx.collectives.gather_grad(dy_TN).contiguous()
        ds_TR = None if group is None else ops.grad_s_and_b(dy_TN, ctx.s_TR, group, route)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            dy8 = _same_rows(ctx.rounded and ctx.rounded.take_dy(), dy_TN)
            dx_TK = ctx.collectives.reduce_grad(ops.grad_x(dy_TN, ctx.weight_NK, ds_TR, group, route, dy8))
        if group is None:
            return dx_TK, *[None] * 9
        local = route.rows(*ctx.collectives.local_rows(route.num_rows))
        grad_a = partial(ops.grad_a, ds_TR=ctx.collectives.reduce_ds(ds_TR), group=group, route=local)
        if ctx.refill is None:
            after_dx = dx_TK is not None and type(ctx.collectives) is Collectives  # whose methods launch nothing in between
            grad_a(x_TK, after_dx=after_dx)
        else:
            ctx.refill.defer(grad_a)
        return dx_TK, *[None] * 9


def _same_rows(rounded: Fp8Matrix | None, matrix: Tensor) -> Fp8Matrix | None:
    """Return a matrix that a neighbour has rounded, unless rows of other ranks were gathered to it since."""
    return rounded if rounded is not None and rounded.values.shape == matrix.shape else None


_thread = threading.local()


def _bind_thread(tensor: Tensor) -> None:
    """Give this thread a CUDA context, which TMA descriptors need: autograd's thread has none before its first launch.

    A context is current in a thread or not, hence the one thread-local of this package.
    """
    if tensor.is_cuda and not getattr(_thread, "is_bound", False):
        tensor.new_zeros(())
        _thread.is_bound = True


def _check(x_TK: Tensor, weight_NK: Tensor | FrozenWeight, bias_N: Tensor | None, group: LoraGroup | None) -> None:
    dtype = weight_NK.dtype if isinstance(weight_NK, Tensor) else x_TK.dtype
    if x_TK.dim() != 2 or len(weight_NK.shape) != 2 or x_TK.shape[1] != weight_NK.shape[1] or x_TK.dtype != dtype:
        raise ValueError(f"X {x_TK.dtype} {list(x_TK.shape)} does not fit W {dtype} {list(weight_NK.shape)}")
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise ValueError(f"bias {list(bias_N.shape)} does not fit W {list(weight_NK.shape)}")
    if group is not None and (group.a_RK.shape[1] != weight_NK.shape[1] or group.columns[-1][1] > weight_NK.shape[0]):
        raise ValueError(f"adapters A {list(group.a_RK.shape)}, columns {group.columns} do not fit W {list(weight_NK.shape)}")
    if group is not None and (group.a_RK.dtype != x_TK.dtype or group.a_RK.device != x_TK.device):
        raise ValueError(f"adapters are {group.a_RK.dtype} on {group.a_RK.device}, X is {x_TK.dtype} on {x_TK.device}")
