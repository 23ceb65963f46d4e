"""The config of a run: its keys, defaults and rules, and how a YAML file becomes one.

Each key stands once, as a field of a frozen dataclass, with its default, the rule that guards it, its meaning and its unit;
docs/config.md's tables are made of these (scripts/make_config_doc.py). `load_config` reads strict YAML, applies
the command line's overrides, gives every job the `defaults`, and checks all of it; what comes out is complete and consistent in
itself. Whether it fits the files, the model and the machine is checks.py's question.

    config = load_config("configs/quickstart.yaml", ["defaults.learning_rate=1e-4"])
    print(dump_config(config))      # every key, resolved; loads as the same config
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lora.config.adapter_keys import AdapterKeys
from megatron_lora.config.consistent_job import consistent
from megatron_lora.config.dataset_paths import DatasetConfig, dataset, validation_datasets
from megatron_lora.config.keys import UnknownKey, build, check_keys, key, names_of, required, values
from megatron_lora.config.objective_keys import OBJECTIVES, Preference, objective
from megatron_lora.config.on_save_keys import OnSaveConfig, on_save
from megatron_lora.config.overrides import apply_override
from megatron_lora.config.parallel_keys import ParallelConfig, parallel
from megatron_lora.config.rules import (
    METRICS,
    auto_or,
    base_weights,
    job_name,
    list_of,
    mapping_of,
    null_or,
    number,
    one_of,
    path_of,
    recompute,
    show,
    truth,
    val_set_size,
    whole_number,
)
from megatron_lora.config.schedule_keys import SCHEDULES, WARMUP_RATIO, schedule_arguments
from megatron_lora.config.sweep_keys import Point, SweepConfig, point, sweep, with_points
from megatron_lora.config.yaml_file import dump_yaml, read_yaml
from megatron_lora.errors import UserError

SEED = whole_number("a seed", 0, 2**32 - 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig(AdapterKeys):
    """One adapter: its data, its optimizer and schedule, and the keys of what it adds to the model (adapter_keys.py)."""

    seed: int = key(None, null_or(SEED), "decides data order, the first values of A, and dropout; null: the run's seed")  # int once loaded
    datasets: tuple[DatasetConfig, ...] = required(list_of("{path, type}", dataset), "the job's data, in this order")
    val_datasets: tuple[DatasetConfig, ...] = key(
        (),
        validation_datasets,
        "validation data: what evaluations measure, never trained on; in the formats of `datasets`, with the same masks and cuts",
    )
    val_set_size: float | int = key(
        0,
        val_set_size,
        "in place of `val_datasets`: a share (below 1) or a number of the records of `datasets`, drawn by the job's seed, never trained on",
    )
    bad_rows: str = key(
        "refuse",
        one_of("refuse", "drop"),
        "`refuse`: a record that cannot be trained on fails the job before it starts; `drop`: such records are counted and left out",
    )
    objective: Preference | str = key("sft", objective, "what the job is trained for: `sft`, cross-entropy over the targets")
    train_on_inputs: bool = key(
        False, truth(), "false: the loss counts completions and assistant turns alone; true: every token but the first of a sample"
    )
    train_on: str = key("all", one_of("all", "last"), "which assistant turns of a record the loss counts: all, or the last one alone")
    chat_template: str | None = key(
        None,
        null_or(path_of("a file that holds a chat template, or the name of one")),
        "in place of the base model's: a file, or the name of [one of ours](data.md#chat-templates); null: the base model's",
    )
    chat_template_kwargs: dict[str, Any] | None = key(
        None, null_or(mapping_of("names that a chat template uses")), "what the chat template is given besides messages and tools"
    )
    sequence_len: int = key(
        2048, whole_number("a sequence length in tokens", 2), "longer samples are cut at the right, and counted", "tokens"
    )
    shuffle: bool = key(True, truth(), "true: each epoch visits the samples in an order of its own; false: in file order")
    learning_rate: float = key(2.0e-4, number("a learning rate", 0, 1), "learning rate after the warm-up")
    loraplus_lr_ratio: float | None = key(
        None,
        null_or(number("a ratio of learning rates", 0, 1000, above=True)),
        "LoRA+: B's learning rate is this times `learning_rate`, which is A's; null: both have the same",
    )
    lr_scheduler: str = key("cosine", one_of(*SCHEDULES), "what follows the warm-up: the formulas of `transformers.get_scheduler`")
    lr_scheduler_kwargs: dict[str, Any] | None = key(
        None,
        null_or(schedule_arguments),
        "the schedule's own arguments, under transformers' names: `num_cycles` of `cosine`; `min_lr` or `min_lr_rate`, `num_cycles` of "
        "`cosine_with_min_lr`; `lr_end`, `power` of `polynomial`; `num_decay_steps`, `warmup_type`, `decay_type`, `min_lr_ratio`, "
        "`num_cycles` of `warmup_stable_decay`",
    )
    warmup_ratio: float = key(
        WARMUP_RATIO,
        number("a share of the steps", 0, 1),
        "share of the steps, rounded up, in which the learning rate rises; the first of them has 0",
    )
    warmup_steps: int | None = key(
        None, null_or(whole_number("a number of steps", 0)), "in place of `warmup_ratio`: steps in which the learning rate rises", "steps"
    )
    weight_decay: float = key(0.0, number("a weight decay", 0), "decoupled, on all weights of the adapter, as in torch's AdamW")
    adam_beta1: float = key(0.9, number("a decay rate of Adam", 0, 1, below=True), "as in torch's AdamW")
    adam_beta2: float = key(0.999, number("a decay rate of Adam", 0, 1, below=True), "as in torch's AdamW")
    adam_epsilon: float = key(1.0e-8, number("Adam's epsilon", 0, above=True), "as in torch's AdamW")
    max_grad_norm: float | None = key(
        1.0,
        null_or(number("a gradient norm", 0, above=True)),
        "a larger gradient is scaled down to this norm, taken over the whole adapter; null: never",
    )
    global_batch_size: int = key(
        8,
        whole_number("a number of samples per step", 1),
        "samples of an optimizer step; the last one of an epoch may have fewer",
        "samples",
    )
    num_epochs: int = key(1, whole_number("a number of epochs", 1), "how often each sample is used", "epochs")
    max_steps: int | None = key(
        None, null_or(whole_number("a number of steps", 1)), "when set, overrides `num_epochs`: it cuts or repeats epochs", "steps"
    )
    save_steps: int = key(
        0, whole_number("a number of steps", 0), "steps between two checkpoints; 0: only where the run is stopped", "steps"
    )
    save_total_limit: int | None = key(
        None,
        null_or(whole_number("a number of checkpoints", 1)),
        "checkpoints kept besides the newest one and that of the best step; null: all",
        "checkpoints",
    )
    eval_steps: int = key(
        0,
        whole_number("a number of steps", 0),
        "steps between two evaluations, with one more at the end of the job; 0: at the end of each epoch and of the job",
        "steps",
    )
    eval_on_start: bool = key(False, truth(), "true: an evaluation before the first step, too")
    metric: str = key("eval_loss", one_of(*METRICS), "which number of an evaluation says which weights are the best")
    mode: str = key(None, null_or(one_of("min", "max")), "whether the smallest or the largest is the best; null: as the metric needs it")
    early_stopping_patience: int | None = key(
        None,
        null_or(whole_number("a number of evaluations", 1)),
        "evaluations in a row without an improvement that end the job, at the step of the last of them; null: none do",
        "evaluations",
    )
    early_stopping_threshold: float = key(
        0.0, number("a difference of the metric", 0), "for `early_stopping_patience`: a smaller change of the metric is no improvement"
    )
    loss_watchdog_threshold: float | None = key(
        None,
        null_or(number("a loss", 0, above=True)),
        "pauses the job when its training loss is above this in `loss_watchdog_patience` steps in a row, or not finite; null: never",
    )
    loss_watchdog_patience: int = key(3, whole_number("a number of steps", 1), "for `loss_watchdog_threshold`", "steps")
    eval_watchdog_patience: int | None = key(
        None,
        null_or(whole_number("a number of evaluations", 1)),
        "evaluations in a row without a loss below that of the first one, which pause the job; null: none do",
        "evaluations",
    )
    keep: str = key(
        "best",
        one_of("best", "last"),
        "which weights the PEFT directory holds at the end: those of the best evaluation, or the last; without validation data the last",
    )
    export: str = key(
        "peft",
        one_of("peft", "portable"),
        "the PEFT directory's form. `portable`: the scale is folded into B, so that `lora_alpha` is the rank and `use_rslora` false: "
        "for servers that ignore it",
    )
    export_dtype: str = key("fp32", one_of("fp32", "bf16", "fp16"), "type of the numbers in the PEFT directory; checkpoints keep fp32")
    priority: float = key(
        1.0,
        number("a priority", 0, above=True),
        "share of the device's time among jobs that could use it: 2 gets twice as much as 1. The updates of a job are the same",
    )
    point: Point | None = key(None, point, "what makes the job a point of a sweep; never set by hand")

    @property
    def preference(self) -> Preference | None:
        """The keys of a preference objective; None for sft."""
        return None if isinstance(self.objective, str) else self.objective

    @property
    def reference(self) -> str | None:
        """What its objective holds it to: `base`, `init_adapter`, or None."""
        return None if self.preference is None else self.preference.reference

    @property
    def is_evaluated(self) -> bool:
        """Whether the job has validation data."""
        return bool(self.val_datasets or self.val_set_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run."""

    base_model: str = required(
        path_of("a model directory or hub id"), "Hugging Face directory with `config.json`, tokenizer and safetensors, or a hub id"
    )
    output_dir: str = required(path_of("the path of a directory"), "new, empty, or that of a run to resume")
    precision: str = key("auto", one_of("auto", "bf16", "fp32"), "`auto`: bf16 on CUDA, fp32 on CPU")
    seed: int = key(0, SEED, "the seed of every job that has none of its own")
    parallel: ParallelConfig = key(ParallelConfig(), parallel, "how the run is spread over ranks; default: one rank")
    microbatch_tokens: int | str = key(
        4096,
        auto_or(whole_number("a number of tokens", 1)),
        "what a microbatch may hold, at least the longest sample; `auto`: as many as memory allows and no more than pay, and the "
        "run's `config.yaml` has the number",
        "tokens",
    )
    recompute: str | tuple[str, ...] = key(
        "auto",
        recompute,
        "what backward computes again in place of keeping it: `none`; `cheap`: the outputs of norms and SwiGLU, a third less "
        "activation memory; `full`: each layer, least memory; `auto`: for each layer what fits and costs least time by the memory "
        "model. Results are the same",
    )
    activation_offloading: bool | str = key(
        "auto",
        auto_or(truth()),
        "true: inputs of layers that are recomputed as `full` wait in pinned host memory, and are copied while layers compute; `auto`: "
        "on a GPU, where the run would not fit otherwise. Results are the same",
    )
    adapter_memory: float | str = key(
        "auto",
        auto_or(number("an amount of memory", 0, above=True)),
        "memory of each rank for the adapters that train at the same time, with gradients and Adam's state; more jobs than fit wait in a "
        "queue. `auto`: what activations leave",
        "GB",
    )
    max_wait_s: float | None = key(
        None,
        null_or(number("a time in seconds", 0, above=True)),
        "when a job has waited so long in the queue, the one that is furthest past its share makes room after its step, and is queued "
        "again; null: a job keeps its place until it is over",
        "seconds",
    )
    window_s: float = key(
        5.0,
        number("a time in seconds", 0, above=True),
        "a window of the plan is no longer than this, as predicted; requests to a live run take effect at the border of one",
        "seconds",
    )
    deterministic: bool = key(
        False,
        truth(),
        "true: runs that execute the same plan on the same hardware give the same bits ([what that takes](running.md#the-same-bits-"
        "again)). Attention is torch's, with a fixed order of sums",
    )
    on_save: tuple[OnSaveConfig, ...] = key((), on_save, "what gets the PEFT directory of each job that is done or stopped early")
    load_weights: bool = key(True, truth(), "false: random weights, for benchmarks")
    base_weights: str = key(
        "native",
        base_weights,
        "how the frozen linears are stored and multiplied; LoRA, embedding and head stay in `precision`, which `bf16` stands for. "
        "`storage: nf4` is bitsandbytes' with double quantisation (4.5 bits a weight), `fp8` one copy with a scale for each output; both "
        "are unpacked for each product. `compute: fp8` rounds weights, activations and gradients to 4 significant bits. `native`: both "
        "bf16; `fp8`: compute fp8 over two copies in 8 bits, as large as bf16. 8 bits need a GPU of compute capability 8.9",
    )
    backend: str = key(
        "auto",
        one_of("auto", "torch", "te"),
        "what computes norms and attention. `te`: [Transformer Engine](install.md#transformer-engine); `torch`: our norms and torch's "
        "attention; `auto`: our norms and [cuDNN's attention](install.md#cudnns-attention) where it is installed and works, else torch's "
        "(Transformer Engine's where torch is too old to have its own for packed samples)",
    )
    sweep: SweepConfig | None = key(
        None, sweep, "makes [the points of a sweep](sweeps.md) out of one job; `config.yaml` lists them as jobs"
    )
    jobs: tuple[JobConfig, ...]

    @property
    def may_run_again(self) -> bool:
        """Whether `recompute` lets a layer run again in backward: it is `full`, or may become so."""
        return self.recompute == "auto" or "full" in self.recompute  # the word, or one in the list


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `key.path=value` overrides, fill in defaults and check every key; UserError is one line."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {show(tree)}; a config is a mapping of keys to values")
    for override in overrides:
        apply_override(tree, override)
    try:
        return config_of(tree)
    except UnknownKey as error:
        homes = {
            RunConfig: "the top level",
            ParallelConfig: "parallel",
            JobConfig: "defaults or a job",
            DatasetConfig: "a dataset",
            OnSaveConfig: "on_save",
            **dict.fromkeys(OBJECTIVES.values(), "objective"),
            SweepConfig: "sweep",
        }
        raise UnknownKey(*error.missed, homes) from None


