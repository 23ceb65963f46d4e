"""The models that whole-trainer benchmarks run: their shapes as config.json has them, with random weights.

    architecture = architecture_of("llama-3.1-8b")
    config = hf_config("llama-3.1-8b")                  # the same shape for transformers

`num_layers` cuts a model short, for measuring the layers of one that does not fit; `tensor` leaves what one of so many tensor ranks
computes: its heads, its features of the MLP, its part of the vocabulary.
"""

import json
import tempfile
from pathlib import Path

from megatron_lora.huggingface.architecture import Architecture, read_architecture

LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA_ROPE,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict] = {
    "tiny": {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
    },
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "qwen2.5-32b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "llama-3.1-70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def _values(shape: str, num_layers: int | None, tensor: int = 1) -> dict:
    whole = SHAPES[shape]
    sharded = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    own = {"head_dim": whole["hidden_size"] // whole["num_attention_heads"]} | {name: whole[name] // tensor for name in sharded}
    return whole | (own if tensor > 1 else {}) | ({} if num_layers is None else {"num_hidden_layers": num_layers})


def write_config(shape: str, model_dir: Path, num_layers: int | None = None, tensor: int = 1) -> None:
    """Write a shape's config.json into a model's directory."""
    (model_dir / "config.json").write_text(json.dumps(_values(shape, num_layers, tensor)), encoding="utf-8")


def architecture_of(shape: str, num_layers: int | None = None, tensor: int = 1) -> Architecture:
    """Return a shape as the trainer reads it."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, Path(folder), num_layers, tensor)
        return read_architecture(folder)


def hf_config(shape: str, num_layers: int | None = None):
    """Return a shape as a transformers config."""
    from transformers import AutoConfig

    values = dict(_values(shape, num_layers))
    return AutoConfig.for_model(values.pop("model_type"), **values)
