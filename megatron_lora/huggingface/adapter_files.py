"""PEFT directories, read and written: adapter_config.json, adapter_model.safetensors and a model card.

An adapter adds (lora_alpha / r) * B A to a frozen linear, with A [r, K] and B [N, r], or lora_alpha
/ sqrt(r) with rsLoRA. In memory a pair is keyed by the linear's path in the Hugging Face model,
`model.layers.0.self_attn.q_proj`; in the file it is `base_model.model.<path>.lora_A.weight` and
`.lora_B.weight`. Each file is written to a temporary directory, synced and renamed, so that a
reader never sees a part of one. The reader accepts plain LoRA and refuses every other feature by
its name, because a model without that feature would silently be wrong.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.files import sync

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PREFIX = "base_model.model."
LAYER = re.compile(r"layers\.(\d+)\.")

# peft 0.21's other fields, with the values that mean plain LoRA. The reader refuses other values, and unknown fields that are set.
PLAIN_LORA = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "modules_to_save": None,
        "monteclora_config": None,
        "rank_pattern": {},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    }
)
# Fields that do not change what the adapter computes.
DESCRIPTIVE = MappingProxyType(
    {
        "auto_mapping": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "megatron_core": "megatron.core",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "revision": None,
    }
)
# Initialisations that do not change the base weights. The others (pissa, olora, corda, loftq, lora_ga) do.
INITS_OF_UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What a PEFT directory holds. `weights`: path of the linear in the Hugging Face model -> (A [r, K], B [N, r])."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    lora_dropout: float = 0.0


def write_adapter(directory: str | Path, adapter: AdapterFile, base_model: str, advice: str = "") -> None:
    """Write or replace the three PEFT files in `directory`, which is created if absent; other files there stay.

    `base_model` is what the readers of the directory load as its base: a hub id or a path. `advice` on how to serve it goes into the
    model card.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a_RK, b_NR) in adapter.weights.items():
        assert a_RK.shape[0] == b_NR.shape[1] == adapter.r, f"{path}: A {tuple(a_RK.shape)}, B {tuple(b_NR.shape)}, r {adapter.r}"
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a_RK.detach().clone(memory_format=torch.contiguous_format).cpu()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b_NR.detach().clone(memory_format=torch.contiguous_format).cpu()
    config = json.dumps(_config(adapter, base_model), indent=2, sort_keys=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", dir=directory))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(_model_card(adapter, base_model, advice), encoding="utf-8")
        for name in (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE):
            sync(temporary / name)
            os.chmod(temporary / name, 0o644)
            os.replace(temporary / name, directory / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read a PEFT directory of plain LoRA, on the CPU in the file's dtypes; UserError when it is missing, damaged or anything else."""
    directory = Path(directory)
    config = _read_config(directory)
    r, targets = config["r"], config["target_modules"]
    tensors = _read_tensors(directory)
    weights = _pair(directory / WEIGHTS_FILE, tensors, r)
    found = {path.rpartition(".")[2] for path in weights}
    if isinstance(targets, list):
        _check_targets(directory / WEIGHTS_FILE, weights, found, set(targets))
    return AdapterFile(
        r=r,
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora", False)),
        target_modules=tuple(sorted(found)),
        weights=weights,
        lora_dropout=config.get("lora_dropout", 0.0),
    )


def check_adapter(where: str, adapter: AdapterFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError for an adapter of another base model; `shapes`: the path of each linear that it must adapt -> its (N, K)."""
    for path, (rows, columns) in shapes.items():
        if path not in adapter.weights:
            raise UserError(f"{where}: has no A and B for {path}; use an adapter of this base model with the job's target_modules")
        a_RK, b_NR = adapter.weights[path]
        if a_RK.shape[1] != columns or b_NR.shape[0] != rows:
            raise UserError(
                f"{where}: {path} maps {a_RK.shape[1]} to {b_NR.shape[0]} features and the base model's maps {columns} to {rows}; "
                "use an adapter that was trained on this base model"
            )
    extra = sorted(adapter.weights.keys() - shapes.keys())
    if extra:
        raise UserError(f"{where}: holds {extra[0]}, which this job does not train; add it to target_modules or use another adapter")


def _config(adapter: AdapterFile, base_model: str) -> dict[str, object]:
    """Return adapter_config.json as peft writes it; an integral alpha is written as an int, which some readers require."""
    alpha = adapter.lora_alpha
    return {
        **PLAIN_LORA,
        **DESCRIPTIVE,
        "base_model_name_or_path": base_model,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.lora_dropout,
        "peft_type": "LORA",
        "r": adapter.r,
        "target_modules": list(adapter.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": adapter.use_rslora,
    }


def _model_card(adapter: AdapterFile, base_model: str, advice: str) -> str:
    """Return the model card: the front matter that hubs read, what the adapter is, and how to load it."""
    num_parameters = sum(a_RK.numel() + b_NR.numel() for a_RK, b_NR in adapter.weights.values())
    base = json.dumps(base_model)
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- {json.dumps(f"base_model:adapter:{base_model}")}
- lora
- transformers
---

# LoRA adapter for {base_model}

Trained with megatron-lora. {num_parameters:,} parameters, rank {adapter.r}, lora_alpha {adapter.lora_alpha:g}\
{", rank-stabilised scale" if adapter.use_rslora else ""}, on {", ".join(adapter.target_modules)}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/of/this/directory")
```
""" + (f"\n{advice}\n" if advice else "")


def _read_config(directory: Path) -> dict:
    """Read adapter_config.json; UserError for anything but plain LoRA."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{directory}: has no {CONFIG_FILE}, so it is no PEFT directory; give the directory that holds that file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON ({error}); restore or export the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{file}: peft_type: {json.dumps(kind)} cannot be trained here; use a LORA adapter")
    _check_plain_lora(file, config)
    if not isinstance(config.get("r"), int) or isinstance(config["r"], bool) or config["r"] < 1:
        raise UserError(f"{file}: r: {json.dumps(config.get('r'))} is not a LoRA rank; use a whole number from 1")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise UserError(f"{file}: lora_alpha: {json.dumps(alpha)} is not a LoRA alpha; use a number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout: {json.dumps(dropout)} is not a probability; use a number from 0, below 1")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        raise UserError(f"{file}: target_modules: {json.dumps(targets)} is not a list of module names; save the adapter again")
    return config


def _check_plain_lora(file: Path, config: Mapping[str, object]) -> None:
    """Raise UserError for each field, known or unknown, that would change what the adapter computes."""
    known = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise UserError(f"{file}: task_type: {json.dumps(config['task_type'])} is not supported; use a CAUSAL_LM adapter")
    init = config.get("init_lora_weights", True)
    if init not in INITS_OF_UNCHANGED_BASE:
        raise UserError(
            f"{file}: init_lora_weights: {json.dumps(init)} means a changed base model; convert the adapter to plain LoRA with peft first"
        )
    for key, value in config.items():
        if key in known or key in DESCRIPTIVE or not value or value == PLAIN_LORA.get(key):
            continue
        raise UserError(f"{file}: {key}: {json.dumps(value)} is not supported; use a plain LoRA adapter, without {key}")


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read the safetensors file; a pickle is never loaded."""
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never loaded)" if (directory / "adapter_model.bin").is_file() else ""
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}{pickled}; save the adapter again with safe_serialization=True")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged ({error}); restore it or save the adapter again") from None


