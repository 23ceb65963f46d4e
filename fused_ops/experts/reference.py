"""The operators of experts/layer.py in plain torch: what CPU runs use, and what the kernels are compared with.

A grouped product multiplies TILE rows of one expert at a time, the last ones filled up with zeros, so that a row's sums are the same
wherever it lies and whatever lies beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.experts.adapters import ExpertGroup, Lora
from fused_ops.experts.route import NEAR, Choice, ExpertRoute
from fused_ops.experts.rows_by_job import RowsByJob
from fused_ops.launch.backend import gradients
from fused_ops.lora.dropout import keep_mask
from fused_ops.lora.route import Route

TILE = 16


def choose(
    logits_TE: Tensor, top_k: int, normalised: bool, near_ties: Route | None = None, own: range | None = None
) -> tuple[Choice, ExpertRoute]:
    """Return the experts of each token, and its rows at the rank's `own` experts (None: all).

    Adds to the `near_ties` of a route the tokens whose last expert might be another.
    """
    probability = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    values, order = torch.sort(probability, dim=-1, descending=True, stable=True)  # NaN is the largest, and all are equal
    weight = values[:, :top_k]
    if near_ties is not None and top_k < values.shape[1]:
        near = values[:, top_k - 1] - values[:, top_k] < NEAR
        near_ties.near_ties.index_add_(0, near_ties.segment_of_row, near.long())
    weight = weight / weight.sum(-1, keepdim=True) if normalised else weight.contiguous()
    choice = Choice(probability_TE=probability, expert_Tk=order[:, :top_k].contiguous(), weight_Tk=weight)
    return choice, route_of(choice, range(logits_TE.shape[1]) if own is None else own)


def route_of(choice: Choice, own: range) -> ExpertRoute:
    """Order rows of a rank's experts by expert, then by token."""
    expert = choice.expert_Tk.flatten() - own.start
    expert = torch.where((expert >= 0) & (expert < len(own)), expert, len(own))  # those of other ranks lie behind
    experts, order = torch.sort(expert, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return ExpertRoute(
        weight_R=choice.weight_Tk.flatten()[order],
        place_Tk=torch.where(expert < len(own), place, -1).view_as(choice.expert_Tk),
        first_E=torch.searchsorted(experts, torch.arange(len(own) + 1, device=order.device)),
    )


def grad_choice(choice: Choice, d_weight_R: Tensor, route: ExpertRoute, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the logits, [T, E]; normalised weights are a softmax over the chosen experts alone."""
    d_weight_Tk = torch.where(route.place_Tk < 0, 0.0, d_weight_R[route.place_Tk])
    zeros, experts = d_weight_Tk.new_zeros(len(d_weight_Tk), num_experts), choice.expert_Tk.long()
    probability = zeros.scatter(1, experts, choice.weight_Tk) if choice.probability_TE is None else choice.probability_TE
    d_probability = zeros.scatter(1, experts, d_weight_Tk)
    return (probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True))).to(dtype)


def gather(x_TH: Tensor, route: ExpertRoute) -> Tensor:
    """Return each row's token, [R, H]."""
    rows = x_TH.new_empty(route.place_Tk.numel() + 1, x_TH.shape[1])  # the last one is for rows of other ranks
    rows[route.place_Tk] = x_TH[:, None]
    return rows[:-1]


def grouped(x_RI: Tensor, weight_EOI: Tensor, route: ExpertRoute, transposed: bool = False, lora: Lora | None = None) -> Tensor:
    """Return each row times the matrix of its expert, X W^T, plus S B^T; `transposed`: X W plus M * (dS A), of X [R, O]."""
    if lora is not None:  # rounded once, as in lora/reference.py
        out = grouped(x_RI.float(), weight_EOI.float(), route, transposed)
        for rows, expert, adapter, module, columns, a_rows, b_rows in _parts(lora.group, lora.rows):
            if transposed:
                product = lora.s_RW[rows, columns].float() @ lora.group.a_ERK[expert, a_rows].float()
                out[rows] += _dropped(product, lora.group, lora.rows.keys_R[rows], adapter, module)
            else:
                start, stop = lora.group.columns[module]
                out[rows, start:stop] += lora.s_RW[rows, columns].float() @ lora.group.b_ERN[module][expert, b_rows].float()
        return out.to(x_RI.dtype)
    weights = weight_EOI if transposed else weight_EOI.transpose(1, 2)
    out = x_RI.new_empty(len(x_RI), weights.shape[2])
    first = route.first_E.tolist()
    for expert, (start, end) in enumerate(zip(first, first[1:], strict=False)):
        for row in range(start, end, TILE):
            rows = x_RI[row : min(row + TILE, end)]
            out[row : row + len(rows)] = (F.pad(rows, (0, 0, 0, TILE - len(rows))) @ weights[expert])[: len(rows)]
    return out


def combine(y_RH: Tensor, route: ExpertRoute) -> Tensor:
    """Return the sum of each token's rows, in float32 and in the order of its experts, [T, H]."""
    total = y_RH.new_zeros(len(route.place_Tk), y_RH.shape[1], dtype=torch.float32)
    for place in route.place_Tk.unbind(1):
        total += torch.where((place < 0)[:, None], 0.0, y_RH[place])
    return total.to(y_RH.dtype)


def weighted_swiglu(gate_up_RF: Tensor, route: ExpertRoute) -> Tensor:
    """Return silu(gate) * up times each row's weight."""
    return _weighted(gate_up_RF, route.weight_R).to(gate_up_RF.dtype)


def weighted_swiglu_backward(gate_up_RF: Tensor, dy: Tensor, route: ExpertRoute) -> tuple[Tensor, Tensor]:
    """Return the gradients of [gate | up], written over it, and of the weights, float32 [R]."""
    _, (d_gate_up, d_weight) = gradients(lambda *x: (_weighted(*x),), (gate_up_RF.float(), route.weight_R), (dy.float(),))
    return gate_up_RF.copy_(d_gate_up), d_weight


def _weighted(gate_up_RF: Tensor, weight_R: Tensor) -> Tensor:
    gate, up = gate_up_RF.float().chunk(2, dim=-1)
    return F.silu(gate) * up * weight_R[:, None]


def down(x_RK: Tensor, group: ExpertGroup, rows: RowsByJob) -> Tensor:
    """Return S [R, width] in x's dtype: c / (1 - p) (M * X) A^T of each row's expert and job; zero where there is none."""
    s_RW = x_RK.new_zeros(len(x_RK), group.width)
    for of_stretch, expert, adapter, module, columns, a_rows, _ in _parts(group, rows):
        xd = _dropped(x_RK[of_stretch].float(), group, rows.keys_R[of_stretch], adapter, module)
        s_RW[of_stretch, columns] = (xd @ group.a_ERK[expert, a_rows].float().T * group.adapters.effective_scales[adapter]).to(x_RK.dtype)
    return s_RW


def grad_s_and_b(dy_RN: Tensor, s_RW: Tensor, group: ExpertGroup, rows: RowsByJob) -> Tensor:
    """Return dS [R, width] = c / (1 - p) dY B in dY's dtype, and add dB = dY^T S into the group's gradients."""
    ds_RW = torch.zeros_like(s_RW)
    for of_stretch, expert, adapter, module, columns, _, b_rows in _parts(group, rows):
        start, stop = group.columns[module]
        dy = dy_RN[of_stretch, start:stop].float()
        b_rn = group.b_ERN[module][expert, b_rows].float()
        ds_RW[of_stretch, columns] = (dy @ b_rn.T * group.adapters.effective_scales[adapter]).to(ds_RW.dtype)
        group.grad_b_ERN[module][expert, b_rows] += s_RW[of_stretch, columns].float().T @ dy
    return ds_RW


def grad_a(x_RK: Tensor, ds_RW: Tensor, group: ExpertGroup, rows: RowsByJob) -> None:
    """Add dA = dS^T (M * X) into the group's gradients."""
    for of_stretch, expert, adapter, module, columns, a_rows, _ in _parts(group, rows):
        xd = _dropped(x_RK[of_stretch].float(), group, rows.keys_R[of_stretch], adapter, module)
        group.grad_a_ERK[expert, a_rows] += ds_RW[of_stretch, columns].float().T @ xd


def _dropped(values_RK: Tensor, group: ExpertGroup, keys_R: Tensor, adapter: int, module: int) -> Tensor:
    p = group.adapters.dropouts[adapter]
    return torch.where(keep_mask(keys_R, group.first_feature, values_RK.shape[1], module, p), values_RK, 0.0) if p else values_RK


def _parts(group: ExpertGroup, rows: RowsByJob):
    """Yield (rows, expert, adapter, module, columns of S, rows of A, rows of B) of every targeted module of every stretch with rows."""
    for expert, of_segments in enumerate(rows.bounds.tolist()):
        for adapter, (first, end) in zip(rows.adapters, of_segments, strict=True):
            r = group.adapters.ranks[adapter]
            for module, (a, b) in enumerate(zip(group.a_rows[adapter], group.b_rows[adapter], strict=True)):
                if a >= 0 and end > first:
                    column = module * group.max_rank
                    yield slice(first, end), expert, adapter, module, slice(column, column + r), slice(a, a + r), slice(b, b + r)
