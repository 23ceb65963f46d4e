"""A job's checkpoint, `jobs/<name>/checkpoint-<step>/`: the job resumes from it as if it had never stopped, in any layout.

    adapter_config.json  adapter_model.safetensors  README.md     the PEFT directory as it was then, in fp32
    optimizer.safetensors    Adam's moments: the keys of the adapter's tensors plus .exp_avg or .exp_avg_sq, same shapes, fp32
    state.json               the fields of standing.CheckpointState

A checkpoint is made between two steps of its job and holds complete tensors, not those of one rank.
It is written under another name, synced and renamed, so a directory that has the name is complete.
A step that had begun is taken again. Its samples and dropout masks are the same, because they
depend on the step alone.
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
from megatron_lora.output.standing import STATE_FILE, Best, CheckpointState, best_name, checkpoint_name, how_to_recover

OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # path -> one tensor for A [r, K], one for B [N, r]


def write_checkpoint(job_dir: Path, adapter: AdapterFile, base_model: str, moments: Sequence[Pairs], state: CheckpointState) -> None:
    """Write a job's checkpoint, complete or not at all; one of the same step is replaced."""
    final = job_dir / checkpoint_name(state.step)
    for leftover in job_dir.glob(".checkpoint-*"):  # by a run that ended while it wrote
        shutil.rmtree(leftover)
    new, old = (job_dir / f".{final.name}.{kind}" for kind in ("new", "old"))
    write_adapter(new, adapter, base_model)
    tensors = {_key(path, kind, name): tensor for name, pairs in zip(MOMENTS, moments, strict=True) for path, kind, tensor in _walk(pairs)}
    save_file(tensors, new / OPTIMIZER_FILE, metadata={"format": "pt"})
    (new / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")
    for name in (OPTIMIZER_FILE, STATE_FILE, "."):
        sync(new / name)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync(job_dir)
    shutil.rmtree(old, ignore_errors=True)


def check_tensors(checkpoint: Path, best: Best | None = None) -> None:
    """Raise UserError if a file of tensors, of the checkpoint or of the best weights by then, is missing or, by its header, cut short."""
    files = [checkpoint / name for name in (WEIGHTS_FILE, OPTIMIZER_FILE)]
    if best is not None:
        files.append(checkpoint.with_name(best_name(best.step)) / WEIGHTS_FILE)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is damaged ({error}); {how_to_recover(checkpoint)}") from None


def read_checkpoint(checkpoint: Path) -> tuple[Pairs, list[Pairs]]:
    """Read a job's weights and Adam's two moments; UserError if files are missing, damaged, or do not match."""
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
        for path, kind, tensor in _walk(weights):
            key = _key(path, kind, name)
            if key not in tensors or tensors[key].shape != tensor.shape:
                raise UserError(f"{file}: has no {key} of shape {list(tensor.shape)}; {how_to_recover(checkpoint)}")
    return weights, [{path: (tensors[_key(path, "A", name)], tensors[_key(path, "B", name)]) for path in weights} for name in MOMENTS]


def _walk(pairs: Pairs) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (path, "A" or "B", tensor)."""
    for path, pair in pairs.items():
        for kind, tensor in zip("AB", pair, strict=True):
            yield path, kind, tensor


def _key(path: str, kind: str, moment: str) -> str:
    return f"{PREFIX}{path}.lora_{kind}.weight.{moment}"
