"""LoRA as PEFT computes it, in the place of the fused linear: what the fused kernels are compared with in whole runs.

For every job's rows and every module: y += dropout(x) A^T B^T * scale, each product, dropout and sum by a torch kernel of its own in the
compute dtype, their results kept for backward by autograd. Gradients are added to the same float32 arena as the fused linear's, so the
optimizer is the same. Dropout is torch's: its masks are others than the kernels', its cost is what PEFT pays.

    use_adapters(stage, "unfused")          # "fused": the trainer's own; "reference": its slow twin; "none": no adapters at all
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.lora.adapters import LoraGroup, padded_rank
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.gated import Gated
from fused_ops.lora.linear import Collectives, multi_lora_linear
from fused_ops.lora.refill import Refill
from fused_ops.lora.route import Route
from megatron_lora.model.stage import Stage

ADAPTERS = ("fused", "unfused", "reference", "none")


def use_adapters(stage: Stage, kind: str) -> None:
    """Let the stage's linears compute their adapters in one of the ways of ADAPTERS; "none" takes the adapters away."""
    assert kind in ADAPTERS, kind
    others = {"unfused": plain_lora_linear, "reference": partial(multi_lora_linear, backend="reference"), "none": frozen_linear}
    for linear in stage.linears:
        linear.operator = others.get(kind, multi_lora_linear)


def frozen_linear(
    x_TK: Tensor, weight: Tensor, bias: Tensor | None, group: LoraGroup | None, route: Route | None, *arguments, **options
) -> Tensor:
    """Return Y [T, N] of the frozen linear alone."""
    return multi_lora_linear(x_TK, weight, bias, None, None, *arguments, **options)


def plain_lora_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    group: LoraGroup | None,
    route: Route | None,
    collectives: Collectives,
    refill: Refill | None = None,
    rounded: Rounded | None = None,
    output_shape: torch.Size | None = None,
    makes: Gated | None = None,
    reads: Gated | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return Y [T, N]; one tensor rank only. Norms and SwiGLU keep their outputs and do their own work (other arguments stay unused).

    Y is computed also where its shape alone is wanted, as PEFT's layers do when they run again.
    """
    assert type(collectives) is Collectives, "plain LoRA runs on one tensor rank"
    if group is None or route is None or not route.segments:
        return multi_lora_linear(x_TK, weight_NK, bias_N, None, None, residual=residual)
    y_TN = _PlainLora.apply(x_TK, weight_NK, bias_N, group, route)
    return y_TN if residual is None else residual + y_TN


class _PlainLora(torch.autograd.Function):
    """Keeps the graph of the plain expression and differentiates it in backward, so that recomputed layers reach their adapters too."""

    @staticmethod
    def forward(ctx, x_TK, weight_NK, bias_N, group, route):
        used: list[tuple[Tensor, Tensor]] = []  # factors, and where their gradients go

        def factors(slot: int, module: int) -> list[Tensor]:
            rank, a_row, b_row = padded_rank(group.adapters.ranks[slot]), group.a_rows[slot][module], group.b_rows[slot][module]
            rows = (group.a_RK, group.grad_a_RK, a_row), (group.b_RN[module], group.grad_b_RN[module], b_row)
            # .data has a version counter of its own: another job's optimizer step may change the arena before this backward.
            pair = [(values.data[row : row + rank].requires_grad_(), grad[row : row + rank]) for values, grad, row in rows]
            used.extend(pair)
            return [factor for factor, _ in pair]

        with torch.enable_grad():
            x = x_TK.detach().requires_grad_()
            y = expression(x, weight_NK, bias_N, group, route.segments, factors)
        ctx.kept = x, y, used
        return y.detach()

    @staticmethod
    def backward(ctx, dy_TN):
        x, y, used = ctx.kept
        ctx.kept = None
        dx, *grads = torch.autograd.grad(y, [x, *(factor for factor, _ in used)], dy_TN)
        for grad, (_, into) in zip(grads, used, strict=True):
            into += grad
        return dx, None, None, None, None


def expression(x: Tensor, weight: Tensor, bias: Tensor | None, group: LoraGroup, segments, factors) -> Tensor:
    """Return Y; `factors(slot, module)` gives A [r, K] and B transposed [r, N] of every module that takes part."""
    base = F.linear(x, weight, bias)
    parts, at = [], 0
    for first, end, slot in segments:
        if first > at:
            parts.append(base[at:first])
        rows, at, dropout = x[first:end], end, group.adapters.dropouts[slot]
        columns, done = [], 0
        for module, (start, stop) in enumerate(group.columns):
            if group.a_rows[slot][module] < 0:
                continue
            a, b = factors(slot, module)
            delta = F.linear(F.dropout(rows, dropout) if dropout else rows, a) @ b * group.adapters.scales[slot]
            if start > done:
                columns.append(base[first:end, done:start])
            columns.append(base[first:end, start:stop] + delta)
            done = stop
        if done < base.shape[1]:
            columns.append(base[first:end, done:])
        parts.append(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1))
    if at < base.shape[0]:
        parts.append(base[at:])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
