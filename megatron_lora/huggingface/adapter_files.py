"""PEFT directories, read and written: adapter_config.json, adapter_model.safetensors and a model card.

An adapter adds (lora_alpha / r) * B A to a frozen linear, with A [r, K] and B [N, r], or lora_alpha
/ sqrt(r) with rsLoRA. In memory a pair is keyed by the linear's path in the Hugging Face model,
`model.layers.0.self_attn.q_proj`; in the file it is `base_model.model.<path>.lora_A.weight` and
`.lora_B.weight`, with DoRA's magnitudes [N] beside them as `.lora_magnitude_vector`. Each file is
written to a temporary directory, synced and renamed, so that a reader never sees a part of one. The
config that is written has the fields that servers ask for and those that differ from PEFT's
defaults: an older PEFT refuses fields that it does not know. The reader accepts LoRA and DoRA, of
one rank and alpha unless its caller takes several, however the file's config says so
(adapter_targets.py), and refuses every other feature by its name, because a model without that
feature would silently be wrong.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import read_regular, sync
from megatron_lora.huggingface.adapter_targets import Targets, first_match, read_targets
from megatron_lora.huggingface.model_card import base_digest_of, model_card

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PREFIX = "base_model.model."
TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # of a linear, behind its path
OF_TEXT = "model.language_model."  # of paths in a model of text and images
LAYER = re.compile(r"layers\.(\d+)\.")
LARGEST_RANK, LARGEST_ALPHA = 2**20, 1e30

# Fields that do not change what the adapter computes.
DESCRIPTIVE = ("auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision")
# Fields of PEFT that the reader accepts with any value: of an initialisation that is over, of running, or of modules that no plain LoRA
# has here. The fields of adapter_targets.py are compared with the weights.
WITHOUT_EFFECT = ("corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config", "runtime_config")
MAY_BE_EMPTY = ("alora_invocation_tokens", "layer_replication", "modules_to_save", "target_parameters")  # an empty list means none
OF_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
FUSED = {  # a linear of other models -> those of these models that it holds in one
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "wqkv", "linear_qkv"), "q_proj, k_proj and v_proj"),
    **dict.fromkeys(("gate_up_proj", "linear_fc1", "w1_w3"), "gate_proj and up_proj"),
}
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
    magnitudes: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # path -> m [N] of a DoRA adapter; empty of LoRA
    expert_r: int = 0  # rank of the linears of experts, where it adapts any
    lora_dropout: float = 0.0
    revision: str | None = None  # of the base model, where it is one of the hub
    base_digest: str = ""  # of the base model's weights (base_files.py), where that is known
    targets: Targets | None = None  # how linears are chosen; of a file that was read, or where module names do not say it
    base_model: str = ""  # that it was made for, as it says itself, where it was read
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)  # path -> alpha, where they differ

    @property
    def factors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Each linear's A and B, and with DoRA its magnitudes."""
        own = self.magnitudes
        return {path: (*pair, own[path]) if path in own else pair for path, pair in self.weights.items()}

    def scale(self, path: str) -> float:
        """Return what B A of a linear is multiplied by."""
        r = self.weights[path][0].shape[0]
        return self.alphas.get(path, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def write_adapter(directory: str | Path, adapter: AdapterFile, base_model: str, name: str = "adapter", notes: Sequence[str] = ()) -> None:
    """Write or replace the three PEFT files in `directory`, which is created if absent; other files there stay.

    `base_model` is what the readers of the directory load as its base: a hub id or a path. The model card has `name` in its commands,
    and ends with the `notes`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a_RK, b_NR, *magnitudes) in adapter.factors.items():
        r = adapter.expert_r if of_expert(path) else adapter.r
        assert a_RK.shape[0] == b_NR.shape[1] <= r, f"{path}: A {tuple(a_RK.shape)}, B {tuple(b_NR.shape)}, r {r}"
        for key, tensor in zip(TENSORS, (a_RK, b_NR, *magnitudes), strict=False):
            tensors[f"{PREFIX}{path}.{key}"] = tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
    config, num_parameters = _config(adapter, base_model), sum(tensor.numel() for tensor in tensors.values())
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", dir=directory))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(model_card(config, num_parameters, adapter.base_digest, name, notes), encoding="utf-8")
        os.chmod(temporary / WEIGHTS_FILE, (temporary / CONFIG_FILE).stat().st_mode)  # that of the umask; safetensors takes 0600
        for name in (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE):
            sync(temporary / name)
            os.replace(temporary / name, directory / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read a PEFT directory of LoRA or DoRA, on the CPU in the file's dtypes; UserError when it is missing, damaged or anything else.

    Linears may have ranks and alphas of their own; `r` and `lora_alpha` are then the largest.
    """
    directory = Path(directory)
    config = _read_config(directory)
    file = directory / CONFIG_FILE
    targets = read_targets(file, config)
    tensors, revision = _read_tensors(directory), config.get("revision")
    magnitudes = _take_magnitudes(directory / WEIGHTS_FILE, tensors) if config["use_dora"] else {}
    weights = _pair(directory / WEIGHTS_FILE, tensors)
    _check_targets(directory / WEIGHTS_FILE, weights, targets)
    ranks = {path: int(first_match(targets.rank_pattern, path, config["r"])) for path in weights}
    alphas = {path: first_match(targets.alpha_pattern, path, config["lora_alpha"]) for path in weights}
    of_experts, others = ([path for path in weights if of_expert(path) == kind] for kind in (True, False))
    _check_ranks(directory / WEIGHTS_FILE, weights, ranks)
    if config["use_dora"]:
        _check_magnitudes(directory / WEIGHTS_FILE, weights, magnitudes)
    return AdapterFile(
        r=max(ranks[path] for path in others or of_experts),
        expert_r=max((ranks[path] for path in of_experts), default=0),
        lora_alpha=max(alphas.values()),
        use_rslora=bool(config.get("use_rslora", False)),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in weights})),
        weights=weights,
        magnitudes=magnitudes,
        lora_dropout=config.get("lora_dropout", 0.0),
        revision=revision if isinstance(revision, str) else None,
        base_digest=base_digest_of(directory / CARD_FILE),
        targets=targets,
        base_model=str(config.get("base_model_name_or_path") or ""),
        alphas=alphas,
    )


