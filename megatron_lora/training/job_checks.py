"""What can be wrong with one job, beyond its config: its adapter to begin with, its checkpoint, its samples.

`train` checks the jobs that it starts with, before anything is written, `add` those that are added, and
job_reader.py those that wait in the queue.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from megatron_lora.config.objective_keys import KtoConfig
from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import check_visits, count_steps
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_files import check_adapter, check_modules, layer_of, of_expert, read_adapter
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.output.checkpoint import check_resume_point
from megatron_lora.output.final_files import check_job_files
from megatron_lora.output.standing import ResumePoint
from megatron_lora.training.references import digest_of_reference
from megatron_lora.training.schedules import num_warmup_steps


def check_data(job: JobConfig, data: JobData, budget: int | str, architecture: Architecture) -> None:
    """Check a job's data where they have been read: the lengths of samples, how often each is taken, the rungs of its sweep."""
    check_pairs(job, data)
    check_lengths(job, data, budget, architecture)
    check_visits(job, data.mixture.num_copies)
    check_rungs(job, data)
    check_decay(job, data)


def check_decay(job: JobConfig, data: JobData) -> None:
    """Check that the decay of a job's schedule begins behind its warm-up."""
    decay, num_steps = (job.lr_scheduler_kwargs or {}).get("num_decay_steps", 0), len(data.steps_of(job).steps)
    warmup = num_warmup_steps(job.warmup_ratio, job.warmup_steps, num_steps)
    if decay and warmup + decay > num_steps:
        given = f"jobs.{job.name}.lr_scheduler_kwargs.num_decay_steps: {decay}"
        raise UserError(f"{given} begin before the {warmup} steps of warm-up end; the job has {num_steps} steps in all, so use fewer")


def check_pairs(job: JobConfig, data: JobData) -> None:
    """Check that samples are pairs where the objective takes pairs, and are not elsewhere: datasets of lengths may be either.

    Of labelled answers, that those for validation have both labels where the metric compares them.
    """
    if isinstance(job.preference, KtoConfig):
        labels = set((data.validation_samples.weights > 0).tolist())
        if job.metric == "eval_rewards/margins" and len(labels) == 1:
            said = f"is the difference of both labels, and all {len(data.validation_samples)} answers for validation have label "
            raise UserError(f"jobs.{job.name}.metric: {job.metric} {said}{show(labels.pop())}; add others, or use eval_loss")
        return
    for samples in (data.samples, data.validation_samples):
        if len(wrong := np.flatnonzero((samples.borders > 0) != (job.preference is not None))):
            record = f"jobs.{job.name}.datasets: record {samples[int(wrong[0])].record}"
            if job.preference is None:
                raise UserError(f"{record} is a pair, and the job's objective is sft; write {{'tokens': N}}, or set objective: dpo")
            raise UserError(f"{record} is one sequence, and the job's objective takes pairs; write {{'chosen': N, 'rejected': M}}")


def check_rungs(job: JobConfig, data: JobData) -> None:
    """Check that a point of a sweep has a step of its own at each rung before its end."""
    if job.point is None:
        return
    sweep, num_steps = job.point.sweep, len(data.steps_of(job).steps)
    if any(step >= after for step, after in itertools.pairwise((*sweep.rung_steps(num_steps), num_steps))):
        rungs = ", ".join(f"{share:.3g}" for share in sweep.rungs)
        raise UserError(
            f"jobs.{job.name}: has {num_steps} steps, too few for rungs after {rungs} of them; raise sweep.first_rung or max_steps"
        )


