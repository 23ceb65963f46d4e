"""Which experts each token has, and where its rows lie when rows are ordered by expert: tensors on the device, made without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fused_ops.launch.shapes import cdiv

NEAR = 1e-5  # probabilities that differ by less may change places in other arithmetic
BLOCK = 128  # rows of a tile; the last tile of an expert may have fewer
TOKENS = 32  # of a program of kernels that choose experts and place rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The k experts of each token, the most probable first; of equal ones the one with the lower number."""

    probability_TE: Tensor | None  # float32
    expert_Tk: Tensor
    weight_Tk: Tensor  # float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoute:
    """Rows of the experts of this rank, by expert and then by token. It may have all R = T k, for which there is room."""

    weight_R: Tensor  # float32
    place_Tk: Tensor  # the row of each of a token's experts; -1: another rank has it
    first_E: Tensor  # [own experts + 1] the first row of each, and how many rows there are
    end: Tensor | None = None  # of kernels, [1]: how many rows there are, where other ranks have some; None: R
    tiles: Tensor | None = None  # of kernels, int32 [most_tiles + 1, 3]: expert, first row and end of each tile; last, how many there are


def most_tiles(num_rows: int, num_experts: int) -> int:
    """Return a bound on the tiles of any route."""
    return cdiv(num_rows, BLOCK) + num_experts
