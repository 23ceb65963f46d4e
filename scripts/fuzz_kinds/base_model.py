"""A base model's directory: config.json, and weights in one file or in shards with an index."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch
from fuzz_kinds import mutate
from safetensors.torch import load_file, save_file

from megatron_lora.huggingface.architecture import unread_fields
from megatron_lora.huggingface.config_fields import REFUSED, USED
from megatron_lora.huggingface.rope import frequencies
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.huggingface.weight_slices import Checkpoint

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
CONFIGS = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": True}},
    "mistral": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5, "pad_token_id": 0},
    "gemma3_text": {
        **{"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5, "sliding_window_pattern": 2, "pad_token_id": 0},
        **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "granite": {"num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "ministral": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5},
    "phi3": {
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]},
    },
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5, "pad_token_id": 0},
}
KEYS = sorted({*USED, *REFUSED, "dtype", "pad_token_id", "logit_scale", "architectures"})
NAMES = (
    *("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight", "norm.weight", "model.lm_head.weight", "score.weight"),
    *("model.layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.qkv_proj.weight", "__metadata__", "x"),
)


def make(directory: Path, random: Random) -> None:
    """Write a small model of one of the families, in one file or in two shards."""
    kind = random.choice(sorted(CONFIGS))
    config = {"model_type": kind, **SIZES, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **CONFIGS[kind]}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = read_base_model(directory, load_weights=False).tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    if random.random() < 0.5:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(directory: Path) -> None:
    """Read the model as a rank does that owns all of it."""
    architecture = read_base_model(directory)
    unread_fields(directory)
    frequencies(architecture.rope, architecture.head_dim)
    checkpoint = Checkpoint(directory, architecture)
    for name, shape in architecture.tensor_shapes().items():
        assert tuple(checkpoint.read(name, (slice(None),) * len(shape)).shape) == shape, name


def agree(directory: Path) -> str:
    """Compare the logits of a model that was read with those of transformers; return its complaint if it does not load the model."""
    from hf_logits import difference, our_logits, their_logits

    ours = our_logits(directory)
    try:
        theirs = their_logits(directory, ours.shape[1])
    except Exception as error:  # more is checked there: the types of fields that change nothing
        return f"transformers: {type(error).__name__}: {error}"
    assert difference(ours, theirs) < 1e-5, f"logits differ from transformers' by {difference(ours, theirs):.1e} of the largest"
    return ""


def _of_weights(change: Callable, random: Random, directory: Path) -> str:
    return change(random, random.choice(sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]))


def _edit_tensors(random: Random, directory: Path) -> str:
    """Add, drop, rename or change a tensor; the file stays sound."""
    file = random.choice(sorted(directory.glob("*.safetensors")) or [directory / "none"])
    try:
        tensors = load_file(file)
    except Exception:  # spoilt before
        return "nothing"
    name = random.choice([*sorted(tensors), "x"])
    what = random.choice(("gone", "without prefix", "added", "scaled head", "half", "transposed"))
    if what == "gone":
        tensors.pop(name, None)
    elif what == "without prefix":
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    elif what == "added":
        tensors[random.choice([key for key in NAMES if key != "__metadata__"])] = torch.ones(random.choice([(1,), (16,), (31, 16)]))
    elif what == "scaled head":
        tensors["lm_head.weight"] = 2 * tensors.get("model.embed_tokens.weight", torch.ones(31, 16))
    else:
        tensors = {
            key: tensor.half() if what == "half" else tensor.mT.contiguous() if tensor.dim() == 2 else tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {what} ({name})"


MUTATIONS: tuple[Callable[[Random, Path], str], ...] = (
    *(lambda random, directory: mutate.edit_json(random, directory / "config.json", KEYS),) * 5,
    *(_edit_tensors,) * 2,
    partial(_of_weights, lambda random, file: mutate.edit_header(random, file, NAMES)),
    partial(_of_weights, mutate.spoil_bytes),
    lambda random, directory: mutate.edit_json(random, directory / "model.safetensors.index.json", ["weight_map", "metadata"]),
    lambda random, directory: mutate.spoil_text(random, directory / random.choice(["config.json", "model.safetensors.index.json"])),
    mutate.move_files,
)