def _pair(file: Path, tensors: Mapping[str, torch.Tensor], r: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Match every A with its B and check their ranks."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise UserError(f"{file}: holds {key}, which is no A or B of a linear; use a plain LoRA adapter")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise UserError(f"{file}: holds no tensors; save the adapter again")
    weights = {}
    for path, pair in pairs.items():
        for name, rank_axis in (("A", 0), ("B", 1)):
            key = f"{PREFIX}{path}.lora_{name}.weight"
            if name not in pair:
                raise UserError(f"{file}: {key} is missing; save the adapter again")
            shape = tuple(pair[name].shape)
            if len(shape) != 2 or shape[rank_axis] != r:
                expected = f"[{r}, in]" if name == "A" else f"[out, {r}]"
                raise UserError(f"{file}: {key} has shape {list(shape)} where r = {r} needs {expected}; save the adapter again")
            if not pair[name].is_floating_point():
                raise UserError(f"{file}: {key} is {pair[name].dtype}; save the adapter in a floating-point type")
        weights[path] = (pair["A"], pair["B"])
    return weights


def _check_targets(file: Path, weights: Iterable[str], found: set[str], targets: set[str]) -> None:
    """Raise UserError unless exactly the target modules have weights, all in the same layers."""
    names = {target.rpartition(".")[2] for target in targets}
    if found != names:
        module = sorted(found ^ names)[0]
        have = "has no weights" if module in names else "has weights and is not in target_modules"
        raise UserError(f"{file}: {module} {have}; save the adapter again")
    layers: dict[str, set[str]] = {name: set() for name in names}
    for path in weights:
        match = LAYER.search(path)
        if match is None:
            raise UserError(f"{file}: {path} is not in a transformer layer; use an adapter of the layers' linears alone")
        layers[path.rpartition(".")[2]].add(match[1])
    all_layers = set().union(*layers.values())
    for name, present in layers.items():
        if present != all_layers:
            raise UserError(f"{file}: {name} has no weights in layer {min(all_layers - present, key=int)}; save the adapter again")
