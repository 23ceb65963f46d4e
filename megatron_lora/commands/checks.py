"""Everything that can be known to be wrong before a weight is loaded or a file is written.

The config is checked against the output directory, the files, the model, the machine and the data,
cheapest first. Each check raises a UserError of one line that names the key, the value and the
remedy. The ranks do not check again.

    inputs = check_run(config, ranks_here=2, owner=True)      # model_dir, architecture, data
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.dataset_sources import MAX_NAME_BYTES, sources_of
from megatron_lora.data.steps import check_visits, count_steps
from megatron_lora.environment import num_cores
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture, read_architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.weight_files import check_weights
from megatron_lora.model.backends import check_backends
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.standing import ResumePoint
from megatron_lora.parallel.partition import check_layout, recompute_of_layers

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
    architecture = read_architecture(model_dir)
    check_layout(architecture, config.parallel)
    if config.recompute != "auto":
        recompute_of_layers(config.recompute, architecture.num_layers)
    if config.load_weights:
        check_weights(model_dir, architecture)
    for job in config.jobs:
        check_init_adapter(job, architecture)
    found = dict(zip(config.jobs, read_data(config, model_dir, architecture.vocab_size), strict=True))
    bad = {job: data for job, data in found.items() if isinstance(data, UserError)}
    for job, error in bad.items():
        if len(bad) == len(found) or job.name not in may_fail:
            raise error
    good = {job: data for job, data in found.items() if job not in bad}
    for job, job_data in good.items():
        check_lengths(job, job_data, config.microbatch_tokens, architecture)
        check_visits(job, job_data.mixture.num_copies)
    failed = {job.name: str(error) for job, error in bad.items()}
    return Inputs(model_dir=model_dir, architecture=architecture, data=tuple(good.values()), failed=failed)


def say_failed(inputs: Inputs) -> None:
    """Print which jobs fail before they start."""
    for name, reason in inputs.failed.items():
        print(f"megatron-lora: job {name} fails before it starts, the others train: {reason}", file=sys.stderr)


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


def check_init_adapter(job: JobConfig, architecture: Architecture) -> None:
    """Check that a job's `init_adapter` has its rank, scale and modules, and fits this base model; imports torch."""
    if job.init_adapter is None:
        return
    from megatron_lora.huggingface.adapter_files import check_adapter, read_adapter

    where = f"jobs.{job.name}"
    try:
        adapter = read_adapter(job.init_adapter)
    except UserError as error:
        raise UserError(f"{where}.init_adapter: {error}") from None
    for key in ("r", "lora_alpha", "use_rslora"):
        wanted, found = getattr(job, key), getattr(adapter, key)
        if wanted != found:
            raise UserError(f"{where}.{key}: {wanted} differs from {found} in init_adapter {job.init_adapter!r}; set {key}: {found}")
    if set(adapter.target_modules) != set(job.target_modules):
        found = ", ".join(module for module in architecture.module_sizes if module in adapter.target_modules)
        raise UserError(f"{where}.target_modules: differ from those in init_adapter {job.init_adapter!r}; set [{found}]")
    sizes = {module: architecture.module_sizes[module] for module in job.target_modules}
    shapes = {
        architecture.module_path(layer, module): (num_out, num_in)
        for layer in range(architecture.num_layers)
        for module, (num_in, num_out) in sizes.items()
    }
    check_adapter(f"{where}.init_adapter: {job.init_adapter!r}", adapter, shapes)


def read_data(config: RunConfig, model_dir: Path, vocab_size: int) -> tuple:
    """Tokenise every job's datasets, or read them from the cache; a job whose data are bad has a UserError there."""
    from megatron_lora.data.samples import try_jobs_data
    from megatron_lora.data.token_cache import cache_dir
    from megatron_lora.data.tokenizer import tokenizer_for
    from megatron_lora.data.tokenizer_checks import doubts_of

    tokenizer = tokenizer_for(config.jobs, model_dir)
    for doubt in () if tokenizer is None else doubts_of(tokenizer):
        print(f"megatron-lora: warning: {doubt}", file=sys.stderr)
    return try_jobs_data(config.jobs, tokenizer, cache_dir(), vocab_size)


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