def config_of(tree: dict) -> RunConfig:
    """Return the config that a mapping of keys to values describes, every key checked; takes `defaults` and `jobs` out of the mapping."""
    defaults, jobs = tree.pop("defaults", None), tree.pop("jobs", None)
    check_keys(RunConfig, "", tree, extra=("defaults",))
    seed = SEED("seed", tree.get("seed", 0))
    config = values(RunConfig, "", tree, skip=("jobs",))
    swept = config.pop("sweep", None)
    run = RunConfig(**config, jobs=load_jobs(defaults, with_points(swept, jobs) if swept else jobs, seed))
    if run.activation_offloading is True and not run.may_run_again:
        raise UserError("activation_offloading: true moves inputs of `full` layers, and recompute names none; use recompute: full, or auto")
    if cut := [job for job in run.jobs if job.has_frozen_half and not run.load_weights]:
        how = f"jobs.{cut[0].name}.init_lora_weights: {cut[0].init_lora_weights}"
        raise UserError(f"{how} is cut out of the base weights, and load_weights is false; set it to true")
    if run.deterministic and run.backend == "te":
        raise UserError("deterministic: true takes torch's attention, and backend is 'te'; use auto or torch")
    return run


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML with every key resolved; load_config reads it back as the same config."""
    return dump_yaml(_plain(dataclasses.asdict(config)))


def load_jobs(defaults: object, jobs: object, seed: int) -> tuple[JobConfig, ...]:
    """Merge the defaults into each job and check both under their own key paths; names are unique ignoring case."""
    defaults = {} if defaults is None else defaults
    if not isinstance(defaults, dict):
        raise UserError(f"defaults: {show(defaults)} is not a mapping of job keys to values")
    if "name" in defaults:
        raise UserError(f"defaults.name: {show(defaults['name'])} would name every job; give each entry of jobs its own name")
    check_keys(JobConfig, "defaults", defaults)
    values(JobConfig, "defaults", defaults, skip=names_of(JobConfig) - defaults.keys())
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
        config = consistent(where, build(JobConfig, where, defaults | job), given=defaults | job)
        if config.train_on == "last" and config.train_on_inputs:
            raise UserError(f"{where}.train_on: last contradicts {where}.train_on_inputs: true; keep one of them")
        built[config.name.lower()] = config if config.seed is not None else dataclasses.replace(config, seed=seed)
    return tuple(built.values())


def _plain(value: object) -> object:
    """Turn tuples into lists, so that YAML has only its own types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
