"""Everything that can be known to be wrong before a weight is loaded or a file is written.

The config is checked against the output directory, the files, the model, the machine and the data,
cheapest first. Each check raises a UserError of one line that names the key, the value and the
remedy. The ranks do not check again.

    inputs = check_run(config, ranks_here=2, owner=True)      # model_dir, architecture, data
"""

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_lora.config.live import Live
from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig, RunConfig, load_config
from megatron_lora.data.dataset_sources import MAX_NAME_BYTES, sources_of
from megatron_lora.environment import num_cores
from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.architecture import Architecture, unread_fields
from megatron_lora.huggingface.base_files import check_same_base, digests_of_base
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.backends import check_backends
from megatron_lora.output.accounting_file import read_accounting
from megatron_lora.output.events import Replay, read_events
from megatron_lora.output.resume import changed_key
from megatron_lora.output.run_directory import RunDirectory, base_files_of, has_begun, with_changes
from megatron_lora.output.standing import Choose, Damaged, ResumePoint, newest
from megatron_lora.parallel.partition import check_layout, recompute_of_layers
from megatron_lora.planning.targets import targeted

SAMPLES_LOOKED_AT = 100  # of a job, for its chat template's tokens, which stand in all of them
RANKS_PER_CORE = 4  # with more gloo ranks than this on a core, they mostly wait for each other


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the checks have read: the model's directory and architecture, and the data of each job, in the order of the jobs.

    `jobs` are the config's, with the modules that they target of this model.
    `failed`: why the jobs cannot train whose data are bad; they are not among the others.
    """

    model_dir: Path
    architecture: Architecture
    jobs: tuple[JobConfig, ...]
    data: tuple
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rests_on: Mapping[str, str] = dataclasses.field(default_factory=dict)  # digests of the base model's files


def check_run(
    config: RunConfig, ranks_here: int | None = None, owner: bool = True, from_older: bool = False, keep_alive: bool = False
) -> Inputs:
    """Check that a run can start here with `ranks_here` ranks (default: all); `owner`: check the output directory too.

    With `keep_alive` it may have no job to train.

    A job whose data are bad fails alone, unless all are so, or it has trained before and they were good then.
    """
    try:
        return _check_run(config, ranks_here, owner, from_older, keep_alive)
    except Damaged as damaged:
        from megatron_lora.output.checkpoint import with_remedy

        name = damaged.checkpoint.parent.name
        raise with_remedy(damaged, next(job for job in with_changes(config).jobs if job.name == name)) from None


def choice(from_older: bool) -> Choose:
    """Return which checkpoints a run resumes from: the newest ones or, `from_older`, the newest ones that are whole."""
    if not from_older:
        return newest
    from megatron_lora.output.checkpoint import newest_whole

    return newest_whole


def _check_run(config: RunConfig, ranks_here: int | None, owner: bool, from_older: bool, keep_alive: bool) -> Inputs:
    points = {}
    if owner:
        points = RunDirectory.check(config, choice(from_older), keep_alive)
        _check_what_ranks_read(Path(config.output_dir))
        config = with_changes(config)
        config = dataclasses.replace(config, jobs=tuple(job for job in config.jobs if job.name in points))
    check_files(config)
    check_backends(config)
    check_devices(config.parallel.world_size if ranks_here is None else ranks_here)
    may_fail = {job.name for job in config.jobs if points.get(job.name, ResumePoint()).checkpoint is None}
    inputs = read_inputs(config, may_fail)
    remaining = [job for job in inputs.jobs if job.name not in inputs.failed]
    from megatron_lora.data.token_cache import cache_dir
    from megatron_lora.training.first_factors import check_first_factors
    from megatron_lora.training.job_checks import check_checkpoint

    if owner:
        inputs = dataclasses.replace(inputs, rests_on=digests_of_base(inputs.model_dir, config.load_weights, cache_dir()))
        check_same_base(base_files_of(Path(config.output_dir)), inputs.rests_on, inputs.model_dir)
    for job, job_data in zip(remaining, inputs.data, strict=True):
        check_checkpoint(job, job_data, points.get(job.name, ResumePoint()))
        if job.name in points and job.has_frozen_half and points[job.name].checkpoint is None:
            check_first_factors(Path(config.output_dir) / "jobs" / job.name)
    return inputs


def config_to_repeat(config: RunConfig, live: Live) -> RunConfig:
    """Return the config with which a run is repeated: what decides its plan is as it was there. Without `replay` it is `config`.

    UserError unless the jobs and ranks are those of that run, and the output directory is new.
    """
    run = live.replay
    if run is None:
        return config
    if live.keep_alive:
        raise UserError("--replay: repeats a run to its end and waits for no other jobs; leave --keep-alive out")
    added = [event.job for event in read_events(run) if event.event == "added"]
    Replay(run)
    before = load_config(run / "config.yaml")
    before = dataclasses.replace(before, jobs=tuple(job for job in before.jobs if job.name not in added))
    changed = changed_key(before, config)
    for key in ("pipeline", "tensor", "expert", "data", "sequence"):
        new, old = getattr(config.parallel, key), getattr(before.parallel, key)
        changed = changed or (f"parallel.{key}: {new} differs from {old}" if new != old else None)
    names = [[job.name for job in each.jobs] for each in (before, config)]
    if changed or names[0] != names[1]:
        changed = changed or f"jobs: {', '.join(names[1])} are not {', '.join(names[0])}"
        raise UserError(f"--replay: {one_line(changed, 300)} in {str(run / 'config.yaml')!r}, the run to repeat; set it back")
    if Path(config.output_dir).exists() and has_begun(Path(config.output_dir)):
        raise UserError(
            f"--replay: output_dir: {config.output_dir!r} holds a run; choose a new directory, or leave --replay out to resume that run"
        )
    return dataclasses.replace(before, output_dir=config.output_dir, jobs=config.jobs, on_save=config.on_save)


def _check_what_ranks_read(path: Path) -> None:
    """Raise UserError for files of a run that has begun which only its first rank would read, when they are rewound already."""
    from megatron_lora.planning.calibration import RUN_FILE, read_calibration

    if has_begun(path):
        read_accounting(path)
        if (path / RUN_FILE).exists():
            read_calibration(path / RUN_FILE)


def read_inputs(config: RunConfig, may_fail: Collection[str] = ()) -> Inputs:
    """Read and check model, adapters and data: all that `plan` needs, which has no ranks and no output directory.

    Jobs of `may_fail` whose data are bad are in the inputs' `failed`, if any job is left.
    """
    from megatron_lora.training.job_checks import check_data, check_init_adapter

    check_files(config)
    model_dir = resolve_base_model(config.base_model)
    architecture = read_base_model(model_dir, config.load_weights)
    show_unread_fields(model_dir, architecture.model_type)
    for note in architecture.notes():
        print(f"megatron-lora: base_model: {model_dir}: {note}", file=sys.stderr)
    check_layout(architecture, config.parallel, config.base_weights)
    if config.recompute != "auto":
        recompute_of_layers(config.recompute, architecture.num_layers)
    config = targeted(config, architecture)
    for job in config.jobs:
        check_init_adapter(job, architecture, config.base_model)
    found = list(zip(config.jobs, read_data(config, model_dir, architecture), strict=True))
    bad = {job.name: data for job, data in found if isinstance(data, UserError)}
    for name, error in bad.items():
        if len(bad) == len(found) or name not in may_fail:
            raise error
    good = [(job, data) for job, data in found if job.name not in bad]
    for job, job_data in good:
        check_data(job, job_data, config.microbatch_tokens, architecture)
    failed = {name: str(error) for name, error in bad.items()}
    return Inputs(model_dir=model_dir, architecture=architecture, jobs=config.jobs, data=tuple(data for _, data in good), failed=failed)


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
    for entry in config.on_save:
        if entry.command is not None and shutil.which(entry.command[0]) is None:
            raise UserError(f"on_save.command: {show(entry.command[0])}: no such program can be run here; correct the name or path")
    for job in config.jobs:
        for key, datasets in (("datasets", job.datasets), ("val_datasets", job.val_datasets)):
            for position, dataset in enumerate(datasets):
                sources_of(dataset, f"jobs.{job.name}.{key}.{position}.path")
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