def check_init_adapter(job: JobConfig, architecture: Architecture, base_model: str) -> None:
    """Check that a job's `init_adapter` has its rank, scale and modules, and fits this base model.

    One that says that it was made for a base model of another name, which has the same shapes, is named in a line.
    """
    if job.init_adapter is None:
        return
    where = f"jobs.{job.name}"
    try:
        check_job_files(Path(job.init_adapter))  # if it is that of a run's job
        adapter = read_adapter(job.init_adapter)
    except UserError as error:
        raise UserError(f"{where}.init_adapter: {error}") from None
    named = f"{where}.init_adapter: {job.init_adapter!r}"
    own = architecture.adapter_modules  # the file's names -> the config's
    check_modules(named, adapter, own)
    plain = () if job.linears else (("r", job.r), ("expert_r", job.expert_rank), ("lora_alpha", job.lora_alpha))
    for key, wanted in (*plain, ("use_rslora", job.use_rslora)):
        found = getattr(adapter, key)
        if wanted != found and (key != "r" or set(job.target_modules) - {*architecture.expert_modules}):
            raise UserError(f"{where}.{key}: {wanted} differs from {found} in init_adapter {job.init_adapter!r}; set {key}: {found}")
    if adapter.magnitudes and job.adapter != "dora":
        raise UserError(f"{where}.adapter: {job.adapter}, and init_adapter {job.init_adapter!r} is a DoRA adapter; set adapter: dora")
    if {own[module] for module in adapter.target_modules} != set(job.target_modules):
        found = ", ".join(own[module] for module in own if module in adapter.target_modules)
        raise UserError(f"{where}.target_modules: differ from those in init_adapter {job.init_adapter!r}; set [{found}]")
    linears = architecture.linear_sizes()
    shapes = {path: (n, k) for path, (k, n) in linears.items() if _is_adapted(job, own[path.rpartition(".")[2]], path)}
    others = [*(path for path in linears if path not in shapes), architecture.embedding.removesuffix(".weight"), "lm_head"]
    check_adapter(named, adapter, shapes, others)
    for path, (a_RK, _) in adapter.weights.items():
        module, layer = own[path.rpartition(".")[2]], layer_of(path)
        wanted = job.expert_rank if of_expert(path) else job.rank_at(module, layer), job.alpha_at(module, layer)
        for key, value, found in zip(("rank", "alpha"), wanted, (len(a_RK), adapter.alphas[path]), strict=True):
            if value != found:
                said = f"{where}.{key}_pattern: gives {path} {value:g}, and init_adapter {job.init_adapter!r} has {found:g}"
                raise UserError(f"{said}; give it that, or use an adapter of the job's")
    if adapter.base_model and Path(adapter.base_model).name != Path(base_model).name:
        made_for = f"was made for the base model {show(adapter.base_model)}, and this run has {base_model!r}, of the same shapes"
        print(f"megatron-lora: {named} {made_for}", file=sys.stderr)


def _is_adapted(job: JobConfig, module: str, path: str) -> bool:
    return module in job.target_modules and (job.linears is None or job.rank_at(module, layer_of(path)) > 0)


def check_checkpoint(job: JobConfig, job_data: JobData, point: ResumePoint) -> None:
    """Check that a job's checkpoint is whole, and was made for this job, with its samples and number of steps."""
    if point.checkpoint is None or point.state is None:
        return
    check_resume_point(job, point)
    if point.state.reference not in ("", digest_of_reference(job)):
        raise UserError(
            f"jobs.{job.name}.init_adapter: {job.init_adapter!r}, to which the job is held, has other weights than when "
            f"{point.checkpoint} was written; restore them, or choose another output_dir"
        )
    num_steps = count_steps(job_data.mixture.num_copies, job.global_batch_size, job.num_epochs, job.max_steps)
    if (point.state.samples, point.state.num_steps) != (job_data.digest(), num_steps):
        raise UserError(
            f"jobs.{job.name}.datasets: have other records or weights, or validation has, or the tokenizer makes other tokens, than when "
            f"{point.checkpoint} was written; restore them, or choose another output_dir"
        )


def check_lengths(job: JobConfig, data: JobData, microbatch_tokens: int | str, architecture: Architecture) -> None:
    """Check that no sample, of training or validation, has more tokens than a microbatch or than the model has positions."""
    where = f"jobs.{job.name}"
    for kind, samples in (("", data.samples), (" for validation", data.validation_samples)):
        if not len(samples):
            continue
        longest = samples[int(samples.lengths.argmax())]
        tokens, sequences = len(longest.tokens), len(longest.lengths)
        if isinstance(microbatch_tokens, int) and tokens > microbatch_tokens:
            raise UserError(
                f"microbatch_tokens: {microbatch_tokens} is less than the {tokens} tokens of record {longest.record}{kind} of {where}; "
                f"set microbatch_tokens: {tokens} or more, or {where}.sequence_len: {microbatch_tokens // sequences}"
            )
        mismatched = samples.longest_mismatched(job.sequence_len) if isinstance(job.preference, KtoConfig) else 0
        if isinstance(microbatch_tokens, int) and mismatched > microbatch_tokens:
            raise UserError(
                f"microbatch_tokens: {microbatch_tokens} is less than the {mismatched} tokens of the longest prompt{kind} of {where} and "
                f"the longest completion, which kto may join; set microbatch_tokens: {mismatched} or more, or {where}.sequence_len: "
                f"{microbatch_tokens}"
            )
        if sequences > 1:
            longest = max(samples, key=lambda sample: max(sample.lengths))
            tokens = max(longest.lengths)
        tokens = max(tokens, mismatched)
        if tokens > architecture.max_positions:
            raise UserError(
                f"{where}.sequence_len: {job.sequence_len} lets record {longest.record}{kind} have {tokens} tokens, and the model has "
                f"{architecture.max_positions} positions; set it to at most {architecture.max_positions}"
            )
