"""What a base model is, as its config.json says. No tensors, no torch.

`read_architecture(model_dir)` turns a Hugging Face `config.json` of a model of one of the families
(families.py) into an `Architecture`. A missing key has the default that transformers gives it.
A value that this trainer does not support is a UserError, because a model built without it would
silently be wrong; config_fields.py says what becomes of each field. `tensor_shapes` says which
tensors the checkpoint must hold, and `module_sizes` which linear layers can have an adapter.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import read_regular
from megatron_lora.huggingface import config_fields
from megatron_lora.huggingface.families import ACTIVATIONS, FAMILIES, FUSED, MULTIMODAL, OTHERS, SEPARATE, Family
from megatron_lora.huggingface.layer_kinds import layers_with_rope, sliding_windows
from megatron_lora.huggingface.quantisation import unread_quantisation
from megatron_lora.huggingface.rope_config import Rope, read_ropes, rope_readers, rope_values

# Megatron's linear -> all modules that a family may merge in it.
EXPERT_MODULES = (*SEPARATE["fc1"], *SEPARATE["fc2"])
MERGED_LINEARS = {linear: tuple(dict.fromkeys((*SEPARATE[linear], *FUSED[linear]))) for linear in SEPARATE}
# What has rank rows of its own (model/arena_region.py): linears, and one row for the magnitudes of a DoRA adapter in all of them.
MAGNITUDES = "magnitudes"
SPACES = MERGED_LINEARS | {MAGNITUDES: (MAGNITUDES,)}
HEAD = "lm_head.weight"
LARGEST_COUNT = 2**31 - 1  # the largest value of any count in config.json
LARGEST_NUMBER = 1e30  # of any other number in it
MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What it takes to build the model.

    For each layer, `ropes` has its rotary embedding, and `sliding_windows` the number of visible tokens, itself included; None: without.
    """

    model_type: str
    hidden_size: int
    ffn_size: int  # of the MLP, or of each expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    ropes: tuple[Rope | None, ...]
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_head: bool
    softmax_scale: float  # of attention's scores
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_divisor: float = 1.0
    attention_cap: float | None = None  # c: scores are c tanh(scores / c)
    logit_cap: float | None = None
    num_experts: int = 0  # of a layer; 0: an MLP
    top_k: int = 0  # experts of a token
    normalised: bool = False  # whether the probabilities of these are divided by their sum
    prefix: str = "model"  # of its tensors' names but for the head's

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding of the first layer that has one."""
        return next(filter(None, self.ropes), None)

    def cut(self, num_layers: int) -> Architecture:
        """Return the model of the first layers alone."""
        windows, ropes = self.sliding_windows[:num_layers], self.ropes[:num_layers]
        return dataclasses.replace(self, num_layers=num_layers, sliding_windows=windows, ropes=ropes)

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one module, and gate and up."""
        return self.family.linears is FUSED

    @property
    def zero_centred(self) -> bool:
        """Whether norms multiply by 1 + their weight."""
        return self.family.zero_centred

    @property
    def post_norms(self) -> bool:
        """Whether what attention and the MLP give is normed before it is added."""
        return len(self.family.norms) > 2

    @property
    def scaled(self) -> bool:
        """Whether it is multiplied."""
        return self.residual_scale != 1.0

    @property
    def num_ropes(self) -> int:
        """Different rotary embeddings of its layers."""
        return len(set(self.ropes))

    @property
    def capped_scores(self) -> bool:
        """Whether attention's scores are capped."""
        return self.attention_cap is not None

    @property
    def capped_logits(self) -> bool:
        """Whether the logits are capped."""
        return self.logit_cap is not None

    @property
    def family(self) -> Family:
        """What is the same in all models of its type."""
        return FAMILIES[self.model_type]

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed by head."""
        return self.family.qk_norm

    @property
    def module_sizes(self) -> dict[str, tuple[int, int]]:
        """The modules of each layer that can have an adapter, with their (in, out) features."""
        inputs = {"o_proj": self.num_heads * self.head_dim, "down_proj": self.ffn_size}
        modules = [module for merged in self.family.linears.values() for module in merged]
        return {module: (inputs.get(module, self.hidden_size), sum(self.module_parts(module))) for module in modules}

    @property
    def expert_modules(self) -> tuple[str, ...]:
        """The modules of each expert that can have an adapter, as a config calls them."""
        return EXPERT_MODULES if self.num_experts else ()

    @property
    def adapter_modules(self) -> dict[str, str]:
        """The names of all modules in an adapter's file, with those that a config has for them."""
        experts = zip(self.family.experts.modules, EXPERT_MODULES, strict=True) if self.family.experts else ()
        return {module: module for module in self.module_sizes} | dict(experts)

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the (in, out) features of all linears that can have an adapter, by Hugging Face path."""
        sizes, up = {}, (self.hidden_size, self.ffn_size)
        for layer in range(self.num_layers):
            sizes |= {self.module_path(layer, module): size for module, size in self.module_sizes.items()}
            for expert in range(self.num_experts):
                sizes |= zip(self.expert_paths(layer, str(expert)), (up, up, up[::-1]), strict=True)
        return sizes

    def module_parts(self, module: str) -> tuple[int, ...]:
        """Return the output features of what a module computes side by side; tensor parallelism divides each."""
        queries, keys, ffn = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.ffn_size
        parts = {"q_proj": (queries,), "k_proj": (keys,), "v_proj": (keys,), "qkv_proj": (queries, keys, keys)}
        return (parts | {"gate_proj": (ffn,), "up_proj": (ffn,), "gate_up_proj": (ffn, ffn)}).get(module, (self.hidden_size,))

    def module_path(self, layer: int, module: str) -> str:
        """Return the Hugging Face path of a module, for example "model.layers.0.self_attn.q_proj"."""
        block = "mlp" if module in MERGED_LINEARS["fc1"] + MERGED_LINEARS["fc2"] else "self_attn"
        return f"{self.prefix}.layers.{layer}.{block}.{module}"

    def expert_paths(self, layer: int, expert: str) -> tuple[str, ...]:
        """Return the Hugging Face paths of an expert's gate, up and down; `expert` may be what stands for its number."""
        assert self.family.experts is not None
        block = f"{self.prefix}.layers.{layer}.{self.family.experts.block}.experts.{expert}"
        return tuple(f"{block}.{module}" for module in self.family.experts.modules)

    def router(self, layer: int) -> str:
        """Return the name of the router's matrix [experts, hidden]."""
        assert self.family.experts is not None
        return f"{self.prefix}.layers.{layer}.{self.family.experts.block}.gate.weight"

    @property
    def embedding(self) -> str:
        """The name of the embedding's matrix."""
        return f"{self.prefix}.embed_tokens.weight"

    def current_name(self, name: str) -> str | None:
        """Return the name of a stored tensor as transformers has it today; None: it is of another part than the text's."""
        if self.prefix == "model":
            return name
        name = re.sub(r"^language_model\.(?:model\.)?", f"{self.prefix}.", name).replace(f"{self.prefix}.lm_head.", "lm_head.")
        return None if re.match(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.", name) else name

    def has_bias(self, module: str) -> bool:
        """Return whether the base linear `module` has a bias."""
        return {"q_proj": self.qkv_bias, "k_proj": self.qkv_bias, "v_proj": self.qkv_bias, "o_proj": self.o_bias}.get(module, self.mlp_bias)

    def notes(self) -> list[str]:
        """Return what a user has to know of the model."""
        found = []
        if self.prefix != "model":
            found.append("of this model of text and images, the text part alone is trained")
        if self.rope is not None and self.rope.kind == "longrope" and self.max_positions > self.rope.original_max_positions:
            short = int(self.rope.original_max_positions)
            found.append(
                f"samples of up to {short} tokens have its short_factor and longer ones its long_factor, as in transformers; vLLM takes "
                f"long_factor for all where --max-model-len is above {short}: serve adapters of short samples with --max-model-len {short}"
            )
        return found

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that the checkpoint must hold, by Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (self.vocab_size, self.hidden_size),
            f"{self.prefix}.norm.weight": (self.hidden_size,),
        }
        if not self.tied_head:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            for norm in self.family.norms:
                shapes[f"{self.prefix}.layers.{layer}.{norm}.weight"] = (self.hidden_size,)
            for norm in ("q_norm", "k_norm") if self.qk_norm else ():
                shapes[f"{self.prefix}.layers.{layer}.self_attn.{norm}.weight"] = (self.head_dim,)
            for module, (_, num_out) in self.module_sizes.items():
                if self.has_bias(module):
                    shapes[self.module_path(layer, module) + ".bias"] = (num_out,)
            if self.num_experts:
                shapes[self.router(layer)] = (self.num_experts, self.hidden_size)
        return shapes | {f"{path}.weight": (num_out, num_in) for path, (num_in, num_out) in self.linear_sizes().items()}


