"""A PEFT directory that a job starts from: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from fuzz_kinds import mutate

from megatron_lora.huggingface.adapter_files import (
    CONFIG_FILE,
    OF_TARGETS,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    check_adapter,
    check_modules,
    read_adapter,
    write_adapter,
)

FIELDS = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora")
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4, "vocab_size": 31,
         "num_key_value_heads": 2}  # fmt: skip
SHAPES = {"q_proj": (16, 12), "v_proj": (8, 12)}
PATHS = {f"model.layers.{layer}.self_attn.{name}": SHAPES[name] for layer in (0, 1) for name in SHAPES}
OTHERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens")
KEYS = sorted({*OF_TARGETS, *FIELDS, "init_lora_weights", "bias", "fan_in_fan_out", "lora_bias", "modules_to_save", "use_dora", "new"})
NAMES = (
    *(f"{PREFIX}model.layers.0.self_attn.{name}.lora_A.weight" for name in ("k_proj", "qkv_proj", "q_proj", "{x}")),
    *(f"{PREFIX}lm_head.lora_B.weight", f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector", "__metadata__", "x"),
)


def make(directory: Path, random: Random) -> None:
    """Write a small adapter of two modules in two layers."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        path: (torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator))
        for path, (rows, columns) in PATHS.items()
    }
    magnitudes = {path: torch.randn(rows, generator=generator) for path, (rows, _) in PATHS.items()} if random.random() < 0.25 else {}
    of_all = {"use_rslora": random.random() < 0.5, "target_modules": tuple(SHAPES), "magnitudes": magnitudes}
    write_adapter(directory, AdapterFile(r=3, lora_alpha=6, weights=weights, **of_all), "org/model")


def read(directory: Path) -> None:
    """Read the adapter and check it against its base model, as a job's init_adapter."""
    adapter = read_adapter(directory)
    check_modules("init_adapter", adapter, (*SHAPES, "k_proj", "up_proj"))
    check_adapter("init_adapter", adapter, PATHS, OTHERS)
    for a_RK, b_NR in adapter.weights.values():
        assert torch.isfinite(b_NR.float() @ a_RK.float()).all()


def agree(directory: Path) -> str:
    """Compare what the adapter adds to each linear with what PEFT adds; return PEFT's complaint if it does not load it."""
    import peft
    import transformers

    adapter = read_adapter(directory)
    scale = adapter.lora_alpha / (adapter.r**0.5 if adapter.use_rslora else adapter.r)
    config = transformers.LlamaConfig(**SIZES)
    try:
        model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), directory)
    except Exception as error:  # more is checked there
        return f"peft: {type(error).__name__}: {error}"
    theirs = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            theirs[name.removeprefix(PREFIX)] = module.get_delta_weight("default")
    assert theirs.keys() == adapter.weights.keys(), f"peft adapts {sorted(theirs)}"
    for path, (a_RK, b_NR) in adapter.weights.items():
        ours = scale * (b_NR.float() @ a_RK.float())
        assert torch.allclose(ours, theirs[path], rtol=1e-4, atol=1e-6), f"{path}: differs by {float((ours - theirs[path]).abs().max())}"
    return ""


MUTATIONS: tuple[Callable[[Random, Path], str], ...] = (
    *(lambda random, directory: mutate.edit_json(random, directory / CONFIG_FILE, KEYS),) * 5,
    *(lambda random, directory: mutate.edit_header(random, directory / WEIGHTS_FILE, NAMES),) * 2,
    lambda random, directory: mutate.spoil_bytes(random, directory / WEIGHTS_FILE),
    lambda random, directory: mutate.spoil_text(random, directory / CONFIG_FILE),
    mutate.move_files,
)
