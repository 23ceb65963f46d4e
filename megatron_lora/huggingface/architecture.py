"""What a base model is, as its config.json says. No tensors, no torch.

`read_architecture(model_dir)` turns a Hugging Face `config.json` of a Llama, Mistral, Qwen2 or
Qwen3 into an `Architecture`. A missing key has the default that transformers gives it (`DEFAULTS`).
A value that this trainer does not support is a UserError, because a model built without it would
silently be wrong; config_fields.py says what becomes of each field. `tensor_shapes` says which
tensors the checkpoint must hold, and `module_sizes` which linear layers can have an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import read_regular
from megatron_lora.huggingface import config_fields

MERGED_LINEARS = {"qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",), "fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What transformers uses for a key that config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False, "head_dim": 128},
}
LARGEST_COUNT = 2**31 - 1  # the largest value of any count in config.json
LARGEST_NUMBER = 1e30  # of any other number in it
MOST_LAYERS = 10_000


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

    @property
    def max_positions(self) -> int:
        """The positions that YaRN stretches its original context to, which model cards leave out of max_position_embeddings; else 0."""
        return int(self.factor * self.original_max_positions) if self.kind == "yarn" else 0


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
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size), "model.norm.weight": (self.hidden_size,)}
        if not self.tied_head:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
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
    return _Reader(Path(model_dir) / "config.json").architecture()


def unread_fields(model_dir: str | Path) -> tuple[str, ...]:
    """Return the fields of `config.json` that neither this trainer nor transformers reads for the model type, sorted."""
    reader = _Reader(Path(model_dir) / "config.json")
    return config_fields.unread(reader.values, *reader.rope_values())


class _Reader:
    """One config.json, with typed access; errors name the file, the key and the value."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values = json.loads(read_regular(path))
        except OSError:
            raise UserError(
                f"base_model: {path} cannot be read; give a Hugging Face model directory with config.json and safetensors"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"base_model: {path} is not valid JSON ({one_line(error, 120)}); fetch the file again") from None
        if not isinstance(self.values, dict):
            raise UserError(f"base_model: {path} holds no object; fetch the file again")
        kind = self.values.get("model_type")
        if not isinstance(kind, str) or kind not in DEFAULTS:
            raise self.error("model_type", kind, f"supported are {', '.join(DEFAULTS)}")
        self.model_type: str = kind
        self.defaults = DEFAULTS[kind]

    def error(self, key: str, value: object, hint: str) -> UserError:
        return UserError(f"base_model: {self.path}: {one_line(key, 100)} is {one_line(repr(value), 160)}; {hint}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def count(self, key: str, least: int = 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, value, f"a whole number of at least {least} is needed")
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
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST_NUMBER:
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
        rope = self.rope()
        return Architecture(
            model_type=self.model_type,
            hidden_size=self.count("hidden_size"),
            ffn_size=self.count("intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.count("vocab_size"),
            max_positions=max(self.count("max_position_embeddings"), rope.max_positions),
            norm_eps=self.number({"rms_norm_eps": self.get("rms_norm_eps", 1e-6)}, "rms_norm_eps"),
            rope=rope,
            sliding_windows=self.sliding_windows(self.count("num_hidden_layers")),
            qkv_bias=attention_bias or self.model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=self.model_type == "llama" and self.flag("mlp_bias"),
            qk_norm=self.model_type == "qwen3",
            tied_head=self.flag("tie_word_embeddings"),
        )

    def refuse_unsupported(self) -> None:
        """Refuse what this trainer does not compute, and what one model type honours and this one would ignore."""
        for key, (harmless, hint) in config_fields.REFUSED.items():
            value = self.get(key, harmless[0])
            if value not in harmless:
                shown = value.get("quant_method", value) if isinstance(value, dict) else value
                raise self.error(key, shown, hint)
        kind, biased = self.model_type, self.model_type == "qwen2"
        if kind in ("mistral", "qwen2") and self.get("attention_bias", biased) != biased:
            hint = "q, k and v of a qwen2 always have a bias" if biased else "the linears of a mistral have no bias"
            raise self.error(
                "attention_bias", self.get("attention_bias"), f"{hint}; remove the key, or use the model_type of these weights"
            )
        if kind != "llama" and self.get("mlp_bias"):
            raise self.error("mlp_bias", self.get("mlp_bias"), f"the MLP of a {kind} has no bias; use the model_type of these weights")
        if kind == "qwen3" and self.get("head_dim") is None:
            raise self.error("head_dim", None, "a whole number of at least 1 is needed")

    def sliding_windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Return each layer's window, as transformers does: a mistral with layer_types is a Ministral there."""
        kinds, window = self.get("layer_types"), self.get("sliding_window")
        if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
            raise self.error("sliding_window", window, "a whole number of at least 1, or null, is needed")
        known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
        if kinds is not None and not (known and len(kinds) == num_layers):
            raise self.error("layer_types", kinds, f"{num_layers} entries, each full_attention or sliding_attention, are needed")
        if self.model_type == "llama":
            if window is not None and window < self.count("max_position_embeddings"):
                raise self.error("sliding_window", window, "a llama has no sliding window; remove the key, or use model_type mistral")
            window = None
        elif self.model_type == "mistral":
            if window is not None and kinds is None:
                self.refuse_window_keys_of_qwen(window)
        else:
            window = window if self.flag("use_sliding_window") else None
            self.first_sliding_layer()
        if window is not None:
            window = self.count("sliding_window")
        if kinds is None:
            first = self.first_sliding_layer() if window is not None else 0
            return tuple(window if layer >= first else None for layer in range(num_layers))
        if window is None and "sliding_attention" in kinds:
            raise self.error("layer_types", kinds, f"this {self.model_type} has no window for its sliding layers; correct sliding_window")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def first_sliding_layer(self) -> int:
        return 0 if self.model_type == "mistral" else self.count("max_window_layers", least=0)

    def refuse_window_keys_of_qwen(self, window: object) -> None:
        hint = f"every layer of a mistral has the window of sliding_window {window!r}; remove this key, or set sliding_window: null"
        for key, harmless in (("use_sliding_window", True), ("max_window_layers", 0)):
            if self.get(key, harmless) != harmless:
                raise self.error(key, self.get(key), hint)

    def rope_values(self) -> tuple[str, dict[str, Any], str]:
        """Return `rope_scaling` (before transformers 5) or `rope_parameters`: the key, its values, and the kind."""
        where = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        for key in ("rope_scaling", "rope_parameters"):
            values = {} if self.get(key) is None else self.get(key)
            if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
                raise self.error(key, values, "one set of numbers for all layers is supported")
        values = self.get(where) or {}
        kind = values.get("rope_type", values.get("type", "default"))
        if not isinstance(kind, str) or kind not in config_fields.ROPE_NUMBERS:
            raise self.error(f"{where}.rope_type", kind, f"supported are {', '.join(config_fields.ROPE_NUMBERS)}")
        return where, values, kind

    def rope(self) -> Rope:
        """Read the rotary embedding, with transformers' defaults."""
        where, values, kind = self.rope_values()
        theta = values.get("rope_theta", self.get("rope_theta", 10000.0))
        if values.get("partial_rotary_factor") not in (1, None):
            raise self.error(f"{where}.partial_rotary_factor", values["partial_rotary_factor"], "only 1.0 is supported")
        values = {"original_max_position_embeddings": self.get("max_position_embeddings"), **values}
        original = self.get("original_max_position_embeddings")  # at the top level it overrides the nested one, as in transformers
        if original is not None and kind in ("llama3", "yarn"):
            values["original_max_position_embeddings"] = original
        if kind == "yarn" and "factor" in values and values["factor"] is None:
            values["factor"] = self.count("max_position_embeddings") / self.number(values, "original_max_position_embeddings", f"{where}.")
        needed = {key: self.number(values, key, f"{where}.") for key in config_fields.ROPE_NUMBERS[kind]}
        if self.number({"rope_theta": theta}, "rope_theta") <= 1:
            raise self.error("rope_theta", theta, "a number above 1 is needed")
        fields = {key.replace("position_embeddings", "positions"): number for key, number in needed.items()}
        return Rope(theta=float(theta), kind=kind, **fields, **(self.yarn_options(where, values) if kind == "yarn" else {}))

    def yarn_options(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return YaRN's optional fields; 0 and null are transformers' defaults, except of attention_factor, which only null is."""
        truncate = values.get("truncate", True)
        if truncate not in (True, False, None):
            raise self.error(f"{where}.truncate", truncate, "true or false is needed")
        options: dict[str, Any] = {"truncate": bool(truncate)}
        for key in config_fields.YARN_OPTIONS:
            unset = (None,) if key == "attention_factor" else (None, 0)
            if key != "truncate" and values.get(key) not in unset:
                options[key] = self.number(values, key, f"{where}.")
        return options
