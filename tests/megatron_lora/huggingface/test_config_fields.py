"""Every field of transformers' config classes: used (logits agree), without effect (logits stay, there and here), or refused by name.

`VALUES` gives each field a value that differs from a tiny model's. The walk takes all fields of the four classes, the older names
that transformers still takes, and the attributes that its shared code reads from a config: a new field of transformers fails here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hf_logits import difference, our_logits, their_logits
from tiny import BASE

from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture, unread_fields
from megatron_lora.huggingface.config_fields import OF_FAMILIES, REFUSED, USED, WITHOUT_EFFECT
from megatron_lora.huggingface.families import FAMILIES

transformers = pytest.importorskip("transformers")

BASES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 7,
              "max_window_layers": 1},
    "qwen3_moe": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 7,
                  "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "num_local_experts": 4},
    "granite": {"num_attention_heads": 4, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    "smollm3": {"num_attention_heads": 4, "num_key_value_heads": 2, "no_rope_layer_interval": 2, "use_sliding_window": True,
                "sliding_window": 7, "tie_word_embeddings": False, "pad_token_id": None},
    "ministral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 7, "pad_token_id": None},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "tie_word_embeddings": False,
               "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "tie_word_embeddings": False,
                    "sliding_window_pattern": 2},
}  # fmt: skip
MIXED = ["full_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
OLDER = {"rope_scaling", "rope_theta", "partial_rotary_factor", "torch_dtype", "original_max_position_embeddings", "name_or_path"}
SHARED = {"is_causal", "attention_chunk_size", "per_layer_config", "transformers_weights", "quantization_config", "output_attentions",
          "num_labels", "text_config", "configuration_files", "attribute_map"}  # fmt: skip
USED_VALUES = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 4, "head_dim": 12, "max_position_embeddings": 64, "rms_norm_eps": 0.3, "hidden_act": "swish",
    "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "sliding_window": 3, "use_sliding_window": False,
    "max_window_layers": 2, "layer_types": MIXED, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 50.0,
    "embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 3.0,
    "no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 3, "partial_rotary_factor": 0.5,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5,
    "sliding_window_pattern": 3, "rope_local_base_freq": 50.0, "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "norm_topk_prob": True,
}  # fmt: skip
LONGROPE = {"rope_theta": 100.0, "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 2.5, 4.0, 9.0]}
VALUES_OF_TYPE = {  # in place of those above
    ("phi3", "rope_parameters"): {**LONGROPE, "rope_type": "longrope"},
    ("phi3", "rope_scaling"): {**LONGROPE, "type": "longrope"},
    ("gemma3_text", "rope_parameters"): {
        "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}, "sliding_attention": {"rope_theta": 20.0},
    },
    ("gemma3_text", "rope_scaling"): {"rope_type": "linear", "factor": 3.0},
}  # fmt: skip
REFUSED_VALUES = {
    "hidden_act": "gelu", "hidden_activation": "gelu", "use_bidirectional_attention": True,
    "attention_dropout": 0.1, "quantization_config": {"quant_method": "fp8"}, "compression_config": {"format": "x"},
    "partial_rotary_factor": 0.5, "is_causal": False, "attention_chunk_size": 8, "per_layer_config": {"1": {"sliding_window": 3}},
    "text_config": {"model_type": "llama"}, "decoder": {}, "generator": {}, "text_encoder": {}, "vision_config": {}, "audio_config": {},
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "decoder_sparse_step": 2, "mlp_only_layers": [1], "router_jitter_noise": 0.1,
    "is_encoder_decoder": True, "add_cross_attention": True, "pruned_heads": {"0": [1]}, "transformers_weights": "other.safetensors",
    "configuration_files": ["config.4.0.json"], "attribute_map": {"hidden_size": "vocab_size"},
}  # fmt: skip
HARMLESS_VALUES = {
    "architectures": ["LlamaForSequenceClassification"], "dtype": "bfloat16", "torch_dtype": "float16", "initializer_range": 0.5,
    "output_router_logits": True, "router_aux_loss_coef": 0.5,
    "pretraining_tp": 2, "chunk_size_feed_forward": 3, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 4,
    "output_hidden_states": True, "output_attentions": True, "return_dict": False, "use_cache": False, "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1}, "problem_type": "regression", "num_labels": 2, "transformers_version": "4.40.0",
    "cache_implementation": "hybrid", "_sliding_window_pattern": 5,
    "name_or_path": "elsewhere/model", "_name_or_path": "elsewhere/model", "_commit_hash": "0123", "tokenizer_class": "NoSuchTokenizer",
    "gradient_checkpointing": True, "attn_implementation": "eager", "_attn_implementation": "sdpa", "_attn_implementation_autoset": True,
    "classifier_dropout": 0.5, "unsloth_version": "2025.1", "unsloth_fixed": True,
}  # fmt: skip


def make(directory: Path, kind: str, **values) -> Path:
    """Write a config.json and the weights of a random model that transformers builds from it."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": kind, **BASE, **BASES[kind], **values}
    (directory / "config.json").write_text(json.dumps(config))
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.dim() == 1))
    model.to(torch.float32).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))  # not as transformers writes it anew
    return directory


