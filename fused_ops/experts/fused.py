"""The GPU's operators of the experts, under the names of experts/reference.py: what layer.py calls on CUDA."""

import torch
from torch import Tensor

from fused_ops.experts import kernels, lora_kernels
from fused_ops.experts.adapters import A_ROW, B_ROW, ExpertGroup
from fused_ops.experts.grouped import grouped
from fused_ops.experts.route import BLOCK, NEAR, TOKENS, Choice, ExpertRoute, most_tiles
from fused_ops.experts.rows_by_job import BLOCK_ROWS, RowsByJob
from fused_ops.launch.cache_keys import fix_cache_keys
from fused_ops.launch.shapes import cdiv, power_of_2, rank_class
from fused_ops.lora.route import Route

__all__ = [
    "choose",
    "combine",
    "down",
    "gather",
    "grad_a",
    "grad_choice",
    "grad_s_and_b",
    "grouped",
    "weighted_swiglu",
    "weighted_swiglu_backward",
]

_COLUMNS = 2048  # of a row at a time

fix_cache_keys()


def _block(num_cols: int) -> int:
    return min(_COLUMNS, power_of_2(num_cols))


def choose(
    logits_TE: Tensor, top_k: int, normalised: bool, near_ties: Route | None = None, own: range | None = None
) -> tuple[Choice, ExpertRoute]:
    """Return the experts of each token, and its rows at the rank's `own` experts (None: all).

    Adds to the `near_ties` of a route the tokens whose last expert might be another.
    """
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    width, num_blocks = power_of_2(num_experts), cdiv(num_tokens, TOKENS)
    probability, weight = (logits_TE.new_empty(num_tokens, columns, dtype=torch.float32) for columns in (num_experts, top_k))
    expert, counts = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((num_tokens, top_k), (num_blocks, width)))
    counted = (near_ties.near_ties, near_ties.segment_of_row) if near_ties is not None and top_k < num_experts else (None, None)
    if num_tokens:
        kernels.expert_choose_kernel[(num_blocks,)](
            logits_TE, probability, expert, weight, counts, *counted, num_tokens, num_experts, NEAR,
            TOP_K=top_k, NORMALISED=normalised, BT=TOKENS, BE=width, BK=power_of_2(top_k),
        )  # fmt: skip
    choice = Choice(probability_TE=probability, expert_Tk=expert, weight_Tk=weight)
    return choice, _route_of(choice, counts, num_experts, range(num_experts) if own is None else own)


def _route_of(choice: Choice, counts: Tensor, num_experts: int, own: range) -> ExpertRoute:
    """Order rows of own experts by expert, then by token; `counts` are those of each block of tokens, and are overwritten."""
    (num_tokens, top_k), (num_blocks, width) = choice.expert_Tk.shape, counts.shape
    most = most_tiles(num_tokens * top_k, len(own))
    first, tiles = counts.new_empty(len(own) + 1), counts.new_empty(most + 1, 3)
    place, weight = torch.empty_like(choice.expert_Tk), choice.weight_Tk.new_empty(num_tokens * top_k)
    kernels.expert_first_rows_kernel[(1,)](
        counts, first, tiles, num_blocks, own.start, len(own), most, BLOCK=BLOCK, BB=64, BE=width, num_warps=8
    )
    if num_tokens:
        kernels.expert_place_kernel[(num_blocks,)](
            choice.expert_Tk, choice.weight_Tk, counts, place, weight, num_tokens, own.start, len(own), TOP_K=top_k, BT=TOKENS, BE=width
        )
    return ExpertRoute(weight_R=weight, place_Tk=place, first_E=first, end=first[-1:] if len(own) < num_experts else None, tiles=tiles)


