"""A job's checkpoint, `jobs/<name>/checkpoint-<step>/`: from it the job goes on as if it had never stopped, in any layout.

    adapter_config.json  adapter_model.safetensors  README.md     the PEFT directory as it was then, in fp32
    optimizer.safetensors    Adam's moments: the keys of the adapter's tensors with .exp_avg or .exp_avg_sq behind, same shapes, fp32
    state.json               the fields of resume.CheckpointState

A checkpoint lies between two steps of its job, holds whole tensors, and is written aside, synced and renamed: one that has its name is
complete. A step that was begun is taken again, with the same samples and dropout masks, which depend on the step alone.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.files import sync
from megatron_lora.huggingface.adapter_files import PREFIX, WEIGHTS_FILE, AdapterFile, read_adapter, write_adapter
from megatron_lora.output.standing import STATE_FILE, CheckpointState, checkpoint_name, how_to_recover

OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # path -> one tensor for A [r, K], one for B [N, r]


def write_checkpoint(job_dir: Path, adapter: AdapterFile, base_model: str, moments: Sequence[Pairs], state: CheckpointState) -> None:
    """Write a job's checkpoint, complete or not at all; one of the same step is replaced."""
    final = job_dir / checkpoint_name(state.step)
    for left_over in job_dir.glob(".checkpoint-*"):  # of a run that ended while it wrote
        shutil.rmtree(left_over)
    aside, before = (job_dir / f".{final.name}.{kind}" for kind in ("new", "old"))
    write_adapter(aside, adapter, base_model)
    halves = {_key(path, kind, name): half for name, pairs in zip(MOMENTS, moments, strict=True) for path, kind, half in _halves(pairs)}
    save_file(halves, aside / OPTIMIZER_FILE, metadata={"format": "pt"})
    (aside / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")
    for name in (OPTIMIZER_FILE, STATE_FILE, "."):
        sync(aside / name)
    if final.exists():
        final.rename(before)
    aside.rename(final)
    sync(job_dir)
    shutil.rmtree(before, ignore_errors=True)


def check_tensors(checkpoint: Path) -> None:
    """Raise UserError where a file of tensors is missing or cut short, as its header tells."""
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
        try:
            with safe_open(checkpoint / name, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{checkpoint / name}: is damaged ({error}); {how_to_recover(checkpoint)}") from None


def read_checkpoint(checkpoint: Path) -> tuple[Pairs, list[Pairs]]:
    """Read a job's weights and Adam's two moments; UserError where files are not there, damaged, or do not go together."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: is not there on this machine; choose an output_dir that all machines of the run share")
    file = checkpoint / OPTIMIZER_FILE
    try:
        weights, tensors = read_adapter(checkpoint).weights, load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged ({error}); {how_to_recover(checkpoint)}") from None
    except UserError as error:
        raise UserError(f"{error}; or {how_to_recover(checkpoint)}") from None
    for name in MOMENTS:
        for path, kind, half in _halves(weights):
            key = _key(path, kind, name)
            if key not in tensors or tensors[key].shape != half.shape:
                raise UserError(f"{file}: has no {key} of shape {list(half.shape)}; {how_to_recover(checkpoint)}")
    return weights, [{path: (tensors[_key(path, "A", name)], tensors[_key(path, "B", name)]) for path in weights} for name in MOMENTS]


def _halves(pairs: Pairs) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Walk over (path, "A" or "B", tensor)."""
    for path, pair in pairs.items():
        for kind, half in zip("AB", pair, strict=True):
            yield path, kind, half


def _key(path: str, kind: str, moment: str) -> str:
    return f"{PREFIX}{path}.lora_{kind}.weight.{moment}"
