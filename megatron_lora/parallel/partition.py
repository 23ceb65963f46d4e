"""Divides a model over the ranks: the layers of each stage, their recomputation policies, and whether a layout fits the model."""

from __future__ import annotations

from itertools import accumulate

from megatron_lora.config.rules import show, storage_and_compute
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.quantisation import NF4_BLOCK


def layers_of_stages(num_layers: int, parallel: ParallelConfig) -> tuple[range, ...]:
    """Return the layers of each pipeline stage: by `layers_per_stage`, otherwise evenly, the first stages taking the remainder."""
    counts = parallel.layers_per_stage
    if counts is None:
        least, remainder = divmod(num_layers, parallel.pipeline)
        counts = tuple(least + (stage < remainder) for stage in range(parallel.pipeline))
    return tuple(range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True))


def recompute_of_layers(recompute: str | tuple[str, ...], num_layers: int) -> tuple[str, ...]:
    """Return each layer's policy; one word applies to all layers; UserError for a list whose length is not `num_layers`."""
    assert recompute != "auto", "auto is resolved before a model is built (resolve.py)"
    policies = (recompute,) * num_layers if isinstance(recompute, str) else recompute
    if len(policies) != num_layers:
        raise UserError(
            f"recompute: {len(policies)} policies do not fit the model's {num_layers} layers; give {num_layers}, or one word for all layers"
        )
    return policies


def check_layout(architecture: Architecture, parallel: ParallelConfig, base_weights: str = "native") -> None:
    """Raise UserError, naming the key, if the model cannot be divided over the ranks, or its weights not into blocks of NF4."""
    heads = {"query heads": architecture.num_heads, "key/value heads": architecture.num_kv_heads}
    features = {"feed-forward features": architecture.ffn_size} if parallel.expert == 1 else {}
    for what, size in (heads | features).items():
        if size % parallel.tensor:
            raise UserError(f"parallel.tensor: {parallel.tensor} does not divide the model's {size} {what}; use a divisor of {size}")
    if parallel.expert > 1 and (not architecture.num_experts or architecture.num_experts % parallel.expert):
        has = f"{architecture.num_experts} experts, which it does not divide" if architecture.num_experts else "no experts"
        raise UserError(f"parallel.expert: {parallel.expert}, and the model's layers have {has}; set it to 1")
    if parallel.pipeline > architecture.num_layers:
        raise UserError(
            f"parallel.pipeline: {parallel.pipeline} stages are more than the model's {architecture.num_layers} layers; use fewer stages"
        )
    of_rows = architecture.num_heads * architecture.head_dim, architecture.ffn_size
    odd = [size for size in (architecture.hidden_size, *(n // parallel.tensor for n in of_rows)) if size % NF4_BLOCK]
    if storage_and_compute(base_weights)[0] == "nf4" and odd:
        raise UserError(
            f"base_weights: {base_weights!r}: a rank's linears with {odd[0]} inputs are not made of blocks of {NF4_BLOCK}; "
            "use fewer tensor ranks, or another storage"
        )
    if architecture.num_experts and base_weights != "native":
        raise UserError(f"base_weights: {show(base_weights)}: experts are frozen in `precision` alone; set base_weights: native")
    counts = parallel.layers_per_stage
    if counts is not None and (len(counts) != parallel.pipeline or sum(counts) != architecture.num_layers or min(counts) < 1):
        raise UserError(
            f"parallel.layers_per_stage: {list(counts)} does not cut {architecture.num_layers} layers into {parallel.pipeline} stages; "
            f"give {parallel.pipeline} numbers of at least 1 that sum to {architecture.num_layers}"
        )
