"""Matrices in 8 bits: float8_e4m3fn values [R, C] with one power of two per row, so that values * scales is the matrix, rounded.

    scale_r = the smallest power of two with max_c |x_rc| / scale_r <= 448        values_rc = round(x_rc / scale_r)

A power of two changes no digit: every number keeps its 4 significant bits (at most 1/16 off) in any row, unless it is 2^14 times smaller
than the largest of its row. So the two copies of a frozen weight, one with a scale per output and one with a scale per input, are the same
matrix, and a shard of a tensor-parallel matrix is rounded as the complete matrix is. There are two copies because Hopper multiplies 8-bit
operands only where both are contiguous along the reduced dimension: X W^T reads W by rows, dY W by columns. Together they take as many
bytes as the weight in 16 bits: 8 bits save time, not memory.

Activations are rounded row by row, a token at a time: one token never affects another. Gradients are e4m3 too: with a scale per row, e5m2's
range would gain nothing for its lost digit. A row that is not finite gets the scale NaN, and its product is NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.launch.backend import backend_name
from fused_ops.launch.optional_triton import tl, triton
from fused_ops.launch.shapes import power_of_2

DTYPE = torch.float8_e4m3fn
_MAX_COLUMNS = 32768  # that a program keeps in registers; longer rows are read twice


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Matrix:
    """values [R, C] float8_e4m3fn, contiguous, and scales [R] float32, powers of two (NaN for a row that is not finite)."""

    values: Tensor
    scales: Tensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes of both."""
        return self.values.nbytes + self.scales.nbytes

    def float(self) -> Tensor:
        """Return the matrix in float32."""
        return self.values.float() * self.scales[:, None]


