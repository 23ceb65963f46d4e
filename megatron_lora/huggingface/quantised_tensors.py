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

from megatron_lora.errors import UserError, one_line

BESIDE = re.compile(
    r"(?P<weight>.+\.weight)(?P<what>_scale|_scale_inv|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map|\.quant_state\.bitsandbytes__nf4)"
)
STATE = ".quant_state.bitsandbytes__nf4"
FLOATS = ("F32", "BF16", "F16")
BLOCK, GROUP = 64, 256  # of NF4, and of its absmax
READ = "compressed-tensors FP8, FP8 in blocks and bitsandbytes NF4 are read; use one of these, or a checkpoint in bf16"
Read = Callable[[str], Tensor]  # the name of what lies beside a weight, or "" -> the complete tensor


def unread_quantisation(found: Mapping[str, Any]) -> str | None:
    """Return what of a quantization_config is not read; None where its tensors are."""
    method = found.get("quant_method")
    if method == "compressed-tensors":
        groups = found.get("config_groups")
        weights = (
            [group.get("weights") if isinstance(group, dict) else group for group in groups.values()] if isinstance(groups, dict) else []
        )
        forms = [tuple(each.get(key) for key in ("num_bits", "type", "strategy")) if isinstance(each, dict) else each for each in weights]
        bad = [str(form) for form in forms if form not in ((8, "float", "channel"), (8, "float", "tensor"))]
        return f"{method} {min(bad)}" if bad else None if forms else f"{method} without config_groups"
    if method == "fp8":
        size = found.get("weight_block_size")
        return None if size == [128, 128] else f"fp8 with weight_block_size {size}" if size else "fp8 without weight_block_size"
    if method == "bitsandbytes":
        kind = found.get("bnb_4bit_quant_type") if found.get("load_in_4bit") else "8 bits"
        return None if kind == "nf4" else f"{method} {kind}"
    return str(method)


def fault_of(dtype: str, beside: Mapping[str, Any], entry_shape: list[int], shape: tuple[int, ...]) -> str | None:
    """Return what is wrong with a quantised tensor of a linear [N, K] and what lies beside it, by types and shapes; None if nothing is."""
    (rows, cols), forms = shape, []
    if dtype == "F8_E4M3" and entry_shape == [rows, cols]:
        scales = [rows, 1], [rows], [1], []
        forms = [{"_scale": (FLOATS, scales)}, {"_scale_inv": (FLOATS, ([math.ceil(rows / 128), math.ceil(cols / 128)],))}]
    if dtype == "U8" and math.prod(entry_shape) * 2 == rows * cols and not cols % BLOCK:
        blocks = rows * cols // BLOCK
        nested = {".nested_absmax": (FLOATS, ([math.ceil(blocks / GROUP)],)), ".nested_quant_map": (FLOATS, ([256],))}
        plain = {".quant_map": (FLOATS, ([16],)), STATE: (("U8",), ([math.prod(beside[STATE].entry["shape"])],) if STATE in beside else ())}
        forms = [plain | {".absmax": (FLOATS, ([blocks],))}, plain | nested | {".absmax": (("U8",), ([blocks],))}]
    found = {what: (each.entry["dtype"], list(each.entry["shape"])) for what, each in beside.items()}
    for form in forms:
        if form.keys() == found.keys():
            bad = [
                f"{what} {kind} {size}" for what, (kind, size) in found.items() if kind not in form[what][0] or size not in form[what][1]
            ]
            return f"{dtype} {entry_shape} beside {', '.join(bad)}" if bad else None
    return f"{dtype} {entry_shape} beside {', '.join(sorted(found)) or 'nothing'}"


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
    absmax, written = read(".absmax"), bytes(read(STATE).tolist())
    try:
        state = json.loads(written)
    except ValueError:
        state = None
    wanted = {"blocksize": BLOCK, "quant_type": "nf4", "shape": [rows, cols]}
    wanted |= {"nested_blocksize": GROUP} if absmax.dtype == torch.uint8 else {}
    offset = state.get("nested_offset", 0.0) if isinstance(state, dict) and wanted.items() <= state.items() else None
    if not isinstance(offset, int | float):
        said = f"the state {one_line(written.decode(errors='replace'), 200)}"
        raise UserError(f"base_model: a tensor of bitsandbytes has {said}, and {json.dumps(wanted)} is read; fetch the model again")
    if absmax.dtype == torch.uint8:
        groups = read(".nested_absmax").float().repeat_interleave(GROUP)[: len(absmax)]
        absmax = read(".nested_quant_map").float()[absmax.int()] * groups + offset
    return read("").reshape(rows, cols // 2), absmax.float().reshape(rows, cols // BLOCK)
