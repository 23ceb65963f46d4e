"""The modules that jobs target, once the base model is known: a config may leave them open."""

import dataclasses
from contextlib import suppress

from megatron_lora.config.consistent_job import with_targets
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture


def with_modules(job: JobConfig, architecture: Architecture) -> JobConfig:
    """Return a job that names the modules that it targets of the base model; UserError where that does not have one."""
    return with_targets(job, tuple(architecture.module_sizes), architecture.expert_modules, architecture.model_type)


def targeted(config: RunConfig, architecture: Architecture) -> RunConfig:
    """Return a config whose jobs name the modules that they target; UserError where the base model does not have one."""
    return dataclasses.replace(config, jobs=tuple(with_modules(job, architecture) for job in config.jobs))


def completed(job: JobConfig, architecture: Architecture) -> JobConfig:
    """Return a job that was added with its modules; as it is where the base model does not have them, which checks of its fit say."""
    with suppress(UserError):
        return with_modules(job, architecture)
    return job


def jobs_of(config: RunConfig, architecture: Architecture) -> tuple[JobConfig, ...]:
    """Return the jobs of a config with their modules; those of a run name them already."""
    return targeted(config, architecture).jobs if any(job.target_modules is None for job in config.jobs) else config.jobs
