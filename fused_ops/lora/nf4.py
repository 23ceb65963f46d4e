"""Matrices in 4 bits: bitsandbytes' NF4, in blocks of 64 with double quantisation; dequantised, its numbers bit for bit.

    absmax_b = max |x_i| of a block       code_i = the nearest of 16 normal quantiles to x_i / absmax_b       x_i ~ CODES[code_i] * absmax_b

Double quantisation rounds the absmax of the whole matrix, less their mean, to 8 bits in groups of 256. They are kept here as they are
after that rounding, in float32: 4.5 bits a weight. So any rows, and columns from a multiple of 64 on, can be cut out of a matrix that was
quantised whole, and linears that merge several matrices have one table. Two codes share a byte, the first in its high half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK, GROUP = 64, 256
_ROWS = 1 << 26  # elements that are quantised at a time
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (QLoRA, appendix E).
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Matrix:
    """codes [R, C / 2] uint8 and absmax [R, C / 64] float32."""

    codes: Tensor
    absmax: Tensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes of both."""
        return self.codes.nbytes + self.absmax.nbytes

    def float(self) -> Tensor:
        """Return the matrix [R, C] in float32."""
        pairs = torch.stack((self.codes >> 4, self.codes & 15), -1).flatten(1)
        blocks = table_of(self.codes.device)[pairs.long()].unflatten(1, (-1, BLOCK))
        return (blocks * self.absmax[..., None]).flatten(1)

    def part(self, rows: slice, columns: slice) -> Nf4Matrix:
        """Return a part; columns begin and end at multiples of 64 (else ValueError)."""
        first, end, _ = columns.indices(2 * self.codes.shape[1])
        if first % BLOCK or end % BLOCK:
            raise ValueError(f"columns {first} to {end} do not begin and end with a block of {BLOCK}")
        return Nf4Matrix(codes=self.codes[rows, first // 2 : end // 2], absmax=self.absmax[rows, first // BLOCK : end // BLOCK])


def quantise_nf4(x_RC: Tensor) -> Nf4Matrix:
    """Quantise a matrix [R, C] in 16 or 32 bits, C a multiple of 64 (else ValueError)."""
    if x_RC.dim() != 2 or x_RC.shape[1] % BLOCK:
        raise ValueError(f"a matrix {list(x_RC.shape)} is not made of whole rows of blocks of {BLOCK}")
    codes = torch.empty(x_RC.shape[0], x_RC.shape[1] // 2, dtype=torch.uint8, device=x_RC.device)
    absmax = torch.empty(x_RC.shape[0], x_RC.shape[1] // BLOCK, device=x_RC.device)
    table = table_of(x_RC.device)
    borders = (table[:-1] + table[1:]) / 2
    at_once = max(1, _ROWS // max(1, x_RC.shape[1]))
    for first in range(0, len(x_RC), at_once):
        rows = slice(first, first + at_once)
        blocks = x_RC[rows].float().unflatten(1, (-1, BLOCK))
        absmax[rows] = blocks.abs().amax(-1)
        scaled = blocks * (1.0 / absmax[rows].clamp(min=1e-38))[..., None]
        pairs = torch.bucketize(scaled.clamp_(-1, 1), borders, out_int32=True).to(torch.uint8).flatten(1)
        codes[rows] = pairs[:, ::2] << 4 | pairs[:, 1::2]
    return Nf4Matrix(codes=codes, absmax=_doubly(absmax))


def _doubly(absmax: Tensor) -> Tensor:
    """Return absmax as double quantisation rounds it."""
    table, mean = dynamic_codes(absmax.device), absmax.mean()
    flat = (absmax - mean).flatten()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    scaled = (groups * (1.0 / largest.clamp(min=1e-38))).clamp_(-1, 1)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
    return from_dynamic(table, codes.flatten()[: len(flat)], largest.flatten(), mean).view_as(absmax)


def from_dynamic(table: Tensor, codes: Tensor, largest: Tensor, mean: Tensor | float, first: int = 0) -> Tensor:
    """Return the absmax, flat, of their 8-bit codes from number `first` on, the largest of each group of 256, and the mean of all."""
    return table[codes.long()] * largest.repeat_interleave(GROUP)[first : first + len(codes)] + mean


@lru_cache
def table_of(device: torch.device) -> Tensor:
    """Return CODES as a float32 tensor."""
    return torch.tensor(CODES, device=device)


@lru_cache
def dynamic_codes(device: torch.device) -> Tensor:
    """Return the 256 numbers that absmax is rounded to: of each decade 10^-e a share, linear, twice as many as of the one below."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        found += (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*found, *(-x for x in found if 0 < x < 1)]), device=device)
