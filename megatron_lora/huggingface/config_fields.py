"""What becomes of each field of a base model's config.json: used, refused, without effect, or shown as not read.

`USED` names the fields that architecture.py reads. `REFUSED` names fields that would change what the
model computes and are not supported, with the values that change nothing. `WITHOUT_EFFECT` names
fields that do not change the logits, in transformers either. Any other field is not read, by
transformers' classes of these models either, and a run names it once. docs/models.md shows these
tables, and a test walks every field of transformers' config classes through them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_lora.huggingface.families import FAMILIES
from megatron_lora.huggingface.quantisation import READ

# Fields that some families read; for others they are among those that are not read.
OF_FAMILIES: dict[str, str] = {
    key: "; ".join(name for name, family in FAMILIES.items() if key in family.keys)
    for key in dict.fromkeys(key for family in FAMILIES.values() for key in family.keys)
}
USED: dict[str, str] = {
    "model_type": ", ".join(FAMILIES),
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers"), ""),
    "intermediate_size": "qwen3_moe has moe_intermediate_size, since all of its layers have experts",
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), ""),
    "max_position_embeddings": "no record may be longer; YaRN gives factor times the original length",
    "rms_norm_eps": "",
    "hidden_act": "silu, or its other name swish; gemma2, gemma3_text: gelu_pytorch_tanh",
    "tie_word_embeddings": "where the files hold both matrices, both are loaded",
    "attention_bias": "llama, qwen3; another value than the model type has is refused for mistral and qwen2",
    "mlp_bias": "llama; true is refused for the others",
    "sliding_window": "mistral, mixtral, qwen2, qwen3, qwen3_moe; one that is shorter than the positions is refused for llama",
    "use_sliding_window": "qwen2, qwen3; false beside a window is refused for mistral",
    "max_window_layers": "qwen2, qwen3; another number than 0 beside a window is refused for mistral",
    "layer_types": "all; sliding layers are refused where the model type has no window",
    "rope_parameters": "default, linear, llama3, yarn; phi3: default, longrope; one set for all layers, gemma3_text: two",
    "rope_scaling": "the older name of rope_parameters; it goes before it",
    "rope_theta": "where rope_parameters does not have it",
    "original_max_position_embeddings": "goes before the one in rope_parameters",
    **OF_FAMILIES,
}
# The values that change nothing, and the hint for any other.
REFUSED: dict[str, tuple[tuple, str]] = {
    "hidden_act": (("silu", "swish"), "only the activation of the model type is supported"),
    "hidden_activation": ((None, "silu", "swish"), "only the activation of the model type is supported"),
    "use_bidirectional_attention": ((False, None), "a model that also sees later tokens cannot be trained to predict them"),
    "attention_dropout": ((0, None), "only 0.0 is supported"),
    "quantization_config": ((None,), READ),
    "compression_config": ((None, {}), "use a checkpoint in bf16 or fp32, without this key"),
    "partial_rotary_factor": ((1, None), "only 1.0 is supported"),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop"), ((0, None), "only 0.0 is supported")),
    "is_causal": ((True,), "a model that also sees later tokens cannot be trained to predict them; use a causal one"),
    "attention_chunk_size": ((None,), "attention in chunks is not supported; use a model without it"),
    "decoder_sparse_step": ((1, None), "layers without experts are not supported; use a model whose layers all have them"),
    "mlp_only_layers": (([], None), "layers without experts are not supported; use a model whose layers all have them"),
    "router_jitter_noise": ((0, None), "only 0.0 is supported"),
    "per_layer_config": ((None, {}), "layers that differ are not supported; use a model of equal layers"),
    **dict.fromkeys(
        ("text_config", "decoder", "generator", "text_encoder", "vision_config", "audio_config"),
        ((None,), "use a model of text alone, with its own config.json"),
    ),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), ((False, None), "use a model that is a decoder alone")),
    "pruned_heads": ((None, {}), "use a model with all of its heads"),
    "transformers_weights": ((None,), "rename the file that it names to model.safetensors, and remove the key"),
    "configuration_files": (([],), "give the directory one config.json, without this key"),
    "attribute_map": (({},), "write the fields under their own names, without this key"),
}
WITHOUT_EFFECT: dict[str, str] = {
    "architectures": "the causal model of the model type is built",
    **dict.fromkeys(("dtype", "torch_dtype"), "the key precision decides"),
    "initializer_range": "weights are loaded",
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), "of the router's loss; the router is frozen"),
    **dict.fromkeys(("pretraining_tp", "chunk_size_feed_forward"), "the same sums, in parts"),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), "the tokenizer's is used"),
    "cache_implementation": "of generation",
    "_sliding_window_pattern": "layer_types says it",
    "pad_token_id": "samples are packed without padding",
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "use_cache", "gradient_checkpointing"), "of running"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"), "of running"),
    **dict.fromkeys(("id2label", "label2id", "problem_type", "num_labels", "classifier_dropout"), "of classifiers"),
    **dict.fromkeys(
        ("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_class", "unsloth_version", "unsloth_fixed"),
        "a description",
    ),
    **dict.fromkeys(
        (
            *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
            *("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty"),
            *("encoder_repetition_penalty", "exponential_decay_length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
            *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
            *("forced_eos_token_id", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens", "assistant_lookbehind"),
            *("assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
        ),
        "of generation",
    ),
}
# The numbers that each kind of rotary embedding needs, and those that it may have.
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
LONGROPE_LISTS = ("short_factor", "long_factor")
YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
OPTIONS = {"yarn": YARN_OPTIONS, "longrope": (*LONGROPE_LISTS, "factor", "attention_factor")}
ROPE_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def unread(values: Mapping[str, Any], own: Collection[str], rope_key: str, rope: Mapping[str, Any], rope_kind: str) -> tuple[str, ...]:
    """Return the fields of a config.json, and of its rotary embedding, that nothing reads, sorted.

    A field that another one goes before is among them where the two differ, and so is one of `OF_FAMILIES` that is not of its `own`.
    """
    known = (USED.keys() - OF_FAMILIES.keys()) | REFUSED.keys() | WITHOUT_EFFECT.keys() | {*own}
    known_rope = {*ROPE_OF_ALL, *ROPE_NUMBERS[rope_kind], *OPTIONS.get(rope_kind, ())}
    found = [*(values.keys() - known), *(f"{rope_key}.{key}" for key in rope.keys() - known_rope)]
    length, theta = "original_max_position_embeddings", values.get("rope_theta")
    if "rope_theta" in values and rope.get("rope_theta", theta) != theta:
        found.append("rope_theta")
    if values.get(length) is not None and length in ROPE_NUMBERS[rope_kind] and rope.get(length, values[length]) != values[length]:
        found.append(f"{rope_key}.{length}")
    if rope.get("type", rope_kind) != rope_kind:
        found.append(f"{rope_key}.type")
    other = values.get("rope_parameters")
    if rope_key == "rope_scaling" and other and _comparable(other, theta) != _comparable(rope, theta):
        found.append("rope_parameters")
    return tuple(sorted(found))


def _comparable(rope: Mapping[str, Any], theta: object) -> dict[str, Any]:
    """Return a rotary embedding's fields with one name for its kind, and the base frequency that it has."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {**rope, "rope_theta": rope.get("rope_theta", theta), "type": kind, "rope_type": kind}
