"""The slow, obvious twin of every kernel, in plain torch: what CPU runs use and what the kernels are tested against.

Each function takes one segment at a time and touches that segment's rows alone, so a job's numbers (NaN included) never depend on
its neighbours. LoRA arithmetic is float32 in every compute dtype; S and dS are kept in the compute dtype, as the kernels keep them.
Y and dX are rounded once, after LoRA's term: added to rounded numbers, a term smaller than half a step would always be lost.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.lora.adapters import LoraGroup, padded_rank
from fused_ops.lora.dropout import keep_mask
from fused_ops.lora.fp8 import Fp8Matrix, multiply_reference
from fused_ops.lora.frozen import FrozenWeight, factors_of, operand
from fused_ops.lora.route import Route

_WIDENED = 1024  # rows of a 16-bit weight that are converted to float32 at a time


def down(x_TK: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return S [T, width] in x's dtype: c / (1 - p) (M * X) A^T of each row's job; zero where there is none."""
    s_TR = x_TK.new_zeros(x_TK.shape[0], group.width)
    for rows, adapter, module, columns, a_rows, _ in _parts(group, route):
        xd = _dropped(x_TK[rows].float(), group, route.row_keys[rows], adapter, module)
        s_TR[rows, columns] = (xd @ group.a_RK[a_rows].float().T * group.adapters.effective_scales[adapter]).to(x_TK.dtype)
    return s_TR


def up(
    x_TK: Tensor, weight_NK: Tensor | FrozenWeight, bias_N: Tensor | None, s_TR: Tensor | None,
    group: LoraGroup | None, route: Route | None, x8: Fp8Matrix | None = None,
) -> Tensor:  # fmt: skip
    """Return Y [T, N] = X W^T (+ bias) + S B^T; X is rounded here if the weight is, whatever `x8` has."""
    if s_TR is None or group is None or route is None:
        return _frozen(x_TK, weight_NK, bias_N)
    y_TN = _frozen(x_TK.float(), weight_NK, bias_N)
    for rows, _, module, columns, _, b_rows in _parts(group, route):
        start, stop = group.columns[module]
        y_TN[rows, start:stop] += s_TR[rows, columns].float() @ group.b_RN[module][b_rows].float()
    return y_TN.to(x_TK.dtype)


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] = c / (1 - p) dY B in dY's dtype, and add dB = dY^T S into the group's gradients."""
    ds_TR = torch.zeros_like(s_TR)
    for rows, adapter, module, columns, _, b_rows in _parts(group, route):
        start, stop = group.columns[module]
        dy = dy_TN[rows, start:stop].float()
        ds_TR[rows, columns] = (dy @ group.b_RN[module][b_rows].float().T * group.adapters.effective_scales[adapter]).to(ds_TR.dtype)
        group.grad_b_RN[module][b_rows] += s_TR[rows, columns].float().T @ dy
    return ds_TR


def grad_x(
    dy_TN: Tensor, weight_NK: Tensor | FrozenWeight, ds_TR: Tensor | None, group: LoraGroup | None, route: Route | None,
    dy8: Fp8Matrix | None = None,
) -> Tensor:  # fmt: skip
    """Return dX [T, K] = dY W + M * (dS A); dY is rounded here if the weight is, whatever `dy8` has."""
    if ds_TR is None or group is None or route is None:
        return _frozen_grad(dy_TN, weight_NK)
    dx_TK = _frozen_grad(dy_TN.float(), weight_NK)
    for rows, adapter, module, columns, a_rows, _ in _parts(group, route):
        product = ds_TR[rows, columns].float() @ group.a_RK[a_rows].float()
        dx_TK[rows] += _dropped(product, group, route.row_keys[rows], adapter, module)
    return dx_TK.to(dy_TN.dtype)


def grad_a(x_TK: Tensor, ds_TR: Tensor, group: LoraGroup, route: Route, after_dx: bool = False) -> None:
    """Add dA = dS^T (M * X) into the group's gradients; `after_dx` makes no difference here."""
    for rows, adapter, module, columns, a_rows, _ in _parts(group, route):
        xd = _dropped(x_TK[rows].float(), group, route.row_keys[rows], adapter, module)
        group.grad_a_RK[a_rows] += ds_TR[rows, columns].float().T @ xd


def _frozen(x_TK: Tensor, weight_NK: Tensor | FrozenWeight, bias_N: Tensor | None) -> Tensor:
    """Return X W^T (+ bias) in x's dtype."""
    bias_N = None if bias_N is None else bias_N.to(x_TK.dtype)
    matrix = operand(weight_NK, backward=False)
    if isinstance(matrix, Fp8Matrix):
        y_TN = multiply_reference(x_TK, matrix)
    elif matrix.dtype == x_TK.dtype:
        return F.linear(x_TK, matrix, bias_N)
    else:
        y_TN = torch.cat([x_TK @ block.to(x_TK.dtype).T for block in matrix.split(_WIDENED)], 1)
    return y_TN if bias_N is None else y_TN + bias_N


def _frozen_grad(dy_TN: Tensor, weight_NK: Tensor | FrozenWeight) -> Tensor:
    """Return dY W in dy's dtype."""
    matrix = operand(weight_NK, backward=True)
    if isinstance(matrix, Fp8Matrix):
        return multiply_reference(dy_TN, matrix, factors_of(weight_NK, backward=True))
    if matrix.dtype == dy_TN.dtype:
        return dy_TN @ matrix
    blocks = zip(dy_TN.split(_WIDENED, 1), matrix.split(_WIDENED), strict=True)
    return cast(Tensor, sum(dy @ block.to(dy.dtype) for dy, block in blocks))  # not 0: there is a block


def _dropped(values_TK: Tensor, group: LoraGroup, row_keys: Tensor, adapter: int, module: int) -> Tensor:
    p = group.adapters.dropouts[adapter]
    if p == 0.0:
        return values_TK
    return torch.where(keep_mask(row_keys, group.first_feature, values_TK.shape[1], module, p), values_TK, 0.0)


def _parts(group: LoraGroup, route: Route):
    """Yield (rows, adapter, module, columns of S, rows of A, rows of B) of every targeted module of every segment."""
    for first, end, adapter in route.segments:
        rank = padded_rank(group.adapters.ranks[adapter])
        for module in range(group.num_modules):
            a, b, column = group.a_rows[adapter][module], group.b_rows[adapter][module], group.s_column(adapter, module)
            if a >= 0:
                yield slice(first, end), adapter, module, slice(column, column + rank), slice(a, a + rank), slice(b, b + rank)
