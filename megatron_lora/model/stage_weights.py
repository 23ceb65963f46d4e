"""Which part of which checkpoint tensor each of a stage's parameters is loaded from (huggingface/weight_slices.py).

load(parts_of(stage), Checkpoint(model_dir, architecture))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from torch import Tensor

from megatron_lora.huggingface.architecture import EMBEDDING, HEAD
from megatron_lora.huggingface.weight_slices import Part
from megatron_lora.model.linears import MultiLoraLinear
from megatron_lora.model.norm import RMSNorm

if TYPE_CHECKING:
    from megatron_lora.model.stage import Stage


def parts_of(stage: Stage) -> Iterator[Part]:
    """Yield each part of this rank's parameters, with the name and slice of the checkpoint tensor that it is loaded from."""
    everything, architecture = slice(None), stage.architecture
    if stage.is_first:
        yield _vocabulary_part(stage, stage.model.embedding.word_embeddings.weight, EMBEDDING)
    for layer, block in zip(stage.layers, stage.blocks, strict=True):
        norms = dict(zip(architecture.family.norms, block.norms, strict=True))
        if architecture.qk_norm:
            attention = block.self_attention
            norms |= {"self_attn.q_norm": attention.q_layernorm, "self_attn.k_norm": attention.k_layernorm}
        for name, norm in norms.items():
            yield Part(target=norm.weight, name=f"model.layers.{layer}.{name}.weight", index=(everything,))
    for linear in stage.linears:
        yield from _linear_parts(linear)
    if stage.is_last:
        yield Part(target=cast(RMSNorm, stage.model.decoder.final_layernorm).weight, name="model.norm.weight", index=(everything,))
        if not (architecture.tied_head and stage.is_first):
            weight = stage.model.output_layer.weight
            assert weight is not None
            yield _vocabulary_part(stage, weight, EMBEDDING if architecture.tied_head else HEAD)


def _vocabulary_part(stage: Stage, weight: Tensor, name: str) -> Part:
    first = stage.tensor_group.rank() * weight.shape[0]
    rows = min(weight.shape[0], stage.architecture.vocab_size - first)
    return Part(target=weight[:rows], name=name, index=(slice(first, first + rows), slice(None)))


def _linear_parts(linear: MultiLoraLinear) -> Iterator[Part]:
    """Yield the parts of a linear, one per module and parameter: this rank's rows (column-parallel) or columns (row-parallel)."""
    geometry, rank, everything = linear.geometry, linear.tp_group.rank(), slice(None)
    for path, (start, stop) in zip(geometry.paths, geometry.columns, strict=True):
        if geometry.parallel == "column":
            index = (slice(rank * (stop - start), (rank + 1) * (stop - start)), everything)
        else:
            index = (everything, slice(geometry.first_feature, geometry.first_feature + geometry.in_features))
        yield Part(target=linear.weight[start:stop], name=f"{path}.weight", index=index)
        if linear.bias is not None:
            yield Part(target=linear.bias[start:stop], name=f"{path}.bias", index=index[:1])
