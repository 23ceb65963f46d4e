"""A job's checkpoint, `jobs/<name>/checkpoint-<step>/`: from it the job goes on as if it had never stopped, in any layout.

    adapter_config.json  adapter_model.safetensors  README.md     the PEFT directory as it was then, in fp32
    optimizer.safetensors    Adam's moments: the keys of the adapter's tensors with .exp_avg or .exp_avg_sq behind, same shapes, fp32
    state.json               the fields of resume.State

A checkpoint lies between two steps of its job, holds whole tensors, and is written aside, synced and renamed: one that has its name is
complete. A step that was begun is taken again, with the same samples and dropout masks, which depend on the step alone.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.peft_format import PREFIX, AdapterFile, write_adapter
from megatron_lora.resume import STATE_FILE, State, checkpoint_name, remedy

OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # path -> one tensor for A [r, K], one for B [N, r]


def write_checkpoint(job_dir: Path, adapter: AdapterFile, base_model: str, moments: Sequence[Pairs], state: State) -> None:
    """Write a job's checkpoint, complete or not at all; one of the same step is replaced."""
    final = job_dir / checkpoint_name(state.step)
    aside = job_dir / f".{final.name}.new"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that ended while it wrote
    write_adapter(aside, adapter, base_model)
    save_file(
        {key: tensor for name, pairs in zip(MOMENTS, moments, strict=True) for key, tensor in _named(pairs, name).items()},
        aside / OPTIMIZER_FILE,
        metadata={"format": "pt"},
    )
    (aside / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")
    for name in (OPTIMIZER_FILE, STATE_FILE, "."):
        _sync(aside / name)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(job_dir)


def read_moments(checkpoint: Path, weights: Pairs) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Read Adam's moments of a checkpoint, each shaped as the adapter's weights; UserError where the file is damaged."""
    file = checkpoint / OPTIMIZER_FILE
    try:
        tensors = load_file(file)
        found = []
        for name in MOMENTS:
            keys = {path: tuple(f"{PREFIX}{path}.lora_{kind}.weight.{name}" for kind in "AB") for path in weights}
            found.append({path: (tensors[a], tensors[b]) for path, (a, b) in keys.items()})
            for path, pair in found[-1].items():
                if [tensor.shape for tensor in pair] != [tensor.shape for tensor in weights[path]]:
                    raise KeyError(f"a {name} of {path} that is shaped as its weight")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged ({error}); {remedy(checkpoint)}") from None
    except KeyError as error:
        raise UserError(f"{file}: has not got {error.args[0]}; {remedy(checkpoint)}") from None
    return found


def _named(pairs: Pairs, name: str) -> dict[str, torch.Tensor]:
    """Return tensors under the adapter's keys with a name behind."""
    return {
        f"{PREFIX}{path}.lora_{kind}.weight.{name}": half for path, pair in pairs.items() for kind, half in zip("AB", pair, strict=True)
    }


def _sync(path: Path) -> None:
    """Have a file or a directory's entries written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
