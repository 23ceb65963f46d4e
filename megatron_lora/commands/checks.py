"""Everything that can be known to be wrong before a weight is loaded or a file is written.

The config is checked against the output directory, the files, the model, the machine and the data,
cheapest first. Each check raises a UserError of one line that names the key, the value and the
remedy. The ranks do not check again.

    inputs = check_run(config, ranks_here=2, owner=True)      # model_dir, architecture, data
"""

import dataclasses
import itertools
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.dataset_sources import MAX_NAME_BYTES, sources_of
from megatron_lora.data.steps import check_visits, count_steps
from megatron_lora.environment import num_cores
from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.architecture import Architecture, unread_fields
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.backends import check_backends
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.standing import ResumePoint
from megatron_lora.parallel.partition import check_layout, recompute_of_layers

SAMPLES_LOOKED_AT = 100  # of a job, for its chat template's tokens, which stand in all of them
RANKS_PER_CORE = 4  # with more gloo ranks than this on a core, they mostly wait for each other


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the checks have read: the model's directory and architecture, and the data of each job, in the order of the jobs.

    `failed`: why the jobs cannot train whose data are bad; they are not among the others.
    """

    model_dir: Path
    architecture: Architecture
    data: tuple
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_run(config: RunConfig, ranks_here: int | None = None, owner: bool = True) -> Inputs:
    """Check that a run can start here with `ranks_here` ranks (default: all); `owner`: check the output directory too.

    A job whose data are bad fails alone, unless all are so, or it has trained before and they were good then.
    """
    points = {}
    if owner:
        points = RunDirectory.check(config)
        config = dataclasses.replace(config, jobs=tuple(job for job in config.jobs if job.name in points))
    check_files(config)
    check_backends(config)
    check_devices(config.parallel.world_size if ranks_here is None else ranks_here)
    may_fail = {job.name for job in config.jobs if points.get(job.name, ResumePoint()).checkpoint is None}
    inputs = read_inputs(config, may_fail)
    remaining = [job for job in config.jobs if job.name not in inputs.failed]
    for job, job_data in zip(remaining, inputs.data, strict=True):
        check_checkpoint(job, job_data, points.get(job.name, ResumePoint()))
    return inputs


def read_inputs(config: RunConfig, may_fail: Collection[str] = ()) -> Inputs:
    """Read and check model, adapters and data: all that `plan` needs, which has no ranks and no output directory.

    Jobs of `may_fail` whose data are bad are in the inputs' `failed`, if any job is left.
    """
    check_files(config)
    model_dir = resolve_base_model(config.base_model)
    architecture = read_base_model(model_dir, config.load_weights)
    show_unread_fields(model_dir, architecture.model_type)
    check_layout(architecture, config.parallel)
    if config.recompute != "auto":
        recompute_of_layers(config.recompute, architecture.num_layers)
    for job in config.jobs:
        check_init_adapter(job, architecture, config.base_model)
    found = list(zip(config.jobs, read_data(config, model_dir, architecture), strict=True))
    bad = {job.name: data for job, data in found if isinstance(data, UserError)}
    for name, error in bad.items():
        if len(bad) == len(found) or name not in may_fail:
            raise error
    good = [(job, data) for job, data in found if job.name not in bad]
    for job, job_data in good:
        check_lengths(job, job_data, config.microbatch_tokens, architecture)
        check_visits(job, job_data.mixture.num_copies)
    failed = {name: str(error) for name, error in bad.items()}
    return Inputs(model_dir=model_dir, architecture=architecture, data=tuple(data for _, data in good), failed=failed)


def say_failed(inputs: Inputs) -> None:
    """Print which jobs fail before they start."""
    for name, reason in inputs.failed.items():
        print(f"megatron-lora: job {name} fails before it starts, the others train: {reason}", file=sys.stderr)


def show_unread_fields(model_dir: Path, model_type: str) -> None:
    """Print one line that names the fields of config.json that neither transformers nor this trainer reads, if there are any."""
    fields = unread_fields(model_dir)
    if fields:
        print(
            f"megatron-lora: base_model: {model_dir / 'config.json'}: not read for a {model_type}, by transformers either: "
            + one_line(", ".join(fields), 400),
            file=sys.stderr,
        )


def check_files(config: RunConfig) -> None:
    """Check that every dataset and adapter that the config names exists and can be read."""
    for job in config.jobs:
        for position, dataset in enumerate(job.datasets):
            sources_of(dataset, f"jobs.{job.name}.datasets.{position}.path")
        if job.init_adapter is None:
            continue
        if len(Path(job.init_adapter).name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"jobs.{job.name}.init_adapter: {show(job.init_adapter)}: is too long a name for a directory; correct the path")
        if not Path(job.init_adapter).is_dir():
            raise UserError(f"jobs.{job.name}.init_adapter: {job.init_adapter!r}: no such directory; name a PEFT directory, or null")


def check_devices(ranks_here: int) -> None:
    """Check that this machine has a GPU for each rank or, if it has no GPU, enough cores; imports torch."""
    import torch

    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if ranks_here > gpus:
            raise UserError(
                f"parallel: needs {ranks_here} ranks on this machine, and it shows {gpus} GPUs; lower parallel.pipeline or "
                "parallel.tensor, or run on its CPU cores with CUDA_VISIBLE_DEVICES="
            )
    elif ranks_here > RANKS_PER_CORE * num_cores():
        raise UserError(
            f"parallel: needs {ranks_here} ranks, and this machine has no GPU and {num_cores()} CPU cores; "
            f"lower parallel.pipeline or parallel.tensor to at most {RANKS_PER_CORE * num_cores()} ranks"
        )


def check_init_adapter(job: JobConfig, architecture: Architecture, base_model: str) -> None:
    """Check that a job's `init_adapter` has its rank, scale and modules, and fits this base model; imports torch.

    One that says that it was made for a base model of another name, which has the same shapes, is named in a line.
    """
    if job.init_adapter is None:
        return
    from megatron_lora.huggingface.adapter_files import check_adapter, check_modules, read_adapter

    where = f"jobs.{job.name}"
    try:
        adapter = read_adapter(job.init_adapter)
    except UserError as error:
        raise UserError(f"{where}.init_adapter: {error}") from None
    named = f"{where}.init_adapter: {job.init_adapter!r}"
    check_modules(named, adapter, architecture.module_sizes)
    for key in ("r", "lora_alpha", "use_rslora"):
        wanted, found = getattr(job, key), getattr(adapter, key)
        if wanted != found:
            raise UserError(f"{where}.{key}: {wanted} differs from {found} in init_adapter {job.init_adapter!r}; set {key}: {found}")
    if set(adapter.target_modules) != set(job.target_modules):
        found = ", ".join(module for module in architecture.module_sizes if module in adapter.target_modules)
        raise UserError(f"{where}.target_modules: differ from those in init_adapter {job.init_adapter!r}; set [{found}]")
    paths = {
        (layer, module): architecture.module_path(layer, module)
        for layer in range(architecture.num_layers)
        for module in architecture.module_sizes
    }
    sizes = {module: architecture.module_sizes[module] for module in job.target_modules}
    shapes = {path: (sizes[module][1], sizes[module][0]) for (_, module), path in paths.items() if module in sizes}
    others = [*(path for path in paths.values() if path not in shapes), "model.embed_tokens", "lm_head"]
    check_adapter(named, adapter, shapes, others)
    if adapter.base_model and Path(adapter.base_model).name != Path(base_model).name:
        made_for = f"was made for the base model {show(adapter.base_model)}, and this run has {base_model!r}, of the same shapes"
        print(f"megatron-lora: {named} {made_for}", file=sys.stderr)


def read_data(config: RunConfig, model_dir: Path, architecture: Architecture) -> tuple:
    """Tokenise every job's datasets, or read them from the cache; warn of tokens in them that the base model does not know.

    A job whose data are bad has a UserError there.
    """
    from megatron_lora.data.chat_template import chat_settings
    from megatron_lora.data.samples import try_jobs_data
    from megatron_lora.data.token_cache import cache_dir
    from megatron_lora.data.tokenizer import tokenizer_for
    from megatron_lora.data.tokenizer_checks import doubts_of

    tokenizer = tokenizer_for(config.jobs, model_dir)
    for doubt in () if tokenizer is None else doubts_of(tokenizer):
        print(f"megatron-lora: warning: {doubt}", file=sys.stderr)
    for job in config.jobs:
        chat_settings(job)  # a template's file that is not there is the config's fault, not the data's
    data = try_jobs_data(config.jobs, tokenizer, cache_dir(), architecture.vocab_size)
    if tokenizer is not None and config.load_weights:
        good = {job.name: found for job, found in zip(config.jobs, data, strict=True) if not isinstance(found, UserError)}
        warn_of_untrained_tokens(good, tokenizer, model_dir, architecture)
    return data


def warn_of_untrained_tokens(data: Mapping[str, Any], tokenizer, model_dir: Path, architecture: Architecture) -> None:
    """Warn of added tokens, such as a chat template's, in the first samples of a job's data whose rows the base model never trained."""
    from megatron_lora.huggingface.untrained_tokens import untrained_tokens
    from megatron_lora.huggingface.weight_slices import Checkpoint

    added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
    used = {
        name: {int(token) for sample in itertools.islice(job.samples, SAMPLES_LOOKED_AT) for token in sample.tokens} & added.keys()
        for name, job in data.items()
    }
    tokens = {token: added[token] for found in used.values() for token in found}
    untrained = untrained_tokens(Checkpoint(model_dir, architecture), architecture, tokens, added) if tokens else []
    if untrained:
        jobs = [name for name, found in used.items() if {added[token] for token in found} & set(untrained)]
        print(
            f"megatron-lora: warning: base_model: has untrained rows for {', '.join(untrained)}, which stand in the data of "
            f"{', '.join(jobs)}; such tokens can hardly be learnt: use an instruct model, or chat_template: plain",
            file=sys.stderr,
        )


def check_checkpoint(job: JobConfig, job_data, point: ResumePoint) -> None:
    """Check that a job's checkpoint is complete, and was made with the job's samples and number of steps."""
    from megatron_lora.output.checkpoint import check_tensors

    if point.checkpoint is None or point.state is None:
        return
    check_tensors(point.checkpoint)
    num_steps = count_steps(job_data.mixture.num_copies, job.global_batch_size, job.num_epochs, job.max_steps)
    if (point.state.samples, point.state.num_steps) != (job_data.digest(), num_steps):
        raise UserError(
            f"jobs.{job.name}.datasets: have other records or weights, or the tokenizer makes other tokens of them, than when "
            f"{point.checkpoint} was written; restore them, or choose another output_dir"
        )


def check_lengths(job: JobConfig, data, microbatch_tokens: int | str, architecture: Architecture) -> None:
    """Check that no sample has more tokens than a microbatch or than the model has positions."""
    where = f"jobs.{job.name}"
    longest = data.samples[int(data.samples.lengths.argmax())]
    tokens = len(longest.tokens)
    if isinstance(microbatch_tokens, int) and tokens > microbatch_tokens:
        raise UserError(
            f"microbatch_tokens: {microbatch_tokens} is less than the {tokens} tokens of record {longest.record} of {where}; "
            f"set microbatch_tokens: {tokens} or more, or {where}.sequence_len: {microbatch_tokens}"
        )
    if tokens > architecture.max_positions:
        raise UserError(
            f"{where}.sequence_len: {job.sequence_len} lets record {longest.record} have {tokens} tokens, and the model has "
            f"{architecture.max_positions} positions; set it to at most {architecture.max_positions}"
        )