def grad_choice(choice: Choice, d_weight_R: Tensor, route: ExpertRoute, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the logits, [T, E]; normalised weights are a softmax over the chosen experts alone."""
    num_tokens, top_k = choice.expert_Tk.shape
    out = torch.empty(num_tokens, num_experts, dtype=dtype, device=d_weight_R.device)
    if num_tokens:
        kernels.expert_grad_choice_kernel[(cdiv(num_tokens, TOKENS),)](
            d_weight_R, route.place_Tk, choice.expert_Tk, choice.weight_Tk, choice.probability_TE, out, num_tokens, num_experts,
            TOP_K=top_k, NORMALISED=choice.probability_TE is None, BT=TOKENS, BE=power_of_2(num_experts),
        )  # fmt: skip
    return out


def gather(x_TH: Tensor, route: ExpertRoute) -> Tensor:
    """Return each row's token, [R, H]."""
    (num_tokens, num_cols), top_k = x_TH.shape, route.place_Tk.shape[1]
    out = x_TH.new_empty(num_tokens * top_k, num_cols)
    if num_tokens:
        kernels.expert_gather_kernel[(num_tokens,)](x_TH, route.place_Tk, out, num_cols, TOP_K=top_k, BLOCK=_block(num_cols))
    return out


def combine(y_RH: Tensor, route: ExpertRoute) -> Tensor:
    """Return the sum of each token's rows, in float32 and in the order of its experts, [T, H]."""
    (num_tokens, top_k), num_cols = route.place_Tk.shape, y_RH.shape[1]
    out, block = y_RH.new_empty(num_tokens, num_cols), _block(num_cols)
    num_blocks = cdiv(num_cols, block)
    if num_tokens:
        kernels.expert_combine_kernel[(num_tokens * num_blocks,)](y_RH, route.place_Tk, out, num_cols, num_blocks, TOP_K=top_k, BLOCK=block)
    return out


def weighted_swiglu(gate_up_RF: Tensor, route: ExpertRoute) -> Tensor:
    """Return silu(gate) * up times each row's weight."""
    num_rows, num_cols = len(gate_up_RF), gate_up_RF.shape[1] // 2
    y = gate_up_RF.new_empty(num_rows, num_cols)
    if num_rows:
        kernels.expert_swiglu_kernel[(num_rows,)](gate_up_RF, route.weight_R, y, route.end, num_cols, BLOCK=_block(num_cols))
    return y


def weighted_swiglu_backward(gate_up_RF: Tensor, dy: Tensor, route: ExpertRoute) -> tuple[Tensor, Tensor]:
    """Return the gradients of [gate | up], written over it, and of the weights, float32 [R]."""
    num_rows, num_cols = dy.shape
    d_weight = torch.empty_like(route.weight_R)
    if num_rows:
        kernels.expert_swiglu_backward_kernel[(num_rows,)](
            dy, gate_up_RF, route.weight_R, d_weight, route.end, num_cols, BLOCK=_block(num_cols)
        )
    return gate_up_RF, d_weight


def down(x_RK: Tensor, group: ExpertGroup, rows: RowsByJob) -> Tensor:
    """Return S [R, width] in x's dtype: c / (1 - p) (M * X) A^T of each row's expert and job; zero where there is none."""
    s_RW = x_RK.new_zeros(len(x_RK), group.width)
    _down(x_RK, group.a_ERK, s_RW, group, rows, A_ROW, 0, group.num_modules, 0, any(group.adapters.thresholds))
    return s_RW


def grad_s_and_b(dy_RN: Tensor, s_RW: Tensor, group: ExpertGroup, rows: RowsByJob) -> Tensor:
    """Return dS [R, width] = c / (1 - p) dY B in dY's dtype, and add dB = dY^T S into the group's gradients."""
    ds_RW = torch.zeros_like(s_RW)
    for module, (start, _) in enumerate(group.columns):
        _down(dy_RN, group.b_ERN[module], ds_RW, group, rows, B_ROW, module, 1, start, False)
        _grad(dy_RN, s_RW, group.grad_b_ERN[module], group, rows, B_ROW, module, 1, start, False)
    return ds_RW


def grad_a(x_RK: Tensor, ds_RW: Tensor, group: ExpertGroup, rows: RowsByJob) -> None:
    """Add dA = dS^T (M * X) into the group's gradients."""
    _grad(x_RK, ds_RW, group.grad_a_ERK, group, rows, A_ROW, 0, group.num_modules, 0, any(group.adapters.thresholds))


def _down(
    x: Tensor, factor: Tensor, out: Tensor, group: ExpertGroup, rows: RowsByJob,
    field: int, module: int, modules: int, start: int, drop: bool,
) -> None:  # fmt: skip
    blocks = rows.blocks
    if len(x):
        lora_kernels.expert_down_kernel[(len(blocks),)](
            x, factor, out, rows.keys_R, blocks, rows.segments, group.adapter_table, group.scale_table,
            len(rows.segments), factor.shape[2], x.stride(0), start, factor.stride(0), out.shape[1], group.max_rank, group.first_feature,
            FIELD=field, MODULE=module, MODULES=modules, R=rank_class(group.max_rank), DROPOUT=drop, BM=BLOCK_ROWS, BK=64,
        )  # fmt: skip


def _grad(
    x: Tensor, s_RW: Tensor, grad: Tensor, group: ExpertGroup, rows: RowsByJob,
    field: int, module: int, modules: int, start: int, drop: bool,
) -> None:  # fmt: skip
    num_cols = grad.shape[2]
    if len(x):
        lora_kernels.expert_grad_kernel[(rows.bounds[..., 0].numel(), cdiv(num_cols, 128))](
            x, s_RW, grad, rows.keys_R, rows.bounds, rows.segments, group.adapter_table,
            len(rows.segments), num_cols, x.stride(0), start, grad.stride(0), s_RW.shape[1], group.max_rank, group.first_feature,
            FIELD=field, MODULE=module, MODULES=modules, R=rank_class(group.max_rank), DROPOUT=drop, BM=BLOCK_ROWS, BN=128,
        )  # fmt: skip
