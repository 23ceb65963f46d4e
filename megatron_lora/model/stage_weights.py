"""Which part of which checkpoint tensor each of a stage's parameters is loaded from (huggingface/weight_slices.py).

load(parts_of(model, architecture, layers, linears, tensor_rank), Checkpoint(model_dir, architecture))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lora.huggingface.architecture import HEAD, Architecture
from megatron_lora.huggingface.weight_slices import Part
from megatron_lora.model.decoder import DecoderLayer
from megatron_lora.model.linears import MultiLoraLinear
from megatron_lora.model.norm import RMSNorm


def parts_of(
    model: GPTModel, architecture: Architecture, layers: range, linears: Sequence[MultiLoraLinear], tensor_rank: int
) -> Iterator[Part]:
    """Yield each part of this rank's parameters, with the name and slice of the checkpoint tensor that it is loaded from."""

    def vocabulary(weight: Tensor, name: str) -> Part:
        first = tensor_rank * weight.shape[0]
        rows = min(weight.shape[0], architecture.vocab_size - first)
        return Part(target=weight[:rows], name=name, index=(slice(first, first + rows), slice(None)))

    def norm_part(norm: object, name: str) -> Part:
        return Part(
            target=cast(RMSNorm, norm).weight, name=f"{name}.weight", index=(slice(None),), plus=float(architecture.family.zero_centred)
        )

    if model.pre_process:
        yield vocabulary(model.embedding.word_embeddings.weight, architecture.embedding)
    for layer, block in zip(layers, cast(Sequence[DecoderLayer], model.decoder.layers), strict=True):
        norms = dict(zip(architecture.family.norms, block.norms, strict=True))
        if architecture.qk_norm:
            attention = block.self_attention
            norms |= {"self_attn.q_norm": attention.q_layernorm, "self_attn.k_norm": attention.k_layernorm}
        for name, norm in norms.items():
            yield norm_part(norm, f"{architecture.prefix}.layers.{layer}.{name}")
        if block.experts is not None:
            yield from block.experts.parts(layer)
    for linear in linears:
        yield from _linear_parts(linear)
    if model.post_process:
        yield norm_part(model.decoder.final_layernorm, f"{architecture.prefix}.norm")
        if not (architecture.tied_head and model.pre_process):
            assert model.output_layer.weight is not None
            yield vocabulary(model.output_layer.weight, architecture.embedding if architecture.tied_head else HEAD)


def _linear_parts(linear: MultiLoraLinear) -> Iterator[Part]:
    """Yield the parts of a linear's bias, and of its weight unless that is quantised (base_weights.py)."""
    for start, number, name, index in weight_pieces(linear):
        if not linear.weight.is_meta:
            yield Part(target=linear.weight[start : start + number], name=name, index=index)
        if linear.bias is not None:
            bias = f"{name.removesuffix('weight')}bias"
            yield Part(target=linear.bias[start : start + number], name=bias, index=index[:1])


def weight_pieces(linear: MultiLoraLinear) -> Iterator[tuple[int, int, str, tuple[slice, slice]]]:
    """Yield (first row, rows, tensor, its slice) of a linear's weight: rows of each module (column-parallel), or columns (row-parallel)."""
    geometry, rank, everything = linear.geometry, linear.tp_group.rank(), slice(None)
    for index, (path, (start, _)) in enumerate(zip(geometry.paths, geometry.columns, strict=True)):
        for first, number in geometry.pieces(index, rank):
            rows, columns = slice(first, first + number), everything
            if geometry.parallel == "row":
                columns = slice(geometry.first_feature, geometry.first_feature + geometry.in_features)
            yield start, number, f"{path}.weight", (rows, columns)
            start += number