def parts(matrix: Tensor | Fp8Matrix) -> tuple[Tensor, Tensor | None]:
    """Return a matrix's values, and its scales if it is in 8 bits."""
    return (matrix.values, matrix.scales) if isinstance(matrix, Fp8Matrix) else (matrix, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A frozen weight [N, K] for both directions: by_output [N, K] for X W^T, by_input [K, N] for dY W."""

    by_output: Fp8Matrix
    by_input: Fp8Matrix
    in_8_bits: bool = True
    dy_factors: Tensor | None = None

    def forward(self) -> Fp8Matrix:
        """Return the copy by outputs."""
        return self.by_output

    def grad_input(self) -> Fp8Matrix:
        """Return the copy by inputs."""
        return self.by_input

    @property
    def shape(self) -> torch.Size:
        """Return (N, K)."""
        return self.by_output.values.shape

    @property
    def num_bytes(self) -> int:
        """Return the bytes that both copies take."""
        return self.by_output.num_bytes + self.by_input.num_bytes


def quantise_weight(weight_NK: Tensor, backend: str | None = None) -> Fp8Weight:
    """Round a weight for both directions. Raises ValueError where it holds a number that is not finite."""
    if not bool(weight_NK.isfinite().all()):
        raise ValueError(f"a weight {list(weight_NK.shape)} holds numbers that are not finite")
    by_output, by_input = (quantise_rows(w, backend) for w in (weight_NK, weight_NK.T))
    return Fp8Weight(by_output=by_output, by_input=by_input)


def quantise_rows(x_RC: Tensor, backend: str | None = None, factors_C: Tensor | None = None) -> Fp8Matrix:
    """Round a matrix row by row, each column times its factor if there are any. x_RC [R, C] in 16 or 32 bits (else ValueError)."""
    if x_RC.dim() != 2 or x_RC.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{x_RC.dtype} {list(x_RC.shape)} is not a matrix in 16 or 32 bits")
    quantise = _launch if backend_name(x_RC.device, backend) == "triton" else quantise_rows_reference
    return quantise(x_RC.contiguous(), factors_C)


def multiply_reference(x_TI: Tensor, weight_OI: Fp8Matrix, factors_I: Tensor | None = None) -> Tensor:
    """Return X W^T in x's dtype with X, times factors if there are any, rounded as the kernels round it; sums in float32."""
    return (quantise_rows_reference(x_TI, factors_I).float() @ weight_OI.float().T).to(x_TI.dtype)


def quantise_rows_reference(x_RC: Tensor, factors_C: Tensor | None = None) -> Fp8Matrix:
    """Round a matrix row by row in plain torch: the kernel's twin, the same bits."""
    x = x_RC.float() if factors_C is None else x_RC.float() * factors_C
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(1) if x.shape[1] else x.new_zeros(len(x), dtype=torch.int32)
    exponent = (((largest + 0x1FFFFF) >> 23) - 8).clamp(min=1)
    exponent = torch.where(largest < 0x7F800000, exponent, 255)
    nan = torch.tensor(float("nan"), device=x.device)
    scales = torch.where(exponent < 255, (exponent << 23).view(torch.float32), nan)
    inverse = torch.where(exponent < 255, ((254 - exponent).clamp(min=0) << 23).view(torch.float32), nan)
    return Fp8Matrix(values=(x * inverse[:, None]).to(DTYPE), scales=scales)


class Rounded:
    """What a linear over 8-bit operands is given rounded already: X by the producer that wrote it, dY by the reader that wrote that.

    A norm or SwiGLU that has a row in registers rounds it in the same pass, to the bits that `quantise_rows` gives. One Rounded serves
    one linear for one microbatch; what is None is rounded by the linear itself.
    """

    __slots__ = ("dy", "x")

    def __init__(self):
        self.x: Fp8Matrix | None = None
        self.dy: Fp8Matrix | None = None

    def take_x(self) -> Fp8Matrix | None:
        """Return X and forget it."""
        x, self.x = self.x, None
        return x

    def take_dy(self) -> Fp8Matrix | None:
        """Return dY and forget it."""
        dy, self.dy = self.dy, None
        return dy


def empty_rows(like: Tensor) -> Fp8Matrix:
    """Return a matrix [rows, C] for the rows of a tensor [..., C], not yet written."""
    shape = like.shape[:-1].numel(), like.shape[-1]
    return Fp8Matrix(values=like.new_empty(shape, dtype=DTYPE), scales=like.new_empty(shape[0], dtype=torch.float32))


@triton.jit
def magnitude(b_x):
    """Return |x| as the bits of its float32, which are in the order of the numbers, with NaN above all."""
    return b_x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(largest):
    """Return a row's scale and its inverse from its largest magnitude: up to 1.75 * 2^8 of the scale, NaN where it is not finite."""
    # The exponent of the largest, one more where its fraction is above 0.75, less 8.
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    return scale, tl.where(finite, ((254 - exponent) << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _load_row(x_ptr, factors_ptr, o_col, num_cols, SCALED: tl.constexpr):
    b_x = tl.load(x_ptr + o_col, o_col < num_cols, 0.0)
    return b_x.to(tl.float32) * tl.load(factors_ptr + o_col, o_col < num_cols, 0.0) if SCALED else b_x


@triton.jit
def _quantise_kernel(
    x_ptr, factors_ptr, values_ptr, scales_ptr, num_cols, SCALED: tl.constexpr, COLS: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    x_ptr += i_row * num_cols
    values_ptr += i_row * num_cols
    o_col = tl.arange(0, COLS)
    if ONE_BLOCK:
        b_x = _load_row(x_ptr, factors_ptr, o_col, num_cols, SCALED)
        largest = tl.max(magnitude(b_x), 0)
    else:
        b_largest = tl.zeros([COLS], tl.int32)
        for first in range(0, num_cols, COLS):
            b_x = _load_row(x_ptr, factors_ptr, first + o_col, num_cols, SCALED)
            b_largest = tl.maximum(b_largest, magnitude(b_x))
        largest = tl.max(b_largest, 0)
    scale, inverse = row_scale(largest)
    tl.store(scales_ptr + i_row, scale)
    if ONE_BLOCK:
        tl.store(values_ptr + o_col, (b_x.to(tl.float32) * inverse).to(values_ptr.dtype.element_ty), o_col < num_cols)
    else:
        for first in range(0, num_cols, COLS):
            b_x = _load_row(x_ptr, factors_ptr, first + o_col, num_cols, SCALED)
            tl.store(values_ptr + first + o_col, (b_x.to(tl.float32) * inverse).to(values_ptr.dtype.element_ty), first + o_col < num_cols)


def _launch(x_RC: Tensor, factors_C: Tensor | None = None) -> Fp8Matrix:
    """Launch a program per row."""
    (num_rows, num_cols), rounded = x_RC.shape, empty_rows(x_RC)
    if num_rows:
        one_block = num_cols <= _MAX_COLUMNS
        cols = power_of_2(max(num_cols, 16)) if one_block else 8192
        warps = min(16, max(1, cols // 512))
        _quantise_kernel[(num_rows,)](
            x_RC, factors_C, rounded.values, rounded.scales, num_cols,
            SCALED=factors_C is not None, COLS=cols, ONE_BLOCK=one_block, num_warps=warps,
        )  # fmt: skip
    return rounded
