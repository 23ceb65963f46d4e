"""The GPU's operators of the experts, under the names of experts/reference.py: what layer.py calls on CUDA."""

import torch
from torch import Tensor

from fused_ops.experts import kernels
from fused_ops.experts.grouped import grouped
from fused_ops.experts.route import BLOCK, NEAR, Choice, ExpertRoute, most_tiles
from fused_ops.launch.cache_keys import fix_cache_keys
from fused_ops.launch.optional_triton import triton

__all__ = ["choose", "combine", "gather", "grouped", "make_route", "weighted_swiglu", "weighted_swiglu_backward"]

_TOKENS = 8  # of a program that chooses their experts
_TILES = 32  # of a program that writes their table
_ROWS = 1024  # of a program that writes where they lie
_COLUMNS = 2048  # of a row at a time

fix_cache_keys()


def choose(logits_TE: Tensor, top_k: int, normalised: bool) -> tuple[Choice, Tensor]:
    """Return the experts of each token, and which tokens' last one might be another."""
    num_tokens, num_experts = logits_TE.shape
    probability, weight = (logits_TE.new_empty(num_tokens, columns, dtype=torch.float32) for columns in (num_experts, top_k))
    expert, near = (logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32), logits_TE.new_empty(num_tokens, dtype=torch.int8))
    if num_tokens:
        kernels.choose_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
            logits_TE, probability, expert, weight, near, num_tokens, num_experts, NEAR, TOP_K=top_k, NORMALISED=normalised,
            BT=_TOKENS, BE=triton.next_power_of_2(num_experts), BK=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return Choice(probability_TE=probability, expert_Tk=expert, weight_Tk=weight), near


def make_route(choice: Choice, num_experts: int) -> ExpertRoute:
    """Order rows by expert, then by token."""
    (num_tokens, top_k), device = choice.expert_Tk.shape, choice.expert_Tk.device
    num_rows, most = num_tokens * top_k, most_tiles(num_tokens * top_k, num_experts)
    experts, order = torch.sort(choice.expert_Tk.flatten().to(torch.int16), stable=True)
    numbers = torch.arange(num_experts + 1, dtype=torch.int16, device=device)
    first = torch.searchsorted(experts, numbers, out_int32=True)
    token, place = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    weight, tiles = token.new_empty(num_rows, dtype=torch.float32), token.new_empty(most + 1, 3)
    if num_rows:
        kernels.place_kernel[(triton.cdiv(num_rows, _ROWS),)](
            order, choice.weight_Tk, token, weight, place, num_rows, TOP_K=top_k, BR=_ROWS
        )
    kernels.tiles_kernel[(triton.cdiv(most, _TILES),)](
        first, tiles, num_experts, most, BLOCK=BLOCK, BT=_TILES, BE=triton.next_power_of_2(num_experts)
    )
    return ExpertRoute(token_R=token, weight_R=weight, place_Tk=place.view(num_tokens, top_k), first_E=first, tiles=tiles)


def gather(x_TH: Tensor, route: ExpertRoute) -> Tensor:
    """Return each row's token, [R, H]."""
    return x_TH.index_select(0, route.token_R)


def combine(y_RH: Tensor, route: ExpertRoute) -> Tensor:
    """Return the sum of each token's rows, in float32 and in the order of its experts, [T, H]."""
    (num_tokens, top_k), num_cols = route.place_Tk.shape, y_RH.shape[1]
    out, block = y_RH.new_empty(num_tokens, num_cols), min(_COLUMNS, triton.next_power_of_2(num_cols))
    num_blocks = triton.cdiv(num_cols, block)
    if num_tokens:
        kernels.combine_kernel[(num_tokens * num_blocks,)](y_RH, route.place_Tk, out, num_cols, num_blocks, TOP_K=top_k, BLOCK=block)
    return out


def weighted_swiglu(gate_up_RF: Tensor, route: ExpertRoute) -> Tensor:
    """Return silu(gate) * up times each row's weight."""
    num_rows, num_cols = len(gate_up_RF), gate_up_RF.shape[1] // 2
    y = gate_up_RF.new_empty(num_rows, num_cols)
    if num_rows:
        kernels.swiglu_kernel[(num_rows,)](gate_up_RF, route.weight_R, y, num_cols, BLOCK=min(_COLUMNS, triton.next_power_of_2(num_cols)))
    return y


def weighted_swiglu_backward(gate_up_RF: Tensor, dy: Tensor, route: ExpertRoute) -> tuple[Tensor, Tensor]:
    """Return the gradients of [gate | up], written over it, and of the weights, float32 [R]."""
    num_rows, num_cols = dy.shape
    d_weight = torch.empty_like(route.weight_R)
    if num_rows:
        kernels.swiglu_backward_kernel[(num_rows,)](
            dy, gate_up_RF, route.weight_R, d_weight, num_cols, BLOCK=min(_COLUMNS, triton.next_power_of_2(num_cols))
        )
    return gate_up_RF, d_weight
