"""Which quantised checkpoints are read: by the quantization_config of config.json, and by the shapes of what lies beside a weight.

    unread_quantisation({"quant_method": "gptq"})      # "gptq"

The numbers that such tensors stand for are in quantised_tensors.py. Nothing here loads torch.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

BESIDE = re.compile(
    r"(?P<weight>.+\.weight)(?P<what>_scale|_scale_inv|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map|\.quant_state\.bitsandbytes__nf4)"
)
STATE = ".quant_state.bitsandbytes__nf4"
BLOCK = 64  # of NF4
READ = "compressed-tensors FP8, FP8 in blocks and bitsandbytes NF4 are read; use one of these, or a checkpoint in bf16"


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
