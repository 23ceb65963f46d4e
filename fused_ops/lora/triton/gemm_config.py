"""How a GEMM is cut into tiles: a pure function of shapes, from measurements kept in gemm_choices.json.

The file maps device name -> key -> the fields that differ from GemmConfig's defaults; `megatron-lora tune` writes it, once per kind
of GPU. Nothing is measured while training, so that a resumed run uses the same kernels and gives the same bits. Rows are counted in buckets
(powers of two), so that the choice does not depend on how full a microbatch is. Shapes without a measurement get the defaults below.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

CHOICES = Path(__file__).with_name("gemm_choices.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmConfig:
    """The output tile, the inner block, pipeline stages, column parts of the epilogue, row tiles per group, and the grid."""

    rows: int = 128
    columns: int = 256
    inner: int = 64
    stages: int = 4
    parts: int = 2
    group: int = 8
    warps: int = 8
    persistent: bool = False
    flatten: bool = False


def choice_key(num_rows: int, num_inner: int, num_cols: int, backward: bool, width: int, dropout: bool) -> str:
    """Return the key of a measurement: the bucket of rows, the weight's shape, the direction, and the kind of LoRA term."""
    bucket = max(1024, 1 << (num_rows - 1).bit_length())
    term = "none" if width == 0 else "dropout" if dropout else "narrow" if width <= 16 else "wide"
    return f"{bucket} rows, {num_inner} -> {num_cols}, {'dx' if backward else 'forward'}, {term}"


def gemm_config(values_TI: Tensor, num_cols: int, backward: bool, small: bool, width: int, dropout: bool, num_modules: int) -> GemmConfig:
    """Return how to cut this GEMM; `width` is the widest LoRA term in ranks (0: none), `small`: without TMA, or to float32.

    Over 8-bit operands the inner block is twice as long, in as many bytes.
    """
    fp8 = values_TI.dtype == torch.float8_e4m3fn
    inner = 128 if fp8 else 64
    if small:
        return GemmConfig(columns=128, inner=inner // 2, stages=3)
    if values_TI.is_cuda:
        key = choice_key(values_TI.shape[0], values_TI.shape[1], num_cols, backward, width, dropout) + (", fp8" if fp8 else "")
        found = _choices().get(torch.cuda.get_device_name(values_TI.device), {}).get(key)
        if found is not None:
            return GemmConfig(**found)
    if width:
        return GemmConfig(inner=inner, parts=4 if dropout and num_modules > 1 else 2)
    # The flattened persistent loop hides the epilogue behind the next tile's loads; with a LoRA term ptxas serialises its products.
    return GemmConfig(inner=inner, stages=3, persistent=True, flatten=True, group=16)


@lru_cache(maxsize=1)
def _choices() -> dict[str, dict[str, dict]]:
    return json.loads(CHOICES.read_text()) if CHOICES.exists() else {}