def layer_of(path: str) -> int:
    """Return the layer that a linear's path names."""
    found = LAYER.search(path)
    assert found is not None, path
    return int(found[1])


def of_expert(path: str) -> bool:
    """Return whether a linear is one of an expert's."""
    return ".experts." in path


def check_modules(where: str, adapter: AdapterFile, modules: Collection[str]) -> None:
    """Raise UserError for an adapter of linears that the base model does not have; `modules`: the names of those that it has."""
    for module in adapter.target_modules:
        if module in modules:
            continue
        if module in FUSED:
            raise UserError(
                f"{where}: adapts {module}, which holds {FUSED[module]} of this base model in one linear; split its B by rows into theirs, "
                "each with the same A, or use an adapter of this base model"
            )
        raise UserError(f"{where}: adapts {module}, and an adapter here can have {', '.join(modules)}; use an adapter of these alone")


def check_adapter(where: str, adapter: AdapterFile, shapes: Mapping[str, tuple[int, int]], others: Collection[str] = ()) -> None:
    """Raise UserError for an adapter of another base model, or one that is not finite.

    `shapes`: the path of each linear that it must adapt -> its (N, K); `others`: the paths of the base
    model's other modules, which it must leave alone.
    """
    for path, (rows, columns) in shapes.items():
        if path not in adapter.weights:
            raise UserError(f"{where}: has no A and B for {path}; use an adapter of this base model with the job's target_modules")
        a_RK, b_NR = adapter.weights[path]
        if a_RK.shape[1] != columns or b_NR.shape[0] != rows:
            raise UserError(
                f"{where}: {path} maps {a_RK.shape[1]} to {b_NR.shape[0]} features and the base model's maps {columns} to {rows}; "
                "use an adapter that was trained on this base model"
            )
        for name, factor in zip(("A", "B", "magnitudes"), adapter.factors[path], strict=False):
            if not torch.isfinite(factor.float()).all():
                raise UserError(f"{where}: {name} of {path} holds NaN or infinite numbers; use an adapter of a run that did not diverge")
    extra = sorted(adapter.weights.keys() - shapes.keys())
    if extra:
        raise UserError(f"{where}: holds {extra[0]}, which this job does not train; add it to target_modules or use another adapter")
    for path in others:
        if adapter.targets is not None and adapter.targets.covers(path):
            raise UserError(f"{where}: its config adapts {path}, and it holds no A and B for it; save the adapter again")


