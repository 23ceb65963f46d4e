"""The families of base models, as data: what tells one from another, in config.json, in the files and in what is computed.

Every family is a decoder of layers with grouped-query attention and a gated MLP, or experts, each of which is one. What differs
stands in its `Family`; no other file asks for a model type. A new dense family is an entry here, and its rows in tests/tiny.py.

    FAMILIES["granite"].multipliers["logits_scaling"]        # ("logit_divisor", 1.0): the field of Architecture, and the power
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEPARATE = {"qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",), "fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)}
FUSED = {**SEPARATE, "qkv": ("qkv_proj",), "fc1": ("gate_up_proj",)}  # q, k and v, or gate and up, are one module with one A and one B
ATTENTION = {linear: SEPARATE[linear] for linear in ("qkv", "proj")}  # beside experts, which are no linears of their layer
BEFORE = ("input_layernorm", "post_attention_layernorm")  # norms before attention and before the MLP
AROUND = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")  # and after each
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}  # activation of the gate -> its names in config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What a family's experts are called, in config.json and in the files."""

    block: str  # of a layer: <block>.gate.weight is the router's, <block>.experts.<expert>.<module>.weight an expert's
    modules: tuple[str, str, str]  # gate, up and down
    width: str  # config key of an expert's features
    counts: tuple[str, ...]  # config keys of the number of experts; the first is the published one, transformers may write another
    always_normalised: bool = False  # the chosen experts' probabilities, to the sum 1; else where norm_topk_prob says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model type.

    `windows` says which layers attend within `sliding_window`, where config.json has no `layer_types`: "none"; "all"; "flag": those from
    max_window_layers on, if use_sliding_window; "without rope": those without a rotary embedding, if use_sliding_window; "always": all
    (where use_sliding_window has a default: if it is set), and layer_types must agree; "pattern": all but every sliding_window_pattern-th.
    """

    defaults: Mapping[str, Any]  # what transformers uses for a key that config.json does not have
    keys: tuple[str, ...] = ()  # of config.json, which families without them do not read
    biases: tuple[str, ...] = ()  # keys that it honours; other linears have no bias
    qkv_bias: bool = False  # q, k and v always have one
    linears: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SEPARATE)  # Megatron's linear -> the modules that it merges
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    norms: tuple[str, ...] = BEFORE
    qk_norm: bool = False  # q and k are normed by head
    zero_centred: bool = False  # a norm multiplies by 1 + its weight
    local_rope: bool = False  # layers with a window have a rotary embedding of their own
    scaled_embedding: bool = False  # by sqrt(hidden_size), rounded to the compute dtype
    windows: str = "none"
    activation: str = "silu"
    multipliers: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # config key -> field of Architecture, and the power of it
    experts: ExpertNames | None = None  # in place of the MLP in every layer


# Checkpoints of text and images -> the family of their text part, which is trained alone.
MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Model types that are refused -> the nearest family, and what differs.
_EXPERTS = "a mixture of experts"
OTHERS: dict[str, tuple[str, str]] = {
    "gemma": ("gemma2", "no norms after attention and MLP"),
    "gemma3n": ("gemma3_text", "embeddings of every layer, and layers that share keys and values"),
    "ministral3": ("ministral", "queries that are scaled by their position"),
    "phi": ("phi3", "attention and MLP side by side"),
    "mllama": ("llama", "layers that attend to an image"),
    **dict.fromkeys(("llama4", "llama4_text"), ("llama", f"{_EXPERTS}, and attention in chunks")),
    **dict.fromkeys(("olmo2", "olmo3"), ("llama", "norms after attention and MLP alone")),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("llama", f"latent attention (MLA) and {_EXPERTS}")),
    "gpt_oss": ("qwen3", f"{_EXPERTS}, and attention sinks"),
    "qwen2_moe": ("qwen3_moe", "an expert that every token has"),
    "granitemoe": ("granite", _EXPERTS),
    "phimoe": ("mixtral", "norms with a bias, and another choice of experts"),
    **dict.fromkeys(("qwen3_next", "jamba", "falcon_h1", "nemotron_h"), ("llama", "layers that are no attention")),
    "granitemoehybrid": ("granite", "layers that are no attention"),
}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False}
_GRANITE = {
    "embedding_multiplier": ("embedding_scale", 1.0),
    "attention_multiplier": ("softmax_scale", 1.0),
    "residual_multiplier": ("residual_scale", 1.0),
    "logits_scaling": ("logit_divisor", 1.0),
}
_GEMMA = {
    **{"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    **{"query_pre_attn_scalar": 256, "final_logit_softcapping": None, "attn_logit_softcapping": None},
}
_GEMMA_KEYS = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")
_GEMMA_SCALES = {"query_pre_attn_scalar": ("softmax_scale", -0.5), "final_logit_softcapping": ("logit_cap", 1.0)}
_GEMMA_LAYERS: dict[str, Any] = {
    **{"biases": ("attention_bias",), "norms": AROUND, "windows": "pattern", "activation": "gelu_tanh"},
    **{"zero_centred": True, "scaled_embedding": True},
}
FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"num_key_value_heads": None}, biases=("attention_bias", "mlp_bias")),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, windows="flag"),
    "qwen3": Family(defaults={**_QWEN, "head_dim": 128}, biases=("attention_bias",), qk_norm=True, windows="flag"),
    "ministral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"),
    "granite": Family(
        defaults={"num_key_value_heads": None, **dict.fromkeys(_GRANITE, 1.0)},
        keys=tuple(_GRANITE),
        biases=("attention_bias", "mlp_bias"),
        multipliers=_GRANITE,
    ),
    "phi3": Family(
        defaults={"num_key_value_heads": None, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        keys=("partial_rotary_factor",),
        linears=FUSED,
        ropes=("default", "longrope"),
        windows="always",
    ),
    "qwen3_moe": Family(
        defaults={
            **{"num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False, "num_experts": 128},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
        },
        keys=("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        biases=("attention_bias",),
        linears=ATTENTION,
        qk_norm=True,
        windows="always",
        experts=ExpertNames(
            block="mlp",
            modules=("gate_proj", "up_proj", "down_proj"),
            width="moe_intermediate_size",
            counts=("num_experts", "num_local_experts"),
        ),
    ),
    "mixtral": Family(
        defaults={
            **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
            **{"num_local_experts": 8, "num_experts_per_tok": 2},
        },
        keys=("num_experts", "num_local_experts", "num_experts_per_tok"),
        linears=ATTENTION,
        windows="always",
        experts=ExpertNames(
            block="block_sparse_moe",
            modules=("w1", "w3", "w2"),
            width="intermediate_size",
            counts=("num_local_experts", "num_experts"),
            always_normalised=True,
        ),
    ),
    "smollm3": Family(
        defaults={
            **{"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "use_sliding_window": False},
            **{"no_rope_layers": None, "no_rope_layer_interval": 4},
        },
        keys=("no_rope_layers", "no_rope_layer_interval"),
        biases=("attention_bias", "mlp_bias"),
        windows="without rope",
    ),
    "gemma2": Family(
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        keys=_GEMMA_KEYS,
        multipliers={**_GEMMA_SCALES, "attn_logit_softcapping": ("attention_cap", 1.0)},
        **_GEMMA_LAYERS,
    ),
    "gemma3_text": Family(
        defaults={**_GEMMA, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        keys=(*_GEMMA_KEYS, "sliding_window_pattern", "rope_local_base_freq"),
        multipliers=_GEMMA_SCALES,
        qk_norm=True,
        local_rope=True,
        **_GEMMA_LAYERS,
    ),
}
