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
FLOATS = ("F32", "BF16", "F16")
NF4_BLOCK, GROUP = 64, 256  # of NF4, and of its absmax
READ = "compressed-tensors FP8, FP8 in blocks and bitsandbytes NF4 are read; use one of these, or a checkpoint in bf16"


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
    if dtype == "U8" and entry_shape == [rows * cols // 2, 1] and not cols % NF4_BLOCK:
        blocks = rows * cols // NF4_BLOCK
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
