"""A mixture of frozen experts in place of a layer's MLP: the autograd.Function that connects the operators.

    p = softmax(x R^T)         the k largest are the token's experts e_1, ..., e_k, with weights w_j = p_j, or p_j over their sum
    y = sum_j w_j D_e (silu(G_e x) * (U_e x)),  e = e_j

No expert has a capacity, so no token is dropped. A row is a token at one of its experts; rows are ordered by expert, then by token, so
that of an expert those of a job lie together. How many rows an expert has stays on the device. A row's numbers depend on nothing but its
token and its expert: products sum over features in one order, a token's experts are summed in the order of their probabilities, and
nothing is added atomically. A token of NaN has the first k experts.

    forward    rows of X gathered; [gate | up] = X U^T; a = w silu(gate) up; Y = a D^T, summed over a token's experts
    backward   rows of dY gathered; da = dY D; dw = da . silu(gate) up; dX = d[gate | up] U, summed likewise; through p to x

Kept for backward: [gate | up] of every row, whose memory backward overwrites, the choice, and where normalisation does not make them
superfluous the probabilities. Tensor ranks have a part of every expert's features, and the whole router.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from fused_ops.experts import reference
from fused_ops.launch.backend import backend_name
from fused_ops.lora.linear import Collectives

_IDENTITY = Collectives()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The frozen weights of a layer's E experts on this rank, and how a token's are chosen."""

    router_EH: Tensor
    up_EFH: Tensor  # gate over up: F is twice an expert's width
    down_EHF: Tensor
    top_k: int
    normalised: bool
    before: Collectives = _IDENTITY  # around the products with `up`, as of a column-parallel linear
    after: Collectives = _IDENTITY  # and with `down`, as of a row-parallel one


def expert_mlp(
    x_TH: Tensor, weights: ExpertWeights, near_ties: Tensor | None = None, backend: str | None = None, values: bool = True
) -> Tensor:
    """Return Y [T, H] of X [T, H]; adds to `near_ties`, an integer of one element, the tokens whose last expert might be another.

    Without `values` this is for backward alone, which does not depend on Y: it has no values, and its product is not computed.
    """
    return _ExpertMlp.apply(x_TH, weights, near_ties, operators(x_TH.device, backend), values)


def operators(device: torch.device, backend: str | None = None) -> ModuleType:
    """Return the module of operators for a device: Triton kernels on CUDA, plain torch elsewhere, unless `backend` names one."""
    if backend_name(device, backend) == "reference":
        return reference
    from fused_ops.experts import fused

    return fused


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights, near_ties, ops, values):
        full_x = weights.before.gather_input(x_TH)
        choice, route = ops.choose(full_x @ weights.router_EH.t(), weights.top_k, weights.normalised, near_ties)
        gate_up = ops.grouped(ops.gather(full_x, route), weights.up_EFH, route)
        ctx.save_for_backward(gate_up)
        ctx.choice = replace(choice, probability_TE=None if weights.normalised else choice.probability_TE)
        ctx.weights, ctx.route, ctx.ops = weights, route, ops
        if not values:
            return x_TH.new_empty(()).expand(x_TH.shape)
        y = ops.grouped(ops.weighted_swiglu(gate_up, route), weights.down_EHF, route)
        return weights.after.reduce_output(ops.combine(y, route))

    @staticmethod
    def backward(ctx, dy_TH):
        weights, route, ops = ctx.weights, ctx.route, ctx.ops
        (gate_up,) = ctx.saved_tensors
        dy = weights.after.gather_grad(dy_TH).contiguous()
        d_gate_up, d_weight_R = ops.weighted_swiglu_backward(
            gate_up.detach(), ops.grouped(ops.gather(dy, route), weights.down_EHF, route, transposed=True), route
        )
        dx = ops.combine(ops.grouped(d_gate_up, weights.up_EFH, route, transposed=True), route)
        dx.addmm_(ops.grad_choice(ctx.choice, d_weight_R, route, len(weights.router_EH), dx.dtype), weights.router_EH)
        return weights.before.reduce_grad(dx), None, None, None, None
