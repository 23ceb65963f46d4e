"""Linears' weights as quantised checkpoints hold them: which of their forms are read, and the numbers that they stand for.

    compressed-tensors, FP8      X.weight F8_E4M3 [N, K]    X.weight_scale [N, 1], or one number        weight * scale
    fp8, in blocks               X.weight F8_E4M3 [N, K]    X.weight_scale_inv [N / 128, K / 128]       weight * the block's
    bitsandbytes, NF4            X.weight U8 [N K / 2, 1]   X.weight.absmax and what it was rounded by  quant_map[code] * absmax

`packed` returns the numbers of the first and the last as they are stored, for base_weights of the same storage. All others, and other
quantisations, are refused by the fields of config.json, or by the tensors.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_lora.errors import UserError

BESIDE = re.compile(
    r"(?P<weight>.+\.weight)(?P<what>_scale|_scale_inv|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map|\.quant_state\.bitsandbytes__nf4)"
)
STATE = ".quant_state.bitsandbytes__nf4"
BLOCK, GROUP = 64, 256  # of NF4, and of its absmax
READ = "compressed-tensors FP8, FP8 in blocks and bitsandbytes NF4 are read; use one of these, or a checkpoint in bf16"
Read = Callable[[str], Tensor]  # the name of what lies beside a weight, or "" -> the complete tensor


def unread_quantisation(found: Mapping[str, Any]) -> str | None:
    """Return what of a quantization_config is not read; None where its tensors are."""
    method = found.get("quant_method")
    if method == "compressed-tensors":
        weights = [group.get("weights") or {} for group in found.get("config_groups", {}).values()]
        forms = {(each.get("num_bits"), each.get("type"), each.get("strategy")) for each in weights}
        bad = forms - {(8, "float", "channel"), (8, "float", "tensor")}
        return f"{method} {sorted(map(str, bad))[0]}" if bad else None if forms else f"{method} without config_groups"
    if method == "fp8":
        return None if found.get("weight_block_size") else "fp8 without weight_block_size"
    if method == "bitsandbytes":
        kind = found.get("bnb_4bit_quant_type") if found.get("load_in_4bit") else "8 bits"
        return None if kind == "nf4" else f"{method} {kind}"
    return str(method)


def fault_of(dtype: str, beside: Mapping[str, Any], entry_shape: list[int], shape: tuple[int, ...]) -> str | None:
    """Return what is wrong with a quantised tensor of a linear [N, K] and what lies beside it, by their shapes; None if nothing is."""
    shapes = {what: list(each.entry["shape"]) for what, each in beside.items()}
    rows, cols = shape
    if dtype == "F8_E4M3" and entry_shape == [rows, cols] and len(shapes) == 1:
        if shapes.get("_scale") in ([rows, 1], [rows], [1], []):
            return None
        blocks = shapes.get("_scale_inv")
        if blocks == [math.ceil(rows / 128), math.ceil(cols / 128)]:
            return None
    if (
        dtype == "U8"
        and math.prod(entry_shape) * 2 == rows * cols
        and not cols % BLOCK
        and {".absmax", ".quant_map", STATE} <= shapes.keys()
    ):
        return None if shapes[".absmax"] == [rows * cols // BLOCK] else f"its absmax has shape {shapes['.absmax']}"
    return f"{dtype} {entry_shape} beside {', '.join(sorted(shapes)) or 'nothing'}"


def dequantised(read: Read, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
    """Return a slice of the weight [N, K] in float32."""
    values = read("")
    if values.dtype == torch.uint8:
        codes, absmax = _nf4(read, shape)
        pairs = torch.stack((codes >> 4, codes & 15), -1)
        blocks = read(".quant_map").float()[pairs.int()].reshape(-1, BLOCK) * absmax.reshape(-1, 1)
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
        return codes[rows, first // 2 : end // 2], absmax[rows, first // BLOCK : end // BLOCK]
    return (values[index], read("_scale").float().reshape(-1, 1).expand(shape[0], 1)[rows, 0]) if _by_rows(read) else None


def _by_rows(read: Read) -> bool:
    try:
        return read("_scale") is not None
    except KeyError:
        return False


def _nf4(read: Read, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the codes [N, K / 2] and the absmax [N, K / 64], in float32, of a bitsandbytes tensor."""
    rows, cols = shape
    state = json.loads(bytes(read(STATE).tolist()))
    if state.get("blocksize") != BLOCK or state.get("quant_type") != "nf4" or list(state.get("shape", [])) != [rows, cols]:
        raise UserError(f"base_model: a tensor of bitsandbytes has the state {json.dumps(state)[:200]}; blocks of {BLOCK} in NF4 are read")
    absmax = read(".absmax")
    if absmax.dtype == torch.uint8:
        if state.get("nested_blocksize") != GROUP:
            raise UserError(f"base_model: bitsandbytes' nested_blocksize is {state.get('nested_blocksize')}; {GROUP} is read")
        groups = read(".nested_absmax").float().repeat_interleave(GROUP)[: len(absmax)]
        absmax = read(".nested_quant_map").float()[absmax.int()] * groups + state["nested_offset"]
    return read("").reshape(rows, cols // 2), absmax.float().reshape(rows, cols // BLOCK)
