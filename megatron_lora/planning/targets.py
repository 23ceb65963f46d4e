"""The modules that jobs target, once the base model is known: a config may leave them open."""

import dataclasses

from megatron_lora.config.consistent_job import with_targets
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.huggingface.architecture import Architecture


def targeted(config: RunConfig, architecture: Architecture) -> RunConfig:
    """Return a config whose jobs name the modules that they target of the base model; UserError where it does not have one."""
    modules = tuple(architecture.module_sizes), architecture.expert_modules
    return dataclasses.replace(config, jobs=tuple(with_targets(job, *modules, architecture.model_type) for job in config.jobs))


def jobs_of(config: RunConfig, architecture: Architecture) -> tuple[JobConfig, ...]:
    """Return the jobs of a config with their modules; those of a run name them already."""
    return targeted(config, architecture).jobs if any(job.target_modules is None for job in config.jobs) else config.jobs