def _config(adapter: AdapterFile, base_model: str) -> dict[str, object]:
    """Return adapter_config.json, in fields that PEFT has had since 0.8; an integral alpha is an int, which some readers require."""
    chosen: dict[str, object] = {"target_modules": list(adapter.target_modules)}
    targets = adapter.targets if adapter.targets is not None and adapter.targets.choose_by_more_than_names else None
    if all(path.startswith(OF_TEXT) for path in adapter.weights):  # beside a vision tower whose linears have the same names
        of_text = re.escape(OF_TEXT) + rf"layers\.\d+\.\w+\.(?:{'|'.join(adapter.target_modules)})"
        chosen["target_modules"] = of_text if targets is None or targets.target_modules == of_text else list(adapter.weights)
    elif targets is not None:
        chosen = targets.choice()
    r = adapter.expert_r or adapter.r  # peft takes it for the rank of experts, which it joins to one tensor
    patterns = {
        "rank_pattern": _pattern({path: a_RK.shape[0] for path, (a_RK, _) in adapter.weights.items() if not of_expert(path)}, r),
        "alpha_pattern": _pattern({path: _integral(alpha) for path, alpha in adapter.alphas.items()}, _integral(adapter.lora_alpha)),
    }
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _integral(adapter.lora_alpha),
        "lora_dropout": adapter.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        **{key: pattern for key, pattern in patterns.items() if pattern},
        "revision": adapter.revision,
        **chosen,
        "task_type": "CAUSAL_LM",
        **({"use_dora": True} if adapter.magnitudes else {}),
        "use_rslora": adapter.use_rslora,
    }


def _integral(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return PEFT's pattern of what differs from a default: by module names where all of a name are alike, else by paths."""
    found: dict[str, float] = {}
    by_name: dict[str, dict[str, float]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], {})[path] = value
    for name, of_name in by_name.items():
        alike = len(set(of_name.values())) == 1
        found |= {name if alike else re.escape(path): value for path, value in of_name.items() if value != default}
    return found


def raw_config(directory: Path) -> dict[str, Any]:
    """Return what adapter_config.json says, unchecked; UserError where there is none, or it holds no object."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{directory}: has no {CONFIG_FILE}, so it is no PEFT directory; give the directory that holds that file")
    try:
        config = json.loads(read_regular(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON ({one_line(error, 120)}); restore or export the adapter again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(config, dict):
        raise _not_lora(file, config)
    return config


def _read_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json; UserError for anything but plain LoRA."""
    file, config = directory / CONFIG_FILE, raw_config(directory)
    if config.get("peft_type") != "LORA":
        raise _not_lora(file, config.get("peft_type"))
    _check_plain_lora(file, config)
    r, alpha, dropout = config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)  # PEFT's defaults
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= LARGEST_RANK:
        raise _wrong(file, "r", r, f"is not a LoRA rank; use a whole number from 1 to {LARGEST_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < LARGEST_ALPHA:
        raise _wrong(file, "lora_alpha", alpha, "is not a LoRA alpha; use a number above 0")
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise _wrong(file, "lora_dropout", dropout, "is not a probability; use a number from 0, below 1")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), bool):
            raise _wrong(file, key, config[key], "is not true or false; save the adapter again")
    return {**config, "r": r, "lora_alpha": alpha, "use_dora": config.get("use_dora", False)}


def _not_lora(file: Path, kind: object) -> UserError:
    return _wrong(file, "peft_type", kind, "cannot be trained here; use a LORA adapter")


def _wrong(file: Path, key: str, value: object, what: str) -> UserError:
    return UserError(f"{file}: {one_line(key, 80)}: {one_line(json.dumps(value), 160)} {what}")


