"""A mixture of frozen experts in place of a layer's MLP, with adapters on each: the autograd.Function that connects the operators.

    p = softmax(x R^T)         the k largest are the token's experts e_1, ..., e_k, with weights w_j = p_j, or p_j over their sum
    y = sum_j w_j D_e (silu(G_e x) * (U_e x)),  e = e_j

No expert has a capacity, so no token is dropped. A row is a token at one of its experts; rows are ordered by expert, then by token, so
that of an expert those of a job lie together. How many rows an expert has stays on the device. A row's numbers depend on nothing but its
token and its expert: products sum over features in one order, a token's experts are summed in the order of their probabilities, and
nothing is added atomically. A token of NaN has the first k experts.

    forward    rows of X gathered; [gate | up] = X U^T; a = w silu(gate) up; Y = a D^T, summed over a token's experts
    backward   rows of dY gathered; da = dY D; dw = da . silu(gate) up; dX = d[gate | up] U, summed likewise; through p to x

Adapters of experts add S B^T to either product of a row (adapters.py), and to a = w silu(gate) up theirs see the weight, which they are
linear in. dA needs the rows of X, which are gathered again, and a, which is computed again.

Kept for backward: [gate | up] of every row, whose memory backward overwrites, the choice, and where normalisation does not make them
superfluous the probabilities; with adapters S, and X [T, H].

Every tensor rank has the whole router, and a part of every expert's features, or some experts (`first_expert` and the following), whose
rows alone it computes. All that follows the choice is linear in what the ranks have, so their Y are summed, and their dX.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from fused_ops.experts import reference
from fused_ops.experts.adapters import ExpertGroup, Lora
from fused_ops.experts.rows_by_job import RowsByJob, rows_by_job
from fused_ops.launch.backend import backend_name
from fused_ops.lora.linear import Collectives
from fused_ops.lora.route import Route

_IDENTITY = Collectives()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The frozen weights of a layer's experts on this rank, and how a token's are chosen."""

    router_EH: Tensor  # of all experts
    up_EFH: Tensor  # gate over up: F is twice an expert's width
    down_EHF: Tensor
    top_k: int
    normalised: bool
    first_expert: int = 0  # of those on this rank
    before: Collectives = _IDENTITY  # around the products with `up`, as of a column-parallel linear
    after: Collectives = _IDENTITY  # and with `down`, as of a row-parallel one


Groups = tuple[ExpertGroup | None, ExpertGroup | None]  # on gate and up, and on down


def expert_mlp(
    x_TH: Tensor,
    weights: ExpertWeights,
    backend: str | None = None,
    values: bool = True,
    groups: Groups = (None, None),
    segments: Route | None = None,
) -> Tensor:
    """Return Y [T, H] of X [T, H]; adds to the near ties of `segments` the tokens whose last expert might be another.

    `groups` are the adapters of those jobs that have tokens, as `segments` says. Their gradients are added to the groups' own.
    Without `values` this is for backward alone, which does not depend on Y: it has no values, and its product is not computed.
    Nothing is counted then.
    """
    near_ties = segments if values else None
    if segments is None or not segments.segments:
        groups = (None, None)
    up, down = (group if group is not None and group.width else None for group in groups)
    if segments is not None and not segments.dropout:
        up, down = (group and group.without_dropout for group in (up, down))
    return _ExpertMlp.apply(x_TH, weights, near_ties, operators(x_TH.device, backend), values, (up, down), segments)


def operators(device: torch.device, backend: str | None = None) -> ModuleType:
    """Return the module of operators for a device: Triton kernels on CUDA, plain torch elsewhere, unless `backend` names one."""
    if backend_name(device, backend) == "reference":
        return reference
    from fused_ops.experts import fused

    return fused


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights, near_ties, ops, values, groups, segments):
        full_x = weights.before.gather_input(x_TH)
        first, logits = weights.first_expert, full_x @ weights.router_EH.t()
        choice, route = ops.choose(logits, weights.top_k, weights.normalised, near_ties, range(first, first + len(weights.up_EFH)))
        rows = rows_by_job(route, choice.expert_Tk, segments, first) if any(groups) else None
        x_RH = ops.gather(full_x, route)
        up = _lora(ops, x_RH, groups[0], rows)
        gate_up = ops.grouped(x_RH, weights.up_EFH, route, lora=up)
        del x_RH  # as all rows below: a hidden state for each expert of a token
        ctx.save_for_backward(gate_up, *([x_TH] if up else []))
        ctx.choice = replace(choice, probability_TE=None if weights.normalised else choice.probability_TE)
        ctx.weights, ctx.route, ctx.ops = weights, route, ops
        if not values and groups[1] is None:
            ctx.loras = up, None
            return x_TH.new_empty(()).expand(x_TH.shape)
        a_RF = ops.weighted_swiglu(gate_up, route)
        ctx.loras = up, down = up, _lora(ops, a_RF, groups[1], rows)
        if not values:
            return x_TH.new_empty(()).expand(x_TH.shape)
        y = ops.grouped(a_RF, weights.down_EHF, route, lora=down)
        del a_RF
        return weights.after.reduce_output(ops.combine(y, route))

    @staticmethod
    def backward(ctx, dy_TH):
        weights, route, ops = ctx.weights, ctx.route, ctx.ops
        gate_up, *kept = ctx.saved_tensors
        up, down = ctx.loras
        dy = ops.gather(weights.after.gather_grad(dy_TH).contiguous(), route)
        if down is not None:
            down = _backward(ops, dy, down)
            ops.grad_a(ops.weighted_swiglu(gate_up, route), *down)
        da = ops.grouped(dy, weights.down_EHF, route, transposed=True, lora=down)
        del dy
        d_gate_up, d_weight_R = ops.weighted_swiglu_backward(gate_up.detach(), da, route)
        del da
        if up is not None:
            up = _backward(ops, d_gate_up, up)
        dx = ops.combine(ops.grouped(d_gate_up, weights.up_EFH, route, transposed=True, lora=up), route)
        if up is not None:
            ops.grad_a(ops.gather(weights.before.gather_input(kept[0]), route), *up)
        dx.addmm_(ops.grad_choice(ctx.choice, d_weight_R, route, len(weights.router_EH), dx.dtype), weights.router_EH)
        return weights.before.reduce_grad(dx), *[None] * 6


def _lora(ops: ModuleType, x_RK: Tensor, group: ExpertGroup | None, rows: RowsByJob | None) -> Lora | None:
    """Return what adapters add to the product of X."""
    return None if group is None or rows is None else Lora(ops.down(x_RK, group, rows), group, rows)


def _backward(ops: ModuleType, dy_RN: Tensor, lora: Lora) -> Lora:
    """Add dB, and return what adapters add to dX, with dS."""
    return lora._replace(s_RW=ops.grad_s_and_b(dy_RN, *lora))
