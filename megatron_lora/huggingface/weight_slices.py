"""The base model's weights, streamed: a rank reads only the slices that it owns.

`Checkpoint.read` returns one slice of one tensor of the safetensors files, which weight_files.py
has found and checked from their headers. `RandomTensors.read` returns the slice of a random tensor. It depends
on the seed and the tensor's name alone, so that every layout of ranks gets the same model. `load`
fills parts of parameters from either, and refuses numbers that are not finite: the model's outputs
would all be NaN.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fused_ops.lora.fp8 import Fp8Matrix
from fused_ops.lora.nf4 import Nf4Matrix
from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.architecture import HEAD, Architecture
from megatron_lora.huggingface.quantised_tensors import Index, Read, dequantised, packed
from megatron_lora.huggingface.weight_files import StoredTensor, stored_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a parameter and its source: the view `target` gets the slice `index` of the tensor `name`, and `plus`."""

    target: Tensor
    name: str
    index: Index
    plus: float = 0.0


def load(parts: Iterable[Part], source: Source) -> None:
    """Fill parts of parameters, one slice at a time, converting to the parameter's dtype and device; UserError for NaN or inf."""
    with torch.no_grad():
        for part in parts:
            part.target.copy_(source.read(part.name, part.index))
            if part.plus:
                part.target.add_(part.plus)
            finite(part.target, part.name)


def finite(values: Tensor, name: str) -> Tensor:
    """Return the values of a tensor; UserError where one is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise UserError(f"base_model: the tensor {name} holds NaN or infinite numbers; fetch the model again")
    return values


class Checkpoint:
    """The safetensors files of a model directory, one open at a time: what is mapped of files counts as this process's memory.

    `bytes_read` counts the bytes read of tensors.
    """

    def __init__(self, model_dir: str | Path, architecture: Architecture):
        self.stored = stored_tensors(model_dir, architecture)
        assert not architecture.tied_head or self.stored[HEAD] == self.stored[architecture.embedding], (
            "read_base_model says that the head is not tied"
        )
        self.shapes = architecture.tensor_shapes()
        self.opened: tuple[Path, safe_open] | None = None
        self.bytes_read = 0

    def read(self, name: str, index: Index) -> Tensor:
        """Return one slice of one tensor, by its full name; of a quantised one its numbers. Raises UserError naming file and tensor."""
        stored = self._stored(name)
        return dequantised(*self._quantised(stored, name), index) if stored.beside else self._slice(stored, index)

    def packed(self, name: str, index: Index) -> Fp8Matrix | Nf4Matrix | None:
        """Return a slice of a quantised tensor as it is stored (quantised_tensors.packed); None where that cannot be."""
        stored = self._stored(name)
        return packed(*self._quantised(stored, name), index) if stored.beside else None

    def _stored(self, name: str) -> StoredTensor:
        stored = self.stored.get(name)
        if stored is None:
            raise UserError(f"base_model: the tensor {name} is in none of the safetensors files; fetch the model again")
        return stored

    def _quantised(self, stored: StoredTensor, name: str) -> tuple[Read, bool, tuple[int, ...]]:
        """Return what quantised_tensors.py needs: how to read a tensor and what lies beside it, whether it is NF4, and its shape."""
        return lambda what, index=...: self._slice(stored.beside[what] if what else stored, index), stored.is_nf4, self.shapes[name]

    def _slice(self, stored: StoredTensor, index: Any) -> Tensor:
        try:
            if self.opened is None or self.opened[0] != stored.file:
                self.opened = stored.file, safe_open(stored.file, framework="pt", device="cpu")
            values = self.opened[1].get_slice(stored.name)[index]
        except (SafetensorError, OSError) as error:
            why = one_line(error, 160)
            raise UserError(f"base_model: {stored.file}: the tensor {stored.name} cannot be read ({why}); fetch the file again") from None
        self.bytes_read += values.nbytes
        return values


class RandomTensors:
    """Random weights for runs without a checkpoint: norms 1, biases 0, matrices normal with standard deviation 0.02."""

    def __init__(self, architecture: Architecture, seed: int, dtype: torch.dtype, device: torch.device):
        self.shapes = architecture.tensor_shapes()
        self.zero_centred = architecture.family.zero_centred
        self.seed = seed
        self.dtype = dtype
        self.device = device

    def read(self, name: str, index: Index) -> Tensor:
        """Return one slice of the tensor, which is drawn completely, from a generator of its own."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight") and not self.zero_centred), dtype=self.dtype, device=self.device)[index]
        key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator(device=self.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0.0, 0.02, generator=generator)[index]

    def packed(self, name: str, index: Index) -> None:
        """Return None: nothing is stored."""


Source = Checkpoint | RandomTensors
