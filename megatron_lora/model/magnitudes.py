"""The norms that DoRA's magnitudes are measured by, computed from the frozen weight and an adapter's A and B without W + c B A.

    n^2 = ||W||^2 + sum_r B^T_r (2 c (A W^T)_r + c^2 ((A A^T) B^T)_r)        by output; float32, as in PEFT

All of it is linear in sums over the inputs. So ranks that each hold some of the inputs (row-parallel linears) add up their n^2.
A norm changes where its job takes a step, and nowhere else.

    rows = MagnitudeRows(linear, region, master, grad)
    rows.set_rows(places)                                       # the linear computes with them
    squares = rows.square_norms(0, [(0, a_RK, b_RN)], scale)    # module 0; to be summed over tensor ranks where they hold a part
    rows.set(0, [0], squares, restart=True)                     # m = n
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_ops.lora.frozen import operand
from fused_ops.lora.magnitude import Magnitudes
from megatron_lora.huggingface.architecture import MAGNITUDES
from megatron_lora.model.arena_region import Places, Region
from megatron_lora.model.linears import MultiLoraLinear

BLOCK_ROWS = 1024  # of a weight that are float32 at a time
Term = tuple[int, Tensor, Tensor]  # a module, by its index in the linear, A [r, K] and B^T [r, N] in float32


class MagnitudeRows:
    """The magnitudes of all adapters of one linear on this rank, in rows of float32 [M, N]."""

    def __init__(self, linear: MultiLoraLinear, region: Region, master: Tensor, grad: Tensor):
        """Take the linear's part of the flat buffers; each output's factor is 1 until `set`."""
        self.linear = linear
        self.geometry = region.geometry
        self.master_MN = region.magnitudes(master)
        self.is_partial = linear.parallel == "row" and region.geometry.tensor_ranks > 1  # each rank has some of the inputs
        sharded_rows = linear.parallel == "row" and linear.config.sequence_parallel
        self.factors = Magnitudes(
            rows=(),
            scale_MN=torch.ones_like(self.master_MN),
            inverse_norm_MN=torch.zeros_like(self.master_MN),
            grad_MN=region.magnitudes(grad),
            share=1 / region.geometry.tensor_ranks if self.is_partial and not sharded_rows else 1.0,
        )
        self._base_squares: Tensor | None = None

    def set_rows(self, places: Sequence[Places]) -> None:
        """Let the linear compute with the magnitudes of the adapters, by adapter row, that have some and target one of its modules."""
        own = [MAGNITUDES in of_row and not of_row.keys().isdisjoint(self.geometry.modules) for of_row in places]
        rows = tuple(of_row[MAGNITUDES][0] if has else -1 for of_row, has in zip(places, own, strict=True))
        self.linear.magnitudes = dataclasses.replace(self.factors, rows=rows) if any(own) else None

    def square_norms(self, terms: Sequence[Term], scale: float) -> Tensor:
        """Return n^2 of W + scale B A, [N], or this rank's part of it; ||W||^2 where no module is named."""
        if self._base_squares is None:
            self._base_squares = torch.cat([block.square().sum(1) for _, block in self._blocks(0, self.geometry.columns[-1][1])])
        squares = self._base_squares.clone()
        for module, a_RK, b_RN in terms:
            gram_RR = a_RK @ a_RK.T
            start, stop = self.geometry.columns[module]
            for first, block in self._blocks(start, stop):
                b = b_RN[:, first - start : first - start + len(block)]
                squares[first : first + len(block)] += (b * (2 * scale * (a_RK @ block.T) + scale**2 * (gram_RR @ b))).sum(0)
        return squares

    def set(self, row: int, modules: Sequence[int], squares: Tensor, restart: bool) -> None:
        """Set the factors of a row of magnitudes from n^2 of all inputs; with `restart` its magnitudes become the norms first."""
        self.reset(row)
        inverse, scale = self.factors.inverse_norm_MN[row], self.factors.scale_MN[row]
        for module in modules:
            of = slice(*self.geometry.columns[module])
            norms = squares[of].clamp(min=0.0).sqrt()
            if restart:
                self.master_MN[row, of] = norms
            inverse[of] = 1.0 / norms
            scale[of] = self.master_MN[row, of] / norms

    def reset(self, row: int) -> None:
        """Let a row of magnitudes leave all outputs as they are: of an adapter that the linear has not in this layer."""
        self.factors.inverse_norm_MN[row].zero_()
        self.factors.scale_MN[row].fill_(1.0)

    def move(self, row: int, to: int) -> None:
        """Let another row compute as this one does."""
        for table in (self.factors.scale_MN, self.factors.inverse_norm_MN):
            table[to] = table[row]

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows [n, K] in float32) of the weight's rows `start` to `stop`."""
        matrix = operand(self.linear.stored_weight, backward=False)
        for first in range(start, stop, BLOCK_ROWS):
            of = slice(first, min(first + BLOCK_ROWS, stop))
            if isinstance(matrix, Tensor):
                yield first, matrix[of].float()
            else:
                yield first, matrix.values[of].float() * matrix.scales[of, None]
