"""DoRA's magnitudes: what a linear's outputs are multiplied by for the rows of some adapters (Liu et al. 2024, arXiv 2402.09353).

    Y' = g (Y - bias) + bias        g = m / ||W + c B A||, a number for each output; the norm counts as a constant in backward
    dY = g dY'                      dm = sum over rows of dY' (Y - bias) / ||W + c B A||

It follows the linear's own product, after its reduction over tensor ranks, on the rows of such adapters alone. A microbatch that has none
of them never comes here. What it keeps for backward is Y - bias of these rows. Plain torch for every device. It works on blocks of
rows, of which backward has a copy in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.lora.route import Route

BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Magnitudes:
    """The magnitudes of a linear's adapters, in rows of float32 [M, N]; `rows` is by adapter, -1 of one that has none.

    scale_MN is g, and 1 where a module is not targeted; inverse_norm_MN is 1 / ||W + c B A||, and 0 there. Backward adds `share`
    of dm into grad_MN: of several ranks that have the same rows each adds its part.
    """

    rows: tuple[int, ...]
    scale_MN: Tensor
    inverse_norm_MN: Tensor
    grad_MN: Tensor
    share: float = 1.0

    def blocks(self, route: Route | None) -> list[tuple[int, int, int]]:
        """Return (first row, end row, magnitude row) of each block of a route that has magnitudes."""
        return [
            (start, min(start + BLOCK_ROWS, end), self.rows[adapter])
            for first, end, adapter in (() if route is None else route.segments)
            if self.rows[adapter] >= 0
            for start in range(first, end, BLOCK_ROWS)
        ]


def scale_outputs(y_TN: Tensor, bias_N: Tensor | None, magnitudes: Magnitudes, route: Route) -> Tensor:
    """Scale the rows of a linear's output whose adapters have magnitudes, in place; `bias_N` is what the output already holds."""
    return _Scaled.apply(y_TN, bias_N, magnitudes, magnitudes.blocks(route))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TN, bias_N, magnitudes, blocks):
        ctx.mark_dirty(y_TN)
        ctx.magnitudes, ctx.blocks, ctx.kept = magnitudes, blocks, []
        for first, end, row in blocks:
            y, scale = y_TN[first:end], magnitudes.scale_MN[row]
            product = y if bias_N is None else y.float() - bias_N.float()
            if ctx.needs_input_grad[0]:
                ctx.kept.append(product.clone() if bias_N is None else product.to(y.dtype))
            if bias_N is None:
                y.mul_(scale)
            else:
                y.copy_(product * scale + bias_N.float())
        return y_TN

    @staticmethod
    def backward(ctx, dy_TN):
        of, d_product = ctx.magnitudes, dy_TN.clone()  # others may read dY
        for (first, end, row), product in zip(ctx.blocks, ctx.kept, strict=True):
            dy = d_product[first:end]
            of.grad_MN[row] += product.float().mul_(dy).sum(0) * of.inverse_norm_MN[row] * of.share  # over what was kept, in float32
            dy.mul_(of.scale_MN[row])
        ctx.kept = []  # the graph outlives this
        return d_product, None, None, None
