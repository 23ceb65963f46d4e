"""The modules that jobs target, once the base model is known: a config may leave them open, or choose them by patterns.

Patterns are resolved as PEFT does (huggingface/adapter_targets.py), and each of them must do something.
"""

import dataclasses
from contextlib import suppress

from megatron_lora.config.adapter_keys import Linear, Linears
from megatron_lora.config.consistent_job import with_targets
from megatron_lora.config.rules import MODULES, show
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_targets import Targets, first_match, pattern_key
from megatron_lora.huggingface.architecture import HEAD, Architecture

Paths = dict[str, tuple[int, str]]  # path of a linear -> its layer and module


def with_modules(job: JobConfig, architecture: Architecture) -> JobConfig:
    """Return a job that names the modules that it targets of the base model; UserError where that does not have one."""
    if job.linears is not None:
        written = dataclasses.replace(job, target_modules=job.linears.target_modules, linears=None)
        if _resolved(written, architecture) != job:
            said = "is what a run wrote for other keys of the job, or another base model; remove it, and set target_modules to"
            raise UserError(f"jobs.{job.name}.linears: {said} {show(written.target_modules)}, as it was, or to others")
    elif job.has_patterns:
        job = _resolved(job, architecture)
    else:
        job = with_targets(job, tuple(architecture.module_sizes), architecture.expert_modules, architecture.model_type)
    if job.has_frozen_half:
        _check_sizes(job, architecture)
    return job


def targets_of(job: JobConfig, names: tuple[str, ...] = ()) -> Targets:
    """Return the fields that choose a job's linears as they were written; `names` stand for a `target_modules` that was left open."""
    given = job.linears.target_modules if job.linears else job.target_modules
    return Targets(
        target_modules=given or names,
        exclude_modules=job.exclude_modules or (),
        layers_to_transform=job.layers_to_transform or (),
        rank_pattern=job.rank_pattern or {},
        alpha_pattern=job.alpha_pattern or {},
    )


def _resolved(job: JobConfig, architecture: Architecture) -> JobConfig:
    """Return a job with the linears that its patterns come to."""
    names = tuple(architecture.module_sizes)
    paths = {architecture.module_path(layer, name): (layer, name) for layer in range(architecture.num_layers) for name in names}
    targets = targets_of(job, names)
    covered = _covered(job, targets, paths, architecture)
    groups: dict[tuple[str, int, float], list[int]] = {}
    used: dict[str, set[str]] = {"rank_pattern": set(), "alpha_pattern": set()}
    for path in covered:
        layer, module = paths[path]
        for name, found in used.items():
            found.add(pattern_key(getattr(targets, name), path) or "")
        r, alpha = first_match(targets.rank_pattern, path, job.r), first_match(targets.alpha_pattern, path, job.lora_alpha)
        groups.setdefault((module, r, alpha), []).append(layer)
    for name, found in used.items():
        for key in getattr(targets, name):
            if key not in found:
                raise UserError(f"jobs.{job.name}.{name}: {show(key)} decides for no linear that the job adapts; correct or remove it")
    of = [Linear(module=module, layers=tuple(layers), r=r, lora_alpha=alpha) for (module, r, alpha), layers in groups.items()]
    of.sort(key=lambda each: (MODULES.index(each.module), each.layers))
    modules = tuple(module for module in MODULES if any(each.module == module for each in of))
    return dataclasses.replace(job, target_modules=modules, linears=Linears(target_modules=job.target_modules, of=tuple(of)))


def _covered(job: JobConfig, targets: Targets, paths: Paths, architecture: Architecture) -> list[str]:
    """Return the paths that a job adapts; UserError where one of its names or layers does nothing, or names what stays frozen."""
    where, kind = f"jobs.{job.name}", architecture.model_type
    if late := [layer for layer in targets.layers_to_transform if layer >= architecture.num_layers]:
        raise UserError(f"{where}.layers_to_transform: {late[0]} is none of the {architecture.num_layers} layers; they count from 0")
    frozen = {HEAD.removesuffix(".weight"): "the head", architecture.embedding.removesuffix(".weight"): "the embedding"}
    for layer in range(architecture.num_layers if architecture.num_experts else 0):
        frozen |= dict.fromkeys(architecture.expert_paths(layer, "0"), "experts")
        frozen[architecture.router(layer).removesuffix(".weight")] = "a router"
    for path, what in frozen.items():
        if targets.covers(path):
            raise UserError(f"{where}.target_modules: {show(job.target_modules)} names {what} of a {kind}, {path}, which stays frozen")
    chosen = filter(dataclasses.replace(targets, exclude_modules=()).covers, paths)
    known = (("target_modules", targets.target_modules, paths), ("exclude_modules", targets.exclude_modules, (*chosen, *frozen)))
    for key, given, there in known:
        for name in (given,) if isinstance(given, str) else given:
            alone = Targets(target_modules=name if isinstance(given, str) else (name,))
            if not any(map(alone.covers, there)):
                if any(map(alone.covers, paths)):
                    raise UserError(f"{where}.{key}: {show(name)} leaves out what the job does not adapt anyway; remove it")
                example = f"a name such as {next(iter(architecture.module_sizes))}, or for complete paths such as {next(iter(paths))}"
                raise UserError(f"{where}.{key}: {show(name)} is no linear of a {kind}; write {example}")
    covered = [path for path in paths if targets.covers(path)]
    if not covered:
        raise UserError(f"{where}.exclude_modules: leaves no linear of {where}.target_modules; remove some of them")
    return covered


def _check_sizes(job: JobConfig, architecture: Architecture) -> None:
    """Raise UserError where a linear has fewer features than the rank that is to be cut out of its weight."""
    for module in job.target_modules:
        r = max(each.r for each in job.linears.of if each.module == module) if job.linears else job.r
        if r > (most := min(architecture.module_sizes[module])):
            raise UserError(f"jobs.{job.name}.init_lora_weights: {job.init_lora_weights} cuts rank {r} out of {module}, whose is {most}")


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
    open_jobs = any(job.target_modules is None or job.has_patterns or job.linears for job in config.jobs)
    return targeted(config, architecture).jobs if open_jobs else config.jobs
