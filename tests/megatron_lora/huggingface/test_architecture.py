"""config.json is honoured or refused by name: rotary embeddings equal transformers', and each unsupported value has its line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import KINDS, save_model

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.rope import frequencies
from megatron_lora.huggingface.weight_files import SINGLE
from megatron_lora.parallel.partition import check_layout, layers_of_stages

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": 100, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip


def read(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return read_architecture(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_transformers(kind, tmp_path):
    save_model(tmp_path, kind)
    assert read_architecture(tmp_path).tensor_shapes() == {name: tuple(t.shape) for name, t in load_file(tmp_path / SINGLE).items()}


def test_module_sizes_and_paths(tmp_path):
    architecture = read(tmp_path, num_key_value_heads=2, head_dim=24)
    assert architecture.module_sizes == {
        "q_proj": (64, 96), "k_proj": (64, 48), "v_proj": (64, 48), "o_proj": (96, 64),
        "gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64),
    }  # fmt: skip
    assert architecture.module_path(3, "v_proj") == "model.layers.3.self_attn.v_proj"
    assert architecture.module_path(0, "down_proj") == "model.layers.0.mlp.down_proj"


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, no original": {"factor": 4.0},
    "yarn, scaled": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1, "original_max_position_embeddings": 64},
    "yarn, all": {"factor": 3.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False,
                  "original_max_position_embeddings": 128},
}  # fmt: skip


@pytest.mark.parametrize("written", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_equals_transformers(name, written, tmp_path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = name.split(",")[0]
    new = {"rope_type": kind, "rope_theta": 5e5, **ROPES[name]}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": kind, **ROPES[name]}}
    architecture = read(tmp_path, head_dim=32, **({"rope_parameters": new} if written == "rope_parameters" else old))
    oracle = LlamaRotaryEmbedding(LlamaConfig(**LLAMA, head_dim=32, rope_parameters=new))
    freqs, scale = frequencies(architecture.rope, architecture.head_dim)
    torch.testing.assert_close(freqs, oracle.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(oracle.attention_scaling, rel=1e-7)


@pytest.mark.parametrize("changes, windows", [
    ({"model_type": "mistral", "sliding_window": 9}, (9, 9, 9, 9)),
    ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
    ({"model_type": "mistral"}, (4096,) * 4),
    ({"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 3}, (None,) * 4),
    ({"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 3, "use_sliding_window": True}, (None, None, None, 9)),
    ({"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": True,
      "layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 9, None, 9)),
])  # fmt: skip
def test_sliding_windows(changes, windows, tmp_path):
    assert read(tmp_path, num_key_value_heads=4, **changes).sliding_windows == windows


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma"}, "model_type is 'gemma'; supported are llama, mistral, qwen2, qwen3, ministral, granite"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only the activation of the model type"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8 without weight_block_size'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'; supported are default, linear"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "rope_parameters.factor is -1"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of numbers for all layers"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor is 0.25"),
    ({"rope_theta": "big"}, "rope_theta is 'big'"),
    ({"hidden_size": None}, "hidden_size is None; a whole number"),
    ({"hidden_size": 66}, "num_attention_heads is 4; it must divide hidden_size 66"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; a divisor of num_attention_heads 4"),
    ({"head_dim": 15}, "head_dim is 15; an even number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["chunked"] * 4}, "layer_types is"),
])  # fmt: skip
def test_what_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, **changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("base_model: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), ("{", "is not valid JSON"), ("[1]", "holds no object")])
def test_unreadable_config(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path)


def test_layers_of_stages():
    assert layers_of_stages(7, ParallelConfig(pipeline=3)) == (range(0, 3), range(3, 5), range(5, 7))
    assert layers_of_stages(7, ParallelConfig(pipeline=3, layers_per_stage=(1, 4, 2))) == (range(0, 1), range(1, 5), range(5, 7))


@pytest.mark.parametrize("layout, message", [
    ({"tensor": 3}, "parallel.tensor: 3 does not divide the model's 4 query heads"),
    ({"tensor": 4}, "parallel.tensor: 4 does not divide the model's 2 key/value heads; use a divisor of 2"),
    ({"tensor": 2, "expert": 2}, "parallel.expert: 2, and the model's layers have no experts; set it to 1"),
    ({"pipeline": 5}, "parallel.pipeline: 5 stages are more than the model's 4 layers"),
    ({"pipeline": 2, "layers_per_stage": (1, 2)}, "parallel.layers_per_stage: [1, 2] does not cut 4 layers into 2 stages"),
    ({"pipeline": 2, "layers_per_stage": (4,)}, "parallel.layers_per_stage: [4]"),
    ({"pipeline": 2, "layers_per_stage": (4, 0)}, "parallel.layers_per_stage: [4, 0]"),
])  # fmt: skip
def test_layout_that_does_not_fit(layout, message, tmp_path):
    with pytest.raises(UserError) as caught:
        check_layout(read(tmp_path, num_key_value_heads=2), ParallelConfig(**layout))
    assert message in str(caught.value)


def test_ranks_that_do_not_divide_the_experts(tmp_path):
    mixture = read(tmp_path, model_type="mixtral", num_key_value_heads=2, num_local_experts=4, intermediate_size=33)
    check_layout(mixture, ParallelConfig(tensor=2, expert=2))  # the experts are divided, not their 33 features
    with pytest.raises(UserError, match="parallel.expert: 2, and the model's layers have 3 experts, which it does not divide"):
        check_layout(replace(mixture, num_experts=3), ParallelConfig(tensor=2, expert=2))


@pytest.mark.parametrize("base_weights, changes, message", [
    ("nf4/bf16", {"num_key_value_heads": 2}, "base_weights: 'nf4/bf16': a rank's linears with 32 inputs are not made of blocks of 64"),
    ("fp8", {"model_type": "mixtral", "num_key_value_heads": 2}, "base_weights: 'fp8': experts are frozen in `precision` alone"),
])  # fmt: skip
def test_weights_that_cannot_be_stored_so(base_weights, changes, message, tmp_path):
    architecture = read(tmp_path, **changes)
    check_layout(architecture, ParallelConfig(tensor=2))
    with pytest.raises(UserError) as caught:
        check_layout(architecture, ParallelConfig(tensor=2), base_weights)
    assert message in str(caught.value)
