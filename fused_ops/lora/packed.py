"""Frozen weights that are stored in fewer bits than they are multiplied in: one copy, unpacked for each product into one scratch.

    stored         products in 16 bits (either direction)     X W^T in 8 bits                   dY W in 8 bits
    Fp8Matrix      values * scales                            as it is stored                   the transpose [K, N]
    Nf4Matrix      CODES[codes] * absmax                      rounded, 2^e_n for row n          the transpose [K, N], rounded

Operands in 8 bits have to lie along the reduced dimension, so dY W needs the transpose, whose scales are by inputs. All have the largest
of the rows' powers of two: values are multiplied by 2^(e_n - largest), which changes no digit of a value unless it is 2^14 times smaller
than the largest of the matrix. Where stored scales are no powers of two (checkpoints of others), dY's columns are multiplied by what is
left of them, 1 to 2, before dY is rounded. So both directions multiply the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.launch.backend import backend_name
from fused_ops.lora.fp8 import DTYPE, Fp8Matrix, quantise_rows_reference
from fused_ops.lora.nf4 import Nf4Matrix


class Scratch:
    """Memory for one unpacked weight; all weights of a stage share it. It is allocated when it is first used, for the largest."""

    def __init__(self):
        self.num_bytes = 0
        self._memory: Tensor | None = None

    def reserve(self, num_bytes: int) -> None:
        """Count in a weight that will be unpacked."""
        assert self._memory is None
        self.num_bytes = max(self.num_bytes, num_bytes)

    def take(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory as a matrix, until the next call."""
        if self._memory is None:
            self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        return self._memory[: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A stored matrix [N, K] and in what its products multiply: `dtype`, or 8 bits. Made by `pack`."""

    matrix: Fp8Matrix | Nf4Matrix
    dtype: torch.dtype
    in_8_bits: bool
    scratch: Scratch
    powers: Tensor  # [N] float32: a power of two for each output
    largest: Tensor  # [K] float32, all the largest of them
    factors: Tensor | None  # [N] float32: of the rows, where the matrix is unpacked for the forward product
    factors_of_transpose: Tensor  # [N] float32
    dy_factors: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Return (N, K)."""
        return torch.Size((len(self.powers), len(self.largest)))

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the matrix; the vectors beside it and the scratch are not counted."""
        return self.matrix.num_bytes

    def forward(self) -> Tensor | Fp8Matrix:
        """Return what X is multiplied with, [N, K]."""
        if not self.in_8_bits:
            return self._unpacked(self.factors, self.dtype)
        if isinstance(self.matrix, Fp8Matrix):
            return self.matrix
        return Fp8Matrix(values=self._unpacked(self.factors, DTYPE), scales=self.powers)

    def grad_input(self) -> Tensor | Fp8Matrix:
        """Return what dY is multiplied with: [N, K], or in 8 bits [K, N]."""
        if not self.in_8_bits:
            return self.forward()
        return Fp8Matrix(values=self._unpacked(self.factors_of_transpose, DTYPE, transposed=True), scales=self.largest)

    def _unpacked(self, factors: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        """Return the stored numbers (of 8 bits, without scales) times a factor for each row, in another type."""
        if backend_name(self.powers.device) == "triton":
            from fused_ops.lora.triton.unpack import unpack

            rows, cols = self.shape[::-1] if transposed else self.shape
            return unpack(self.matrix, factors, self.scratch.take(rows, cols, dtype, self.powers.device), transposed)
        return unpack_reference(self.matrix, factors, dtype, transposed)


def unpack_reference(matrix: Fp8Matrix | Nf4Matrix, factors: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Return CODES[codes] * absmax, or the 8-bit values, times a factor for each row: the kernel's twin, the same bits."""
    x = matrix.values.float() if isinstance(matrix, Fp8Matrix) else matrix.float()
    x = (x if factors is None else x * factors[:, None]).to(dtype)
    return x.T.contiguous() if transposed else x


def pack(matrix: Fp8Matrix | Nf4Matrix, dtype: torch.dtype, in_8_bits: bool, scratch: Scratch) -> PackedWeight:
    """Return a stored matrix as a weight whose products are in `dtype`, or in 8 bits."""
    if isinstance(matrix, Fp8Matrix):
        (rows, cols), (halves, exponents) = matrix.values.shape, torch.frexp(matrix.scales)
        powers, left = torch.ldexp(torch.ones_like(halves), exponents - 1), 2 * halves
        dy_factors = left if in_8_bits and bool((left != 1).any()) else None
        factors, numbers = matrix.scales, powers
    else:
        rows, cols = matrix.codes.shape[0], 2 * matrix.codes.shape[1]
        powers, dy_factors = quantise_rows_reference(matrix.absmax).scales, None
        factors, numbers = 1 / powers if in_8_bits else None, torch.ones_like(powers)
    scratch.reserve(rows * cols * (1 if in_8_bits else dtype.itemsize))
    largest = powers.amax().expand(cols).contiguous()
    return PackedWeight(
        matrix=matrix, dtype=dtype, in_8_bits=in_8_bits, scratch=scratch, powers=powers, largest=largest,
        factors=factors, factors_of_transpose=numbers / largest[0], dy_factors=dy_factors,
    )  # fmt: skip
