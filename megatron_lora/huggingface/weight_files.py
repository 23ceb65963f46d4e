"""Checks that a model's weights are present and complete, from the headers of its safetensors files; no tensor is read.

A safetensors file is 8 bytes (the header's length n, little-endian), n bytes of JSON (name ->
dtype, shape, data_offsets), data. This finds a file cut short by a broken download, a missing shard
and a tensor of another model, in milliseconds.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_lora.errors import UserError

DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes per number
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REFETCH = "fetch the model again"


class Shapes(Protocol):
    """The part of Architecture that the checks need."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by name."""


def check_weights(model_dir: Path, architecture: Shapes) -> None:
    """Raise UserError if a safetensors file is damaged, or if a tensor is missing, has another shape, or is not in the architecture.

    A rotary table and a copy of a tied head may be stored too. Any other tensor would silently be
    left out of the model.
    """
    found: dict[str, dict] = {}
    for file in weight_files(model_dir):
        found |= read_header(file)
    model = f"base_model: {str(model_dir)!r}"
    shapes = architecture.tensor_shapes()
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{model} has no tensor {name}, which its config.json calls for; {REFETCH}")
        if tuple(found[name]["shape"]) != shape:
            raise UserError(f"{model}: {name} has shape {found[name]['shape']} and config.json calls for {list(shape)}; {REFETCH}")
        if found[name]["dtype"] not in DTYPES:
            raise UserError(f"{model}: {name} is {found[name]['dtype']}; use a checkpoint in bf16, fp16 or fp32, not a quantised one")
        first, end = found[name]["data_offsets"]
        if end - first != math.prod(shape) * DTYPES[found[name]["dtype"]]:
            raise UserError(f"{model}: {name} has {end - first} bytes, which are not {list(shape)} {found[name]['dtype']}; {REFETCH}")
    for name in sorted(found.keys() - shapes.keys() - {"lm_head.weight"}):
        if not name.endswith(".rotary_emb.inv_freq"):
            raise UserError(f"{model} has a tensor {name} that its config.json does not call for; use the config.json of these weights")


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model directory: the only one, or those of the index."""
    index = model_dir / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [model_dir / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"base_model: {index} is damaged; {REFETCH}") from None
    if (model_dir / SINGLE).is_file():
        return [model_dir / SINGLE]
    pickled = " (its .bin files are pickles, which are not read)" if any(model_dir.glob("*.bin")) else ""
    raise UserError(f"base_model: {str(model_dir)!r} has no {SINGLE}{pickled}; use a model saved as safetensors, or load_weights: false")


def read_header(path: Path) -> Mapping[str, dict]:
    """Read name -> {dtype, shape, data_offsets} of one file; UserError when the file is missing, cut short or no safetensors file."""
    damaged = UserError(f"base_model: {path} is damaged or no safetensors file; {REFETCH}")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 0 < length <= size - 8 else b""
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if not all(map(_is_entry, tensors.values())):
            raise damaged
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise UserError(f"base_model: {path} is missing; {REFETCH}") from None
    except OSError as error:
        raise UserError(f"base_model: {path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, AttributeError, RecursionError):
        raise damaged from None
    if size != 8 + length + end:
        raise UserError(f"base_model: {path} has {size} bytes where its header says {8 + length + end}; {REFETCH}")
    return tensors


def _is_entry(entry: object) -> bool:
    """Whether a header's entry has the form that the format prescribes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    return lists and all(type(size) is int and size >= 0 for size in [*shape, *offsets])
