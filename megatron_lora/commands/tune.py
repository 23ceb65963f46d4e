"""What `megatron-lora tune` does: measure how to cut matrix products on this GPU, and add the choices to the file that runs read.

A run's kernels follow from this file and from shapes alone, so tune before a run begins and not between its stop and its resume.
"""

import json
import os
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.files import write_atomically


def main(output: str | None) -> int:
    """Measure, print and keep the choices of this GPU; returns 0."""
    import torch

    from fused_ops.lora.triton.gemm_config import CHOICES

    file = CHOICES if output is None else Path(output)
    if not torch.cuda.is_available():
        raise UserError("tune: measures kernels of a GPU, and this machine shows none; run it where one is visible")
    choices = _read(file)
    from fused_ops.lora.triton.tune import tune

    device = torch.cuda.get_device_name()
    for key, fields, times in tune():
        choices.setdefault(device, {})[key] = fields
        print(f"{key}: {fields or 'defaults'} of " + ", ".join(f"{name} {ms * 1e3:.0f} us" for name, ms in times.items()), flush=True)
    write_atomically(file, json.dumps(choices, indent=1, sort_keys=True) + "\n")
    print(f"{file}: {len(choices[device])} choices for {device}")
    return 0


def _read(file: Path) -> dict:
    """Read the choices so far; UserError where they could not be written back."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output: {str(file)!r} is no file that can be written; name one in a folder of yours")
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"--output: {str(file)!r} is no JSON ({error}); name another file, or remove it") from None
    if not isinstance(found, dict) or not all(isinstance(of_device, dict) for of_device in found.values()):
        raise UserError(f"--output: {str(file)!r} holds no choices of kernels; name another file")
    return found
