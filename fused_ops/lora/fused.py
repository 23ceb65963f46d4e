"""The GPU's operators, under the names of fused_ops.lora.reference, each by the kernel that fits: what `linear.py` calls on CUDA."""

from typing import TYPE_CHECKING

from torch import Tensor

from fused_ops.launch.cache_keys import fix_cache_keys
from fused_ops.launch.shapes import suits_hopper
from fused_ops.launch.triton_version import compiles_gluon
from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.fp8 import Fp8Matrix, parts, quantise_rows
from fused_ops.lora.frozen import FrozenWeight, factors_of, operand
from fused_ops.lora.route import Route
from fused_ops.lora.triton import grad as lora_grad
from fused_ops.lora.triton.down import down
from fused_ops.lora.triton.gemm import gemm
from fused_ops.lora.triton.grad import grad_a

if TYPE_CHECKING or compiles_gluon():  # else `suits_hopper` is never true, and a Triton that is not known may fail to import them
    from fused_ops.lora.hopper.gemm import hopper_gemm
    from fused_ops.lora.hopper.grad_sb import MAX_HOPPER_RANK, hopper_grad_s_and_b

__all__ = ["down", "grad_a", "grad_s_and_b", "grad_x", "up"]

fix_cache_keys()


def grad_s_and_b(dy_TN: Tensor, s_TR: Tensor, group: LoraGroup, route: Route) -> Tensor:
    """Return dS [T, width] = c' dY B (unwritten where there is no adapter), and add dB = dY^T S into the group's gradients."""
    if suits_hopper(dy_TN, s_TR) and group.max_padded_rank <= MAX_HOPPER_RANK:
        return hopper_grad_s_and_b(dy_TN, s_TR, group, route)
    return lora_grad.grad_s_and_b(dy_TN, s_TR, group, route)


def up(
    x_TK: Tensor, weight_NK: Tensor | FrozenWeight, bias_N: Tensor | None, s_TR: Tensor | None,
    group: LoraGroup | None, route: Route | None, x8: Fp8Matrix | None = None,
) -> Tensor:  # fmt: skip
    """Return Y [T, N] = X W^T (+ bias) + S B^T; `x8`: X in 8 bits, if a neighbour has rounded it."""
    return _gemm(x_TK, x8, weight_NK, bias_N, s_TR, group, route, backward=False)


def grad_x(
    dy_TN: Tensor, weight_NK: Tensor | FrozenWeight, ds_TR: Tensor | None, group: LoraGroup | None, route: Route | None,
    dy8: Fp8Matrix | None = None,
) -> Tensor:  # fmt: skip
    """Return dX [T, K] = dY W + M * (dS A); `dy8`: dY in 8 bits, if a neighbour has rounded it."""
    return _gemm(dy_TN, dy8, weight_NK, None, ds_TR, group, route, backward=True)


def _gemm(x_TI: Tensor, x8: Fp8Matrix | None, weight: Tensor | FrozenWeight, bias_O, s_TR, group, route, backward: bool) -> Tensor:
    """Return the product by the kernel that fits; over a weight in 8 bits X is rounded, if no neighbour has."""
    matrix, factors = operand(weight, backward), factors_of(weight, backward)
    x8 = None if factors is not None else x8
    operands = (x8 or quantise_rows(x_TI, "triton", factors) if isinstance(matrix, Fp8Matrix) else x_TI, matrix)
    if s_TR is not None and suits_hopper(s_TR, *(parts(each)[0] for each in operands), *((group.a_RK,) if backward else group.b_RN)):
        return hopper_gemm(*operands, bias_O, s_TR, group, route, backward)
    return gemm(*operands, bias_O, s_TR, group, route, backward, x_TI.dtype)