def edited(directory: Path, **values) -> Path:
    """Change the config.json of a model whose weights stay."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return directory


def fields_of(kind: str) -> list[str]:
    """Return the fields of a config class, the older names, and what shared code reads."""
    declared = {field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[kind])}
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    return sorted(declared | OLDER | SHARED | generation)


@pytest.mark.parametrize("kind", BASES)
def test_every_field_of_transformers_has_a_place(kind):
    known = USED.keys() | REFUSED.keys() | WITHOUT_EFFECT.keys()
    assert set(fields_of(kind)) <= known, "config_fields.py does not say what becomes of these fields of transformers"
    assert not WITHOUT_EFFECT.keys() & (USED.keys() | REFUSED.keys())


IGNORED_BY_TYPE = {  # fields of other types: the value above is refused by name
    "llama": {"sliding_window", "layer_types"},
    "mistral": {"attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers"},
    "qwen2": {"mlp_bias"},
    "qwen3": {"mlp_bias"},
    "qwen3_moe": {"mlp_bias", "layer_types", "max_window_layers", "num_local_experts"},
    "mixtral": {"attention_bias", "mlp_bias", "layer_types", "use_sliding_window", "max_window_layers", "num_experts"},
    "granite": {"sliding_window", "layer_types"},
    "smollm3": set(),
    "ministral": {"attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers"},
    "phi3": {"attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers", "layer_types"},
    "gemma2": {"mlp_bias", "hidden_act"},
    "gemma3_text": {"mlp_bias", "hidden_act", "attn_logit_softcapping"},
}
UNCHANGED = {  # what these types are anyway
    *(("llama", "use_sliding_window"), ("llama", "max_window_layers"), ("qwen2", "attention_bias")),
    *(("granite", "use_sliding_window"), ("granite", "max_window_layers"), ("smollm3", "max_window_layers"), ("smollm3", "layer_types")),
    *(("qwen3_moe", "intermediate_size"), ("gemma2", "use_sliding_window"), ("gemma2", "max_window_layers")),
    *(("gemma3_text", "use_sliding_window"), ("gemma3_text", "max_window_layers")),
}


@pytest.mark.parametrize("kind", BASES)
def test_used_fields_give_the_logits_of_transformers(kind, tmp_path, one_process):
    base = our_logits(make(tmp_path / "base", kind))
    for key, other in USED_VALUES.items():
        value, is_own = VALUES_OF_TYPE.get((kind, key), other), key in FAMILIES[kind].keys
        if key in IGNORED_BY_TYPE[kind] or (key in OF_FAMILIES and key in REFUSED and not is_own):
            with pytest.raises(UserError, match=f"{key} is "):
                read_architecture(edited(make(tmp_path / key, kind), **{key: value}))
            continue
        directory = make(tmp_path / key, kind, **{key: value})
        is_read = key not in OF_FAMILIES or is_own
        assert unread_fields(directory) == (() if is_read else (key,))
        if not is_read:
            continue
        ours = our_logits(directory)
        assert difference(ours, their_logits(directory, read_architecture(directory).vocab_size)) < 1e-5, key
        changed = ours.shape != base.shape or difference(ours, base) > 1e-4
        assert changed == (key not in ("max_position_embeddings", "hidden_act", "hidden_activation") and (kind, key) not in UNCHANGED), key


@pytest.mark.parametrize("kind", BASES)
def test_fields_without_effect_change_no_logit(kind, tmp_path, one_process):
    directory = make(tmp_path / "base", kind)
    ours, theirs = our_logits(directory), their_logits(directory, 61)
    original = (directory / "config.json").read_text()
    generation = dict.fromkeys(transformers.GenerationConfig._get_default_generation_params(), None)
    values = {key: {key: value} for key, value in HARMLESS_VALUES.items()} | {"generation": {**generation, "use_cache": True}}
    for key, changes in values.items():
        edited(directory, **changes)
        if key != "return_dict" and (kind, key) != ("gemma2", "_attn_implementation"):  # a tuple is returned; not there
            assert difference(their_logits(directory, 61), theirs) < 1e-6, key  # another attention has other bits
        assert torch.equal(our_logits(directory), ours), key
        assert unread_fields(directory) == ()
        (directory / "config.json").write_text(original)
    assert set(HARMLESS_VALUES) >= WITHOUT_EFFECT.keys() - set(generation)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("key", REFUSED)
def test_refused_fields_are_named(kind, key, tmp_path):
    if key in FAMILIES[kind].keys and key != "hidden_activation":
        return  # one of its own
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **BASE, **BASES[kind], key: REFUSED_VALUES[key]}))
    with pytest.raises(UserError, match=f"{key} is .*; .+") as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_values_of_theirs_change_no_logit(tmp_path, one_process):
    directory = make(tmp_path / "base", "llama")
    ours, original = their_logits(directory, 61), (directory / "config.json").read_text()
    for key, value in ((key, value) for key, (harmless, _) in REFUSED.items() for value in harmless):
        edited(directory, **{key: value})
        read_architecture(directory)
        assert torch.equal(their_logits(directory, 61), ours), key
        (directory / "config.json").write_text(original)


WINDOWS = {  # name: (kind, fields), all loaded by transformers
    "Ministral": ("mistral", {"layer_types": MIXED}),
    "Ministral, its window unused": ("mistral", {"layer_types": ["full_attention"] * 3}),
    "Ministral, types null": ("mistral", {"layer_types": None}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
    "Mistral, window as long as the rows": ("mistral", {"sliding_window": 30}),
    "Qwen2 of layer types": ("qwen2", {"layer_types": MIXED, "max_window_layers": 0}),
    "Qwen2, the flag off": ("qwen2", {"use_sliding_window": False}),
    "Qwen2, the window null": ("qwen2", {"sliding_window": None}),
    "Qwen2, no layer reaches it": ("qwen2", {"max_window_layers": 3}),
    "Qwen3 of layer types": ("qwen3", {"layer_types": MIXED[::-1]}),
    "Qwen3, all full": ("qwen3", {"layer_types": ["full_attention"] * 3}),
    "Qwen3, all sliding": ("qwen3", {"layer_types": ["sliding_attention"] * 3}),
    "Llama, all full": ("llama", {"layer_types": ["full_attention"] * 3, "sliding_window": None}),
    "Llama, a window beyond its positions": ("llama", {"sliding_window": 4096}),
    "Llama, the flag of Qwen": ("llama", {"use_sliding_window": False, "max_window_layers": 28}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_each_layer_has_the_window_of_transformers(name, tmp_path, one_process):
    kind, values = WINDOWS[name]
    directory = make(tmp_path / "model", kind, **values)
    assert difference(our_logits(directory), their_logits(directory, 61)) < 1e-5


@pytest.mark.parametrize("kind, values, message", [
    ("llama", {"layer_types": MIXED}, "this llama has no window for its sliding layers"),
    ("llama", {"sliding_window": 127}, "sliding_window is 127; a llama has no sliding window"),
    ("mistral", {"layer_types": MIXED, "sliding_window": None}, "this mistral has no window for its sliding layers"),
    ("mistral", {"layer_types": MIXED[:2]}, "3 entries, each full_attention or sliding_attention, are needed"),
    ("mistral", {"layer_types": "sliding_attention"}, "layer_types is 'sliding_attention'; 3 entries"),
    ("mistral", {"use_sliding_window": False}, "use_sliding_window is False; every layer of a mistral has the window of sliding_window 7"),
    ("mistral", {"max_window_layers": 2}, "max_window_layers is 2; every layer of a mistral"),
    ("mistral", {"attention_bias": True}, "attention_bias is True; the linears of a mistral have no bias"),
    ("qwen2", {"attention_bias": False}, "attention_bias is False; q, k and v of a qwen2 always have a bias"),
    ("qwen2", {"layer_types": MIXED, "use_sliding_window": False}, "this qwen2 has no window for its sliding layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3, "use_sliding_window": False}, "layer_types is ['chunked_attention',"),
    ("qwen3", {"layer_types": MIXED, "sliding_window": None}, "this qwen3 has no window for its sliding layers"),
    ("qwen3", {"max_window_layers": None}, "max_window_layers is None"),
    ("qwen2", {"max_window_layers": [], "use_sliding_window": False}, "max_window_layers is []"),
    ("qwen2", {"sliding_window": "7", "use_sliding_window": False}, "sliding_window is '7'"),
    ("llama", {"is_causal": None}, "is_causal is None; a model that also sees later tokens"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": [2]}, "rope_parameters is [2]"),
    ("llama", {"rope_theta": 1}, "rope_theta is 1; a number above 1"),
    ("qwen3", {"head_dim": None}, "head_dim is None"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias is True; the MLP of a qwen3 has no bias"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}}, "one set of numbers for all"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1]; one set of numbers"),
    ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type is ['yarn']; supported are"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_type is 'longrope'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_scaling.rope_type is 'mrope'"),
    ("llama", {"rope_parameters": {**YARN, "truncate": "no"}}, "rope_parameters.truncate is 'no'"),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 0}}, "rope_parameters.attention_factor is 0; a positive number"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": "32"}}, "rope_parameters.beta_fast is '32'"),
    ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
    ("llama", {"original_max_position_embeddings": 0, "rope_parameters": YARN}, "original_max_position_embeddings is 0"),
    ("llama", {"rope_theta": 10**400}, "rope_theta is 1000"),
    ("gemma2", {"hidden_activation": None}, "hidden_activation is None; only the activation of the model type"),
    ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0; transformers does not cap the scores"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "numbers for full_attention and for sliding_attention are needed"),
    ("gemma3_text", {"sliding_window": None}, "this gemma3_text has no window for its sliding layers"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0; a positive number"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; at most the 8 experts of num_experts are needed"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; a whole number of at least 1"),
    ("mixtral", {"num_experts": 5}, "num_experts is 5; num_local_experts is 4, and both are the number of experts"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]; 3 entries are needed"),
    ("smollm3", {"layer_types": MIXED, "use_sliding_window": False}, "this smollm3 has no window for its sliding layers"),
    ("phi3", {"layer_types": MIXED}, "the layers of a phi3 do not differ; remove the key"),
    ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor is 0.4; a share that gives an even number of a head's 8 features"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; supported are default, longrope"),
    ("phi3", {"rope_scaling": {**LONGROPE, "type": "longrope", "short_factor": [1.0]}}, "short_factor is [1.0]; a list of 4 numbers"),
])  # fmt: skip
def test_what_would_be_ignored_is_refused(kind, values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **BASE, **BASES[kind], **values}))
    with pytest.raises(UserError) as caught:
        read_architecture(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


YARNS = {  # name: (fields beside rope_parameters, rope_parameters, positions)
    "as model cards give it": ({}, YARN, 128),
    "a factor that stretches beyond": ({}, {**YARN, "original_max_position_embeddings": 128}, 512),
    "positions already stretched": ({"max_position_embeddings": 64}, YARN, 64),
    "no original": ({}, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, 256),
    "the original at the top level": ({"original_max_position_embeddings": 64}, YARN, 256),
    "a factor of null": ({}, {**YARN, "factor": None}, 128),
    "attention_factor": ({}, {**YARN, "attention_factor": 0.7}, 128),
    "betas": ({}, {**YARN, "beta_fast": 4.0, "beta_slow": 0.5}, 128),
    "betas of 0 are defaults": ({}, {**YARN, "beta_fast": 0, "beta_slow": None}, 128),
    "mscale": ({}, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, 128),
    "mscale alone": ({}, {**YARN, "mscale": 0.7}, 128),
    "mscale_all_dim alone": ({}, {**YARN, "mscale_all_dim": 0.7, "mscale": 0}, 128),
    "not truncated": ({}, {**YARN, "truncate": False}, 128),
    "truncate null": ({}, {**YARN, "truncate": None}, 128),
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn_as_transformers_has_it(name, tmp_path, one_process):
    values, rope, positions = YARNS[name]
    directory = make(tmp_path / "model", "llama", head_dim=16, **values, rope_parameters=rope)
    assert read_architecture(directory).max_positions == positions
    assert difference(our_logits(directory, (3, 110)), their_logits(directory, 61, (3, 110))) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in BASES if "yarn" in FAMILIES[kind].ropes])
def test_yarn_of_every_model_type_in_the_older_form(kind, tmp_path, one_process):
    rope = {"rope_type" if kind == "gemma3_text" else "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    directory = make(tmp_path / "model", kind, max_position_embeddings=32, rope_theta=1e4, rope_scaling=rope)
    assert read_architecture(directory).max_positions == 128
    assert difference(our_logits(directory, (3, 110)), their_logits(directory, 61, (3, 110))) < 1e-5


LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize("values, named", [
    ({"logit_scale": 3.0, "auto_map": {"AutoModel": "x.Y"}}, ("auto_map", "logit_scale")),
    ({"rope_scaling": {"type": "default", "factor": 9.0}}, ("rope_scaling.factor",)),
    ({"rope_theta": 50.0, "rope_parameters": {**LINEAR, "rope_theta": 500.0}}, ("rope_theta",)),
    ({"rope_theta": 50.0, "rope_parameters": {**LINEAR, "rope_theta": 50.0}}, ()),
    ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {**LINEAR, "rope_theta": 50.0}}, ()),
    ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 500.0}}, ("rope_parameters",)),
    ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2.0}}, ("rope_parameters",)),
    ({"rope_parameters": {**LINEAR, "type": "dynamic"}}, ("rope_parameters.type",)),
    ({"original_max_position_embeddings": 32, "rope_parameters": YARN}, ("rope_parameters.original_max_position_embeddings",)),
    ({"original_max_position_embeddings": 32}, ()),
])  # fmt: skip
def test_fields_that_neither_reads_are_named(values, named, tmp_path, one_process):
    directory = make(tmp_path / "model", "llama", **values)
    assert unread_fields(directory) == named
    assert difference(our_logits(directory), their_logits(directory, 61)) < 1e-5


def table() -> str:
    """Return the Markdown table of docs/models.md."""
    rows = [(key, "used", note) for key, note in USED.items() if key not in REFUSED]
    for key, (harmless, hint) in REFUSED.items():
        unless = " or ".join(f"`{json.dumps(value)}`" for value in harmless)
        rows.append((key, "used", USED[key]) if key in USED else (key, "refused", f"unless {unless}: {hint}"))
    rows += [(key, "without effect", note) for key, note in WITHOUT_EFFECT.items()]
    lines = [f"| `{key}` | {verdict} | {note} |" for key, verdict, note in rows]
    return "\n".join(["| field of config.json | is | note |", "|---|---|---|", *lines])


def test_the_document_has_the_table():
    page = Path(__file__).parents[3] / "docs" / "models.md"
    assert table() in page.read_text(), f"docs/models.md: its table has to be\n{table()}"
