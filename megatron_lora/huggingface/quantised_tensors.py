"""Linears' weights as quantised checkpoints hold them: the numbers that they stand for.

    compressed-tensors, FP8      X.weight F8_E4M3 [N, K]    X.weight_scale [N, 1], or one number        weight * scale
    fp8, in blocks               X.weight F8_E4M3 [N, K]    X.weight_scale_inv [N / 128, K / 128]       weight * the block's
    bitsandbytes, NF4            X.weight U8 [N K / 2, 1]   X.weight.absmax and what it was rounded by  CODES[code] * absmax

`packed` returns the first and the last as matrices in 8 and 4 bits, for base_weights of the same storage. A rank reads what it needs of the
large tensors: its slice, of NF4 its rows. quantisation.py says which other forms are refused.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from fused_ops.lora.fp8 import Fp8Matrix
from fused_ops.lora.nf4 import Nf4Matrix, from_dynamic, table_of
from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.quantisation import GROUP, NF4_BLOCK, STATE

Read = Callable[..., Tensor]  # (the name of what lies beside a weight, or "" for itself; an index, default: all of it) -> the tensor
Index = tuple[slice, ...]


def dequantised(read: Read, is_nf4: bool, shape: tuple[int, ...], index: Index) -> Tensor:
    """Return a slice of the weight [N, K] in float32."""
    if is_nf4:
        return _nf4(read, shape, index[0]).float()[:, index[1]]
    (rows, cols), scales = shape, _row_scales(read)
    if scales is None:
        scales = read("_scale_inv").float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return read("", index).float() * scales.expand(rows, cols)[index]


def packed(read: Read, is_nf4: bool, shape: tuple[int, ...], index: Index) -> Fp8Matrix | Nf4Matrix | None:
    """Return a slice as it is stored (its scales need not be powers of two); None where neither kind of matrix is stored so."""
    rows, columns = index
    if is_nf4:
        return _nf4(read, shape, rows).part(slice(None), columns)
    scales = _row_scales(read)
    return None if scales is None else Fp8Matrix(values=read("", index), scales=scales.expand(shape[0], 1)[rows, 0])


def _row_scales(read: Read) -> Tensor | None:
    """Return the scales [N, 1] or [1, 1] of compressed-tensors, in float32."""
    try:
        return read("_scale").float().reshape(-1, 1)
    except KeyError:
        return None


def _nf4(read: Read, shape: tuple[int, ...], index: slice) -> Nf4Matrix:
    """Return rows of a bitsandbytes tensor."""
    rows, cols = shape
    first, end, _ = index.indices(rows)
    blocks = slice(first * cols // NF4_BLOCK, end * cols // NF4_BLOCK)
    absmax, written = read(".absmax", blocks), bytes(read(STATE).tolist())
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
    if not torch.equal(read(".quant_map").float(), table_of(absmax.device)):
        raise UserError("base_model: a tensor of bitsandbytes has a quant_map that is not NF4's; fetch the model again")
    if nested:
        absmax = from_dynamic(read(".nested_quant_map").float(), absmax, read(".nested_absmax").float(), offset, blocks.start)
    codes = read("", slice(first * cols // 2, end * cols // 2))
    return Nf4Matrix(codes=codes.reshape(end - first, cols // 2), absmax=absmax.float().reshape(end - first, cols // NF4_BLOCK))
