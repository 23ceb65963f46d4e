"""The config of a run: its keys, defaults and rules, and how a YAML file becomes one.

Each key stands once, as a field of a frozen dataclass beside the rule that guards it. `load_config` reads strict YAML, applies
the command line's overrides, gives every job the `defaults`, and checks all of it; what comes out is complete and consistent in
itself. Whether it fits the files, the model and the machine is checks.py's question.

    config = load_config("configs/quickstart.yaml", ["defaults.learning_rate=1e-4"])
    print(dump_config(config))      # every key, resolved; loads as the same config
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_lora.config.overrides import apply_override
from megatron_lora.config.rules import (
    OTHER_WORDS,
    Rule,
    later,
    list_of,
    null_or,
    number,
    one_of,
    path_of,
    show,
    subset_of,
    suggest,
    truth,
    whole_number,
)
from megatron_lora.config.yaml_file import dump_yaml, read_yaml
from megatron_lora.errors import UserError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DATASET_TYPES = ("messages", "sharegpt", "alpaca", "prompt_completion", "text", "lengths")
RECOMPUTE = ("none", "cheap", "full")
DATASET_FILES = (".json", ".jsonl", ".parquet")
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SEED = whole_number("a seed", 0, 2**32 - 1)


def key(default: object, rule: Rule):
    """Declare a key that has a default."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def required(rule: Rule):
    """Declare a key that every config must set."""
    return dataclasses.field(metadata={"rule": rule})