def _check_plain_lora(file: Path, config: Mapping[str, object]) -> None:
    """Raise UserError for each field, known or unknown, that would change what the adapter computes."""
    known = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
    known.add("use_dora")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise _wrong(file, "task_type", config["task_type"], "is not supported; use a CAUSAL_LM adapter")
    init = config.get("init_lora_weights", True)
    if init not in INITS_OF_UNCHANGED_BASE:
        raise _wrong(file, "init_lora_weights", init, "means a changed base model; convert the adapter to plain LoRA with peft first")
    for key, value in config.items():
        if key in known or key in DESCRIPTIVE or key in WITHOUT_EFFECT or key in OF_TARGETS:
            continue
        if value == [] and key in MAY_BE_EMPTY:
            continue
        if value is not None and value is not False and (key, value) != ("bias", "none"):
            raise _wrong(file, key, value, f"is not supported; use a plain LoRA adapter, without {one_line(key, 80)}")


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read the safetensors file; a pickle is never loaded."""
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never loaded)" if (directory / "adapter_model.bin").is_file() else ""
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}{pickled}; save the adapter again with safe_serialization=True")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged ({one_line(error, 160)}); restore it or save the adapter again") from None


def _pair(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Match every A with its B."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise UserError(f"{file}: holds {one_line(key, 160)}, which is no A or B of a linear; use a plain LoRA adapter")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise UserError(f"{file}: holds no tensors; save the adapter again")
    for path, pair in pairs.items():
        for name in "AB":
            if name not in pair:
                raise UserError(f"{file}: {PREFIX}{path}.lora_{name}.weight is missing; save the adapter again")
    return {path: (pair["A"], pair["B"]) for path, pair in pairs.items()}


def _take_magnitudes(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the magnitudes out of a file's tensors; return path -> m."""
    keys = [key for key in tensors if key.startswith(PREFIX) and key.endswith(f".{TENSORS[2]}")]
    return {key.removeprefix(PREFIX).removesuffix(f".{TENSORS[2]}"): tensors.pop(key) for key in keys}


def _check_magnitudes(file: Path, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]], found: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError unless every linear has magnitudes [out], in floating point, and nothing else has."""
    for path in dict.fromkeys((*weights, *found)):
        key = f"{PREFIX}{path}.{TENSORS[2]}"
        if path not in found:
            raise UserError(f"{file}: {one_line(key, 160)} is missing, and use_dora is true; save the adapter again")
        if path not in weights:
            raise UserError(f"{file}: holds {one_line(key, 160)} without A and B; save the adapter again")
        out, m = len(weights[path][1]), found[path]
        if tuple(m.shape) != (out,) or not m.is_floating_point():
            raise UserError(
                f"{file}: {one_line(key, 160)} is {m.dtype} {list(m.shape)} where floats [{out}] belong; save the adapter again"
            )


def _check_ranks(file: Path, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]], ranks: Mapping[str, int]) -> None:
    """Raise UserError unless every A is [r, in] and every B [out, r], in floating point."""
    for path, pair in weights.items():
        r = ranks[path]
        for name, factor, rank_axis, expected in (("A", pair[0], 0, f"[{r}, in]"), ("B", pair[1], 1, f"[out, {r}]")):
            key, shape = f"{PREFIX}{path}.lora_{name}.weight", tuple(factor.shape)
            if len(shape) != 2 or shape[rank_axis] != r:
                raise UserError(f"{file}: {key} has shape {list(shape)} where r = {r} needs {expected}; save the adapter again")
            if not factor.is_floating_point():
                raise UserError(f"{file}: {key} is {factor.dtype}; save the adapter in a floating-point type")


def _check_targets(file: Path, weights: Collection[str], targets: Targets) -> None:
    """Raise UserError for weights that the config does not adapt, and for a layer that lacks weights which it does."""
    layers_of: dict[tuple[str, str], set[str]] = {}  # a path's parts before and after its layer's number -> layers
    for path in weights:
        if not targets.covers(path):
            name = path.rpartition(".")[2]
            why = "is in exclude_modules" if targets.excludes(path) else "is not in target_modules"
            raise UserError(f"{file}: {one_line(name, 80)} has weights and {why} (of {one_line(path, 160)}); save the adapter again")
        match = LAYER.search(path)
        if match is not None:
            layers_of.setdefault((path[: match.start(1)], path[match.end(1) :]), set()).add(match[1])
    for layer in sorted(set().union(*layers_of.values()), key=int):
        for (before, after), layers in layers_of.items():
            if layer not in layers and targets.covers(before + layer + after):
                raise UserError(f"{file}: {after.rpartition('.')[2]} has no weights in layer {layer}; save the adapter again")
