"""What a base model is, as its config.json says. No tensors, no torch.

`read_architecture(model_dir)` turns a Hugging Face `config.json` of a Llama, Mistral, Qwen2 or
Qwen3 into an `Architecture`. A missing key has the default that transformers gives it (`DEFAULTS`).
A value that this trainer does not support is a UserError, because a model built without it would
silently be wrong. `tensor_shapes` says which tensors the checkpoint must hold, and `module_sizes`
which linear layers can have an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError

MERGED_LINEARS = {"qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",), "fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)}
# What transformers uses for a key that config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "head_dim": 128,
    },
}
LARGEST_COUNT = 2**31 - 1  # the largest value of any count in config.json
MOST_LAYERS = 10_000
ROPE_KEYS = {  # the numbers that each kind of rotary embedding needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base frequency `theta` and how it is stretched to longer contexts (`kind`)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What it takes to build the model. `sliding_windows`: for each layer the number of visible tokens, itself included, or None."""

    model_type: str
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool

    @property
    def module_sizes(self) -> dict[str, tuple[int, int]]:
        """The modules of each layer that can have an adapter, with their (in, out) features."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, queries),
            "k_proj": (self.hidden_size, keys),
            "v_proj": (self.hidden_size, keys),
            "o_proj": (queries, self.hidden_size),
            "gate_proj": (self.hidden_size, self.ffn_size),
            "up_proj": (self.hidden_size, self.ffn_size),
            "down_proj": (self.ffn_size, self.hidden_size),
        }

    def module_path(self, layer: int, module: str) -> str:
        """Return the Hugging Face path of a module, for example "model.layers.0.self_attn.q_proj"."""
        block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        return f"model.layers.{layer}.{block}.{module}"

    def has_bias(self, module: str) -> bool:
        """Return whether the base linear `module` has a bias."""
        return {"q_proj": self.qkv_bias, "k_proj": self.qkv_bias, "v_proj": self.qkv_bias, "o_proj": self.o_bias}.get(module, self.mlp_bias)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that the checkpoint must hold, by Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden_size,)
            for norm in ("q_norm", "k_norm") if self.qk_norm else ():
                shapes[f"model.layers.{layer}.self_attn.{norm}.weight"] = (self.head_dim,)
            for module, (num_in, num_out) in self.module_sizes.items():
                shapes[self.module_path(layer, module) + ".weight"] = (num_out, num_in)
                if self.has_bias(module):
                    shapes[self.module_path(layer, module) + ".bias"] = (num_out,)
        return shapes


def read_architecture(model_dir: str | Path) -> Architecture:
    """Read `config.json` of a Hugging Face model directory; UserError for what this trainer does not support."""
    path = Path(model_dir) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"base_model: {path} cannot be read; give a Hugging Face model directory with config.json and safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"base_model: {path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"base_model: {path} holds no object; fetch the file again")
    return _Reader(path, values).architecture()


class _Reader:
    """One config.json, with typed access; errors name the file, the key and the value."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.values = values
        kind = values.get("model_type")
        if not isinstance(kind, str) or kind not in DEFAULTS:
            raise self.error("model_type", kind, f"supported are {', '.join(DEFAULTS)}")
        self.model_type: str = kind
        self.defaults = DEFAULTS[kind]

    def error(self, key: str, value: object, hint: str) -> UserError:
        return UserError(f"base_model: {self.path}: {key} is {value!r}; {hint}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def count(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "a whole number of at least 1 is needed")
        if value > LARGEST_COUNT:
            raise self.error(key, value, f"no model has more than {LARGEST_COUNT:,}; fetch the file again")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false is needed")
        return value

    def number(self, values: Mapping[str, Any], key: str, prefix: str = "") -> float:
        value = values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(prefix + key, value, "a positive number is needed")
        return float(value)

    def architecture(self) -> Architecture:
        self.refuse_unsupported()
        heads = self.count("num_attention_heads")
        if self.get("head_dim") is None and self.count("hidden_size") % heads:
            raise self.error("num_attention_heads", heads, f"it must divide hidden_size {self.get('hidden_size')} where head_dim is absent")
        kv_heads = self.count("num_key_value_heads") if self.get("num_key_value_heads") is not None else heads
        if heads % kv_heads:
            raise self.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads} is needed")
        head_dim = self.count("head_dim") if self.get("head_dim") is not None else self.count("hidden_size") // heads
        if head_dim % 2:
            raise self.error("head_dim", head_dim, "an even number is needed")
        if self.count("num_hidden_layers") > MOST_LAYERS:
            raise self.error("num_hidden_layers", self.get("num_hidden_layers"), f"at most {MOST_LAYERS:,} are supported")
        attention_bias = self.model_type in ("llama", "qwen3") and self.flag("attention_bias")
        return Architecture(
            model_type=self.model_type,
            hidden_size=self.count("hidden_size"),
            ffn_size=self.count("intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.count("vocab_size"),
            max_positions=self.count("max_position_embeddings"),
            norm_eps=self.number({"rms_norm_eps": self.get("rms_norm_eps", 1e-6)}, "rms_norm_eps"),
            rope=self.rope(),
            sliding_windows=self.sliding_windows(self.count("num_hidden_layers")),
            qkv_bias=attention_bias or self.model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=self.model_type == "llama" and self.flag("mlp_bias"),
            qk_norm=self.model_type == "qwen3",
            tied_head=self.flag("tie_word_embeddings"),
        )

    def refuse_unsupported(self) -> None:
        if self.get("hidden_act", "silu") != "silu":
            raise self.error("hidden_act", self.get("hidden_act"), "only silu is supported")
        if self.get("attention_dropout"):
            raise self.error("attention_dropout", self.get("attention_dropout"), "only 0.0 is supported")
        if self.get("quantization_config"):
            method = (self.get("quantization_config") or {}).get("quant_method")
            raise self.error("quantization_config", method, "use a checkpoint in bf16 or fp32, without this key")
        if self.get("partial_rotary_factor", 1.0) not in (1, None):
            raise self.error("partial_rotary_factor", self.get("partial_rotary_factor"), "only 1.0 is supported")

    def sliding_windows(self, num_layers: int) -> tuple[int | None, ...]:
        window = self.get("sliding_window")
        if self.model_type == "llama" or window is None:
            return (None,) * num_layers
        window = self.count("sliding_window")
        if self.model_type == "mistral":
            return (window,) * num_layers
        if not self.flag("use_sliding_window"):
            return (None,) * num_layers
        kinds = self.get("layer_types")
        if kinds is None:
            first = self.get("max_window_layers")
            if not isinstance(first, int) or first < 0:
                raise self.error("max_window_layers", first, "a whole number of at least 0 is needed")
            kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise self.error("layer_types", kinds, f"{num_layers} entries, each full_attention or sliding_attention, are needed")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def rope(self) -> Rope:
        """Read `rope_parameters` (since transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        where = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        values = {} if self.get(where) is None else self.get(where)
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            raise self.error(where, values, "one set of numbers for all layers is supported")
        theta = values.get("rope_theta", self.get("rope_theta", 10000.0))
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in ROPE_KEYS:
            raise self.error(f"{where}.rope_type", kind, f"supported are {', '.join(ROPE_KEYS)}")
        if values.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.error(f"{where}.partial_rotary_factor", values["partial_rotary_factor"], "only 1.0 is supported")
        original_len = self.get("original_max_position_embeddings")  # at the top level it overrides the nested one, as in transformers
        values = {"original_max_position_embeddings": self.get("max_position_embeddings"), **values}
        values.update({"original_max_position_embeddings": original_len} if original_len else {})
        needed = {key: self.number(values, key, f"{where}.") for key in ROPE_KEYS[kind]}
        optional = {}
        if kind == "yarn":
            keys = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
            optional = {key: self.number(values, key, f"{where}.") for key in keys if values.get(key)}
            optional["truncate"] = bool(values.get("truncate", True))
        return Rope(
            theta=self.number({"rope_theta": theta}, "rope_theta"),
            kind=kind,
            factor=needed.get("factor", 1.0),
            original_max_positions=needed.get("original_max_position_embeddings", 0.0),
            low_freq_factor=needed.get("low_freq_factor", 1.0),
            high_freq_factor=needed.get("high_freq_factor", 4.0),
            **optional,
        )