def job_name(path: str, value: object) -> str:
    """Accept a name that is safe as a folder name on any system."""
    if not isinstance(value, str) or not JOB_NAME.fullmatch(value):
        raise UserError(
            f"{path}: {show(value)} cannot name a job; use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return value


def dataset_file(path: str, value: object) -> str:
    """Accept the path of a file of rows."""
    name = path_of("the path of a dataset")(path, value)
    if not name.endswith(DATASET_FILES):
        raise UserError(f"{path}: {show(value)} is no kind of file that is read; use one that ends in {', '.join(DATASET_FILES)}")
    return name


def budget(path: str, value: object) -> int | str:
    """Accept the token budget of a microbatch, or auto."""
    return value if value == "auto" else whole_number("a number of tokens, or auto", 1)(path, value)


def recompute(path: str, value: object) -> str | tuple[str, ...]:
    """Accept auto, a recomputation policy for all layers, or a list of one for each layer of the model."""
    if isinstance(value, list):
        return list_of("policies, one per layer", one_of(*RECOMPUTE))(path, value)
    return one_of("auto", *RECOMPUTE)(path, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks; `layers_per_stage` None is resolved so that stages take equally long (resolve.py)."""

    pipeline: int = key(1, whole_number("a number of pipeline stages", 1))
    tensor: int = key(1, whole_number("a number of tensor-parallel ranks", 1))
    data: int = key(1, whole_number("a number of replicas", 1))
    sequence: bool = key(False, truth())
    layers_per_stage: tuple[int, ...] | None = key(None, null_or(list_of("layer counts", whole_number("a number of layers", 1))))

    @property
    def world_size(self) -> int:
        """Ranks that the run needs."""
        return self.pipeline * self.tensor * self.data


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """One file of rows and the format of its rows."""

    path: str = required(dataset_file)
    type: str = required(one_of(*DATASET_TYPES))


def dataset(path: str, value: object) -> DatasetConfig:
    """Accept a mapping of DatasetConfig's keys."""
    return _build(DatasetConfig, path, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One adapter: its data, its LoRA settings, its optimizer and schedule."""

    name: str = required(job_name)
    seed: int | None = key(None, null_or(SEED))
    datasets: tuple[DatasetConfig, ...] = required(list_of("{path, type}", dataset))
    val_datasets: tuple[DatasetConfig, ...] | None = key(None, later(null_or(list_of("{path, type}", dataset)), off=None))
    train_on_inputs: bool = key(False, truth())
    sequence_len: int = key(2048, whole_number("a sequence length in tokens", 2))
    shuffle: bool = key(True, truth())
    r: int = key(16, whole_number("a LoRA rank", 1, 256))
    lora_alpha: float = key(32.0, number("a LoRA alpha", 0, above=True))
    lora_dropout: float = key(0.0, number("a dropout probability", 0, 1, below=True))
    use_rslora: bool = key(False, truth())
    target_modules: tuple[str, ...] = key(TARGET_MODULES, subset_of("module names", TARGET_MODULES))
    init_adapter: str | None = key(None, null_or(path_of("a PEFT directory")))
    learning_rate: float = key(2.0e-4, number("a learning rate", 0, 1))
    lr_scheduler: str = key("cosine", one_of("constant", "linear", "cosine"))
    warmup_ratio: float = key(0.03, number("a share of the steps", 0, 1))
    weight_decay: float = key(0.0, number("a weight decay", 0))
    adam_beta1: float = key(0.9, number("a decay rate of Adam", 0, 1, below=True))
    adam_beta2: float = key(0.999, number("a decay rate of Adam", 0, 1, below=True))
    adam_epsilon: float = key(1.0e-8, number("Adam's epsilon", 0, above=True))
    max_grad_norm: float | None = key(1.0, null_or(number("a gradient norm", 0, above=True)))
    global_batch_size: int = key(8, whole_number("a number of samples per step", 1))
    num_epochs: int = key(1, whole_number("a number of epochs", 1))
    max_steps: int | None = key(None, null_or(whole_number("a number of steps", 1)))
    save_steps: int = key(0, whole_number("a number of steps", 0))
    eval_steps: int = key(0, later(whole_number("a number of steps", 0), off=0))
    early_stopping_patience: int | None = key(None, later(null_or(whole_number("a number of evaluations", 1)), off=None))

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run. `precision` auto is bf16 on CUDA and fp32 on CPU; `microbatch_tokens` auto is resolved by what fits and pays.

    `recompute` trades time for memory without changing a bit: none keeps all that backward reads, cheap makes norm and SwiGLU outputs
    again (a third less memory), full keeps each layer's input alone and runs the layer again; auto is for each layer what fits.

    `base_weights` fp8 multiplies in 8 bits with the frozen linears (fused_ops.fp8): faster on GPUs that can, no smaller, and not the same
    numbers; native is in `precision`. `backend` says who computes norms and attention (backends.py).
    """

    base_model: str = required(path_of("a model directory or hub id"))
    output_dir: str = required(path_of("the path of a directory"))
    precision: str = key("auto", one_of("auto", "bf16", "fp32"))
    seed: int = key(0, SEED)
    parallel: ParallelConfig = key(ParallelConfig(), lambda path, value: parallel(path, value))
    microbatch_tokens: int | str = key(4096, budget)
    recompute: str | tuple[str, ...] = key("auto", recompute)
    load_weights: bool = key(True, truth())
    base_weights: str = key("native", one_of("native", "fp8"))
    backend: str = key("auto", one_of("auto", "torch", "te"))
    jobs: tuple[JobConfig, ...]


def parallel(path: str, value: object) -> ParallelConfig:
    """Accept a mapping of ParallelConfig's keys that agree with each other."""
    config = _build(ParallelConfig, path, {} if value is None else value)
    if config.sequence and config.tensor == 1:
        raise UserError(f"{path}.sequence: true needs {path}.tensor above 1, which is 1; set one of the two")
    layers = config.layers_per_stage
    if layers is not None and len(layers) != config.pipeline:
        raise UserError(
            f"{path}.layers_per_stage: {list(layers)} is for {len(layers)} stages and {path}.pipeline is {config.pipeline}; "
            f"give {config.pipeline} layer counts, or null for stages that take equally long"
        )
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `key.path=value` overrides, fill in defaults and check every key; UserError is one line."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {show(tree)}; a config is a mapping of keys to values")
    for override in overrides:
        apply_override(tree, override)
    defaults, jobs = tree.pop("defaults", None), tree.pop("jobs", None)
    _check_keys(RunConfig, "", tree, extra=("defaults",))
    seed = SEED("seed", tree.get("seed", 0))
    config = _values(RunConfig, "", tree, skip=("jobs",))
    return RunConfig(**config, jobs=_load_jobs(defaults, jobs, seed))


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML with every key resolved; load_config reads it back as the same config."""
    return dump_yaml(_plain(dataclasses.asdict(config)))


def _load_jobs(defaults: object, jobs: object, seed: int) -> tuple[JobConfig, ...]:
    """Merge the defaults into each job and check both under their own key paths; names are unique ignoring case."""
    defaults = {} if defaults is None else defaults
    if not isinstance(defaults, dict):
        raise UserError(f"defaults: {show(defaults)} is not a mapping of job keys to values")
    if "name" in defaults:
        raise UserError(f"defaults.name: {show(defaults['name'])} would name every job; give each entry of jobs its own name")
    _check_keys(JobConfig, "defaults", defaults)
    _values(JobConfig, "defaults", defaults, skip=_names(JobConfig) - defaults.keys())
    if not isinstance(jobs, list) or not jobs:
        raise UserError(f"jobs: {show(jobs)} is not a list of jobs; write at least one, with its name and datasets")
    built: dict[str, JobConfig] = {}
    for position, job in enumerate(jobs):
        where = f"jobs.{position}"
        if not isinstance(job, dict):
            raise UserError(f"{where}: {show(job)} is not a job; write a mapping with at least its name and datasets")
        name = job_name(f"{where}.name", job["name"]) if "name" in job else None
        where = f"jobs.{name}" if name else where
        if name and name.lower() in built:
            raise UserError(f"{where}.name: two jobs have this name (upper and lower case count as the same); rename one")
        config = _build(JobConfig, where, defaults | job)
        built[config.name.lower()] = config if config.seed is not None else dataclasses.replace(config, seed=seed)
    return tuple(built.values())


def _build(kind: type, path: str, tree: object):
    """Make the dataclass `kind` from a mapping, every key checked."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {show(tree)} is not a mapping; its keys are {', '.join(sorted(_names(kind)))}")
    _check_keys(kind, path, tree)
    return kind(**_values(kind, path, tree))


def _values(kind: type, path: str, tree: dict, skip: frozenset[str] | tuple[str, ...] | set[str] = ()) -> dict:
    """Check the value of each field of `kind` that `tree` gives; a missing one takes its default or is an error."""
    values = {}
    for field in dataclasses.fields(kind):
        where = f"{path}.{field.name}".lstrip(".")
        if field.name in skip:
            continue
        if field.name in tree:
            values[field.name] = field.metadata["rule"](where, tree[field.name])
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{where}: is missing; every {_owner(kind)} needs it")
    return values


def _check_keys(kind: type, path: str, tree: dict, extra: tuple[str, ...] = ()) -> None:
    """Refuse a key that `kind` does not have, saying what was meant or where it belongs."""
    known = _names(kind) | set(extra)
    for name in tree:
        if name in known:
            continue
        hint, meant = suggest(name, known), OTHER_WORDS.get(name.lower(), name)
        homes = {RunConfig: "the top level", ParallelConfig: "parallel", JobConfig: "defaults or a job", DatasetConfig: "a dataset"}
        home = next((place for other, place in homes.items() if other is not kind and meant in _names(other)), None)
        if home and (meant == name or not hint):
            hint = f" here; {'it' if meant == name else meant} is a key of {home}"
        listed = "" if hint else f"; the keys are {', '.join(sorted(known))}"
        raise UserError(f"{path}.{name}".lstrip(".") + f": unknown key{hint}{listed}")


def _names(kind: type) -> frozenset[str]:
    """Names of a dataclass's fields."""
    return frozenset(field.name for field in dataclasses.fields(kind))


def _owner(kind: type) -> str:
    """What a dataclass describes, in words."""
    return {RunConfig: "config", JobConfig: "job", DatasetConfig: "dataset"}[kind]


def _plain(value: object) -> object:
    """Turn tuples into lists, so that YAML has only its own types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
