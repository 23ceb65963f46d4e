"""The base model's weights: checked before launch, then streamed so that a rank reads only the slices it owns.

`check_checkpoint` compares the headers of all safetensors files with the architecture; it reads no weights. `Checkpoint.read` returns one
slice of one tensor, `RandomTensors.read` the same slice of a random tensor that depends on the seed and the tensor's name alone, so that
any layout of ranks gets the same model. `load` fills parts of parameters from either.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lora.architecture import Architecture
from megatron_lora.errors import UserError

Index = tuple[slice, ...]
SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a parameter and where it comes from: `target` is a view that takes `index` of the tensor `name`."""

    target: Tensor
    name: str
    index: Index


class Source(Protocol):
    """Where slices of tensors come from."""

    def read(self, name: str, index: Index) -> Tensor: ...


def load(parts: Iterable[Part], source: Source) -> None:
    """Fill parts of parameters, one slice at a time, converting to the parameter's dtype and device."""
    with torch.no_grad():
        for part in parts:
            part.target.copy_(source.read(part.name, part.index))


class Checkpoint:
    """The safetensors files of a model directory, opened as they are needed. `bytes_read` counts what was read of the tensors."""

    def __init__(self, model_dir: str | Path):
        self.files = tensor_files(Path(model_dir))
        self.opened: dict[Path, safe_open] = {}
        self.bytes_read = 0

    def read(self, name: str, index: Index) -> Tensor:
        """Return one slice of one tensor. Raises UserError naming file and tensor."""
        path = self.files.get(name)
        if path is None:
            raise UserError(f"base_model: the tensor {name} is in none of the safetensors files; fetch the model again")
        try:
            if path not in self.opened:
                self.opened[path] = safe_open(path, framework="pt", device="cpu")
            values = self.opened[path].get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise UserError(f"base_model: {path}: the tensor {name} cannot be read ({error}); fetch the file again") from None
        self.bytes_read += values.nbytes
        return values


class RandomTensors:
    """Random weights for runs without a checkpoint: norms 1, biases 0, matrices normal with standard deviation 0.02."""

    def __init__(self, architecture: Architecture, seed: int, dtype: torch.dtype, device: torch.device):
        self.shapes, self.seed, self.dtype, self.device = architecture.tensor_shapes(), seed, dtype, device

    def read(self, name: str, index: Index) -> Tensor:
        """Return one slice of the tensor, drawn whole from a stream of its own."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), dtype=self.dtype, device=self.device)[index]
        key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator(device=self.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0.0, 0.02, generator=generator)[index]


def check_checkpoint(model_dir: str | Path, architecture: Architecture) -> None:
    """Check every safetensors header against the architecture, without reading weights. Raises UserError naming file and tensor."""
    expected = architecture.tensor_shapes()
    found: dict[str, Path] = {}
    files = tensor_files(Path(model_dir))
    for path in sorted(set(files.values())):
        for name, entry in _header(path).items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            found[name] = path
            if name not in expected:
                if not _harmless(name, architecture):
                    raise UserError(
                        f"base_model: {path}: the tensor {name} is no part of a {architecture.model_type} as config.json has it"
                    )
            elif shape != expected[name]:
                raise UserError(f"base_model: {path}: the tensor {name} has shape {list(shape)}, config.json needs {list(expected[name])}")
            elif dtype not in DTYPES:
                raise UserError(f"base_model: {path}: the tensor {name} is stored as {dtype}; supported are {', '.join(DTYPES)}")
    for name in expected:
        if found.get(name) is None or found[name] != files.get(name):
            where = files.get(name, Path(model_dir))
            raise UserError(f"base_model: {where}: the tensor {name} is missing; fetch the model again")


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Return the file that holds each tensor, from the index of a sharded checkpoint or the single file's header."""
    index = model_dir / SHARDED
    if not index.is_file():
        single = model_dir / SINGLE
        if not single.is_file():
            raise UserError(f"base_model: {model_dir} holds neither {SINGLE} nor {SHARDED}; only safetensors checkpoints are read")
        return dict.fromkeys(_header(single), single)
    try:
        files = {name: model_dir / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"base_model: {index} is not a safetensors index with a weight_map; fetch the file again") from None
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"base_model: {path}, named by {index.name}, does not exist; fetch the model again")
    return files


def _header(path: Path) -> dict[str, dict]:
    """Return name -> {dtype, shape, data_offsets} of one file, whose size must be what the header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        widths = {"F32": 4, "BF16": 2, "F16": 2}
        for entry in tensors.values():
            first, last = entry["data_offsets"]
            assert entry["dtype"] not in widths or last - first == math.prod(entry["shape"]) * widths[entry["dtype"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError):
        raise UserError(f"base_model: {path} is not a safetensors file or is damaged; fetch the file again") from None
    if size != 8 + length + end:
        raise UserError(f"base_model: {path} has {size} bytes but its header says {8 + length + end}; fetch the file again")
    return tensors


def _harmless(name: str, architecture: Architecture) -> bool:
    """Tell whether an extra tensor says nothing that is not known: a stored rotary table, a copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (architecture.tied_head and name == "lm_head.weight")