def read_architecture(model_dir: str | Path) -> Architecture:
    """Read `config.json` of a Hugging Face model directory; UserError for what this trainer does not support."""
    return _Reader(Path(model_dir) / "config.json").architecture()


def unread_fields(model_dir: str | Path) -> tuple[str, ...]:
    """Return the fields of `config.json` that neither this trainer nor transformers reads for the model type, sorted."""
    reader = _Reader(Path(model_dir) / "config.json")
    found = [config_fields.unread(each.values, reader.family.keys, *rope_values(each)) for each in rope_readers(reader)]
    return tuple(sorted({*chain(*found)}))


class _Reader:
    """One config.json, with typed access; errors name the file, the key and the value."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values: dict[str, Any] = json.loads(read_regular(path))
        except OSError:
            raise UserError(
                f"base_model: {path} cannot be read; give a Hugging Face model directory with config.json and safetensors"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"base_model: {path} is not valid JSON ({one_line(error, 120)}); fetch the file again") from None
        if not isinstance(self.values, dict):
            raise UserError(f"base_model: {path} holds no object; fetch the file again")
        kind = self.values.get("model_type")
        self.outer: dict[str, Any] = {}  # of a model of text and images
        if isinstance(kind, str) and kind in MULTIMODAL:
            self.outer, text = self.values, self.values.get("text_config")
            if not isinstance(text, dict) or text.get("model_type", MULTIMODAL[kind]) != MULTIMODAL[kind]:
                raise self.error("text_config", text, f"the fields of a {MULTIMODAL[kind]} are needed")
            self.values = {**text, "tie_word_embeddings": self.outer.get("tie_word_embeddings", True)}
            kind = MULTIMODAL[kind]
        if not isinstance(kind, str) or kind not in FAMILIES:
            hint = f"supported are {', '.join([*FAMILIES, *MULTIMODAL])}"
            if isinstance(kind, str) and kind in OTHERS:
                nearest, differs = OTHERS[kind]
                hint += f"; the nearest is {nearest}, from which it differs by {differs}"
            raise self.error("model_type", kind, hint)
        self.model_type: str = kind
        self.family: Family = FAMILIES[kind]

    def error(self, key: str, value: object, hint: str) -> UserError:
        return UserError(f"base_model: {self.path}: {one_line(key, 100)} is {one_line(repr(value), 160)}; {hint}")

    def with_values(self, values: dict[str, Any]) -> _Reader:
        """Return a reader of the same file that reads other values."""
        other = copy(self)
        other.values = values
        return other

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.family.defaults.get(key, default))

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
        attention_bias, mlp_bias = (key in self.family.biases and self.flag(key) for key in ("attention_bias", "mlp_bias"))
        has_rope = layers_with_rope(self)
        windows = sliding_windows(self, has_rope)
        ropes = read_ropes(self, head_dim, has_rope, [window is not None for window in windows])
        factors = {"softmax_scale": head_dim**-0.5}
        for key, (name, power) in self.family.multipliers.items():
            if self.get(key) is not None or "cap" not in name:
                factors[name] = self.number({key: self.get(key)}, key) ** power
        if self.family.scaled_embedding:
            factors["embedding_scale"] = self.count("hidden_size") ** 0.5
        return Architecture(
            model_type=self.model_type,
            hidden_size=self.count("hidden_size"),
            ffn_size=self.count(self.family.experts.width if self.family.experts else "intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.count("vocab_size"),
            max_positions=max(self.count("max_position_embeddings"), *(rope.max_positions for rope in ropes if rope)),
            norm_eps=self.number({"rms_norm_eps": self.get("rms_norm_eps", 1e-6)}, "rms_norm_eps"),
            ropes=ropes,
            sliding_windows=windows,
            qkv_bias=attention_bias or self.family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=mlp_bias,
            tied_head=self.flag("tie_word_embeddings"),
            prefix="model.language_model" if self.outer else "model",
            **factors,
            **self.experts(),
        )

    def experts(self) -> dict[str, Any]:
        """Return the fields of Architecture that say what experts there are, and how many a token has."""
        names = self.family.experts
        if names is None:
            return {}
        given = [key for key in names.counts if key in self.values] or [names.counts[0]]
        number, top_k = self.count(given[0]), self.count("num_experts_per_tok")
        for key in given[1:]:
            if self.get(key) != number:
                raise self.error(key, self.get(key), f"{given[0]} is {number}, and both are the number of experts; correct one")
        if top_k > number:
            raise self.error("num_experts_per_tok", top_k, f"at most the {number} experts of {given[0]} are needed")
        return {"num_experts": number, "top_k": top_k, "normalised": names.always_normalised or self.flag("norm_topk_prob")}

    def refuse_unsupported(self) -> None:
        """Refuse what this trainer does not compute, and what one model type honours and this one would ignore."""
        for key, (harmless, hint) in config_fields.REFUSED.items():
            is_own = key in self.family.keys
            if key == "hidden_act" or (key == "hidden_activation" and is_own):
                harmless, is_own = ACTIVATIONS[self.family.activation], False
            value = self.get(key, harmless[0])
            if key == "quantization_config" and isinstance(value, dict):
                if (unread := unread_quantisation(value)) is not None:
                    raise self.error(key, unread, hint)
                continue
            if value not in harmless and not is_own:
                raise self.error(key, value, hint)
            if self.outer and key not in ("text_config", "vision_config") and self.outer.get(key, harmless[0]) not in harmless:
                raise self.error(key, self.outer[key], hint)
        kind, family = self.model_type, self.family
        if family.qk_norm and self.values.get("attn_logit_softcapping") is not None and "attn_logit_softcapping" in family.keys:
            hint = f"transformers does not cap the scores of a {kind}; remove the key"
            raise self.error("attn_logit_softcapping", self.get("attn_logit_softcapping"), hint)
        if "attention_bias" not in family.biases and self.get("attention_bias", family.qkv_bias) != family.qkv_bias:
            hint = f"q, k and v of a {kind} always have a bias" if family.qkv_bias else f"the linears of a {kind} have no bias"
            raise self.error(
                "attention_bias", self.get("attention_bias"), f"{hint}; remove the key, or use the model_type of these weights"
            )
        if "mlp_bias" not in family.biases and self.get("mlp_bias"):
            raise self.error("mlp_bias", self.get("mlp_bias"), f"the MLP of a {kind} has no bias; use the model_type of these weights")
        if "head_dim" in family.defaults and self.get("head_dim") is None:
            raise self.error("head_dim", None, "a whole number of at least 1 is needed")
