"""The frozen linears' weights as `base_weights` stores them, quantised while they are streamed, a tensor of the checkpoint at a time.
What a checkpoint holds in the same storage is kept as it is (huggingface.quantised_tensors).

    native        a parameter in `precision`, loaded by weight_slices.load
    fp8           two copies in 8 bits, of the weight in `precision`
    fp8/COMPUTE   one copy in 8 bits, of this rank's slice: a power of two for each output rounds a slice as it rounds the whole
    nf4/COMPUTE   bitsandbytes' NF4 of the whole tensor, of which this rank keeps its slice

Megatron's linears have a weight on the meta device until they are filled, so that a model never exists in 16 bits as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ops.lora.fp8 import DTYPE, Fp8Matrix, quantise_rows, quantise_weight
from fused_ops.lora.nf4 import BLOCK, Nf4Matrix, quantise_nf4
from fused_ops.lora.packed import Scratch, pack
from megatron_lora.config.rules import storage_and_compute
from megatron_lora.huggingface.weight_slices import Index, Part, Source, finite, load
from megatron_lora.model.linears import MultiLoraLinear
from megatron_lora.model.stage_weights import weight_pieces


def fill(linears: Sequence[MultiLoraLinear], source: Source, base_weights: str, dtype: torch.dtype, device: torch.device) -> None:
    """Give each linear its frozen weight; UserError for a tensor that is missing or not finite."""
    storage, compute = storage_and_compute(base_weights)
    scratch, quantise = Scratch(), {"bf16": None, "fp8": _fp8, "nf4": _nf4}[storage]
    with torch.no_grad():
        for linear in linears:
            if quantise is None:
                weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
                targets = ((weight[start : start + number], name, index) for start, number, name, index in weight_pieces(linear))
                load((Part(target=target, name=name, index=index) for target, name, index in targets), source)
                linear.freeze_as(quantise_weight(weight))
            else:
                linear.freeze_as(pack(quantise(linear, source, device), dtype, compute == "fp8", scratch))


def _fp8(linear: MultiLoraLinear, source: Source, device: torch.device) -> Fp8Matrix:
    rows, cols = linear.weight.shape
    values, scales = torch.empty(rows, cols, dtype=DTYPE, device=device), torch.empty(rows, device=device)
    for start, number, name, index in weight_pieces(linear):
        if not isinstance(piece := source.packed(name, index), Fp8Matrix):
            piece = quantise_rows(_read(source, name, index, device))
        values[start : start + number], scales[start : start + number] = piece.values, finite(piece.scales, name)
        finite(values[start : start + number].to(torch.bfloat16), name)
    return Fp8Matrix(values=values, scales=scales)


def _nf4(linear: MultiLoraLinear, source: Source, device: torch.device) -> Nf4Matrix:
    rows, cols = linear.weight.shape
    codes = torch.empty(rows, cols // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(rows, cols // BLOCK, device=device)
    for start, number, name, index in weight_pieces(linear):
        if not isinstance(part := source.packed(name, index), Nf4Matrix):
            part = quantise_nf4(_read(source, name, (slice(None), slice(None)), device)).part(*index)
        codes[start : start + number], absmax[start : start + number] = part.codes, finite(part.absmax, name)
    return Nf4Matrix(codes=codes, absmax=absmax)


def _read(source: Source, name: str, index: Index, device: torch.device) -> Tensor:
    return finite(source.read(name, index).to(device), name)
