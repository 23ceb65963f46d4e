"""Whether the keys of a job fit together, and those that others decide: `mode`, `keep`, and by its base model `target_modules`.

job = consistent("jobs.one", job, given=mapping)                               # as far as the config alone says
job = with_targets(job, ("q_proj", "k_proj", "v_proj", "o_proj"), EXPERT_MODULES)        # on a mixture of experts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from megatron_lora.config.adapter_keys import check_adapter_keys
from megatron_lora.config.objective_keys import check_objective
from megatron_lora.config.rules import EXPERT_MODULES, METRICS, MODULES, show
from megatron_lora.config.schedule_keys import check_schedule
from megatron_lora.config.sweep_keys import check_point
from megatron_lora.errors import UserError

JobConfig = Any  # of schema.py, which imports this file


def with_targets(job: JobConfig, own: Sequence[str], of_experts: Sequence[str], kind: str) -> JobConfig:
    """Return a job whose `target_modules` are those that it adapts of a base model of a `kind`; UserError where it has no such.

    `own` are the base model's linears outside experts, `of_experts` those of each expert.
    """
    where, given = f"jobs.{job.name}", job.target_modules
    if job.experts and not of_experts:
        raise UserError(f"{where}.experts: true, and a {kind} has no experts; remove it")
    for module in given or ():
        if module in of_experts and not job.experts:
            raise UserError(f"{where}.target_modules: {module} is of a {kind}'s experts, which are frozen; set experts: true, or remove it")
        if module not in (*own, *of_experts):
            remedy = f"set target_modules: [{', '.join(own)}], or some of these"
            raise UserError(f"{where}.target_modules: {module} is no linear of a {kind}; {remedy}")
    targets = list(own if given is None else given)
    if job.experts and not set(targets) & set(EXPERT_MODULES):
        targets += of_experts
    if job.experts and ("gate_proj" in targets) != ("up_proj" in targets):
        named, other = ("gate_proj", "up_proj") if "gate_proj" in targets else ("up_proj", "gate_proj")
        raise UserError(
            f"{where}.target_modules: {named} of experts without {other}, which PEFT refuses since they are one matrix; name both"
        )
    return dataclasses.replace(job, target_modules=tuple(module for module in MODULES if module in targets))


def same_targets(one: JobConfig, other: JobConfig) -> bool:
    """Return whether two jobs of one base model target the same: planning may have completed one of them."""
    if one.linears or other.linears:  # names, which patterns came to, are compared as they were written
        mine, its = (job.linears.target_modules if job.linears else job.target_modules for job in (one, other))
        return mine == its
    (mine, its), experts = ({*(job.target_modules or ())} for job in (one, other)), {*EXPERT_MODULES} if one.experts else set()
    mine, its = (targets if targets & experts else targets | experts for targets in (mine, its))
    return None in (one.target_modules, other.target_modules) or mine == its


def _check_expert_keys(where: str, job: JobConfig) -> None:
    if job.expert_r is not None and not job.experts:
        raise UserError(f"{where}.expert_r: {job.expert_r} is the rank of experts' adapters; set experts: true, or remove it")
    if job.experts and job.use_rslora:
        raise UserError(
            f"{where}.use_rslora: true gives experts another scale in PEFT, which joins gate and up to one matrix of twice the rank; set "
            "it to false, and lora_alpha higher"
        )


def _check_dora(where: str, job: JobConfig) -> None:
    """Raise UserError where `adapter: dora` does not go with the job's other keys."""
    if job.adapter != "dora":
        return
    reference, init = job.reference, "init_adapter"
    wrong = {
        "lora_dropout": (job.lora_dropout > 0, "0"),
        "experts": (job.experts, "false"),
        "export": (job.export == "portable", "peft, since no LoRA adapter computes the same"),
        "objective.reference": (reference == init, "base"),
        "init_lora_weights": (job.has_frozen_half, "true, or gaussian"),
    }
    for name, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            raise UserError(f"{where}.{name}: does not go with {where}.adapter: dora; set {name}: {remedy}")


def consistent(where: str, job: JobConfig, given: Collection[str]) -> JobConfig:
    """Return a job with the `mode` and `keep` that it leaves open chosen; UserError where its keys contradict. `given`: those written."""
    _check_expert_keys(where, job)
    check_adapter_keys(where, job)
    _check_dora(where, job)
    check_objective(where, job)
    check_schedule(where, job)
    if job.val_datasets and job.val_set_size:
        size = f"{where}.val_set_size: {show(job.val_set_size)}"
        raise UserError(f"{size} takes records of {where}.datasets, and val_datasets are given; keep one of the two keys")
    if job.point is not None:
        check_point(where, job, job.point)
    if job.point is not None and not job.is_evaluated:
        raise UserError(f"{where}: a sweep compares its points by evaluations; set jobs.{job.point.sweep.job}.val_datasets or val_set_size")
    mode = METRICS[job.metric]
    if job.mode not in (None, mode):
        raise UserError(f"{where}.mode: {job.mode} contradicts {where}.metric: {job.metric}, of which {mode} is the best; remove it")
    wanted = {
        "eval_steps": job.eval_steps,
        "eval_on_start": job.eval_on_start,
        "early_stopping_patience": job.early_stopping_patience,
        "eval_watchdog_patience": job.eval_watchdog_patience,
    }
    if "keep" in given and job.keep == "best":
        wanted["keep"] = job.keep
    for name, value in wanted.items():
        if value and not job.is_evaluated:
            raise UserError(f"{where}.{name}: {show(value)} needs validation data; set {where}.val_datasets or val_set_size, or remove it")
    if job.early_stopping_threshold and job.early_stopping_patience is None:
        threshold = f"{where}.early_stopping_threshold: {job.early_stopping_threshold:g}"
        raise UserError(f"{threshold} needs {where}.early_stopping_patience; set a number of evaluations, or remove it")
    return dataclasses.replace(job, mode=mode, keep=job.keep if job.is_evaluated else "last")
