"""Linears' weights as quantised checkpoints hold them: the numbers that they stand for.

    compressed-tensors, FP8      X.weight F8_E4M3 [N, K]    X.weight_scale [N, 1], or one number        weight * scale
    fp8, in blocks               X.weight F8_E4M3 [N, K]    X.weight_scale_inv [N / 128, K / 128]       weight * the block's
    bitsandbytes, NF4            X.weight U8 [N K / 2, 1]   X.weight.absmax and what it was rounded by  quant_map[code] * absmax

`packed` returns the numbers of the first and the last as they are stored, for base_weights of the same storage. quantisation.py says
which other forms are refused.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.quantisation import GROUP, NF4_BLOCK, STATE

Read = Callable[[str], Tensor]  # the name of what lies beside a weight, or "" -> the complete tensor


def dequantised(read: Read, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
    """Return a slice of the weight [N, K] in float32."""
    values = read("")
    if values.dtype == torch.uint8:
        codes, absmax = _nf4(read, shape)
        pairs = torch.stack((codes >> 4, codes & 15), -1)
        blocks = read(".quant_map").float()[pairs.int()].reshape(-1, NF4_BLOCK) * absmax.reshape(-1, 1)
        return blocks.reshape(shape)[index]
    rows, cols = shape
    scales = read("_scale") if _by_rows(read) else read("_scale_inv").repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return (values.float() * (scales.float().reshape(-1, 1) if _by_rows(read) else scales.float()))[index]


def packed(read: Read, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[Tensor, Tensor] | None:
    """Return a slice as stored: (8-bit values, a scale for each row) or (codes [n, k / 2] uint8, absmax [n, k / 64]); else None."""
    rows, columns = index
    values = read("")
    if values.dtype == torch.uint8:
        codes, absmax = _nf4(read, shape)
        first, end, _ = columns.indices(shape[1])
        return codes[rows, first // 2 : end // 2], absmax[rows, first // NF4_BLOCK : end // NF4_BLOCK]
    return (values[index], read("_scale").float().reshape(-1, 1).expand(shape[0], 1)[rows, 0]) if _by_rows(read) else None


def _by_rows(read: Read) -> bool:
    try:
        return read("_scale") is not None
    except KeyError:
        return False


def _nf4(read: Read, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the codes [N, K / 2] and the absmax [N, K / 64], in float32, of a bitsandbytes tensor."""
    rows, cols = shape
    absmax, written = read(".absmax"), bytes(read(STATE).tolist())
    try:
        state = json.loads(written)
    except ValueError:
        state = None
    wanted = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "shape": [rows, cols]}
    nested = absmax.dtype == torch.uint8
    wanted |= {"nested_blocksize": GROUP} if nested else {}
    offset = state.get("nested_offset", None if nested else 0.0) if isinstance(state, dict) and wanted.items() <= state.items() else None
    if not isinstance(offset, int | float):
        said = f"the state {one_line(written.decode(errors='replace'), 200)}"
        raise UserError(f"base_model: a tensor of bitsandbytes has {said}, and {json.dumps(wanted)} is read; fetch the model again")
    if nested:
        groups = read(".nested_absmax").float().repeat_interleave(GROUP)[: len(absmax)]
        absmax = read(".nested_quant_map").float()[absmax.int()] * groups + offset
    return read("").reshape(rows, cols // 2), absmax.float().reshape(rows, cols // NF4_BLOCK)
