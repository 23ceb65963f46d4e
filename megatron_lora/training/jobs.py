"""From a config to jobs that can be planned and trained: their samples, the order of their steps, their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.samples import JobData, load_jobs_data
from megatron_lora.data.steps import JobRows, job_steps
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.data.tokenizer import tokenizer_for
from megatron_lora.errors import UserError
from megatron_lora.model.adapter_arena import AdapterSpec
from megatron_lora.training.optimizer import OptimizerSettings

MOST_VISITS = 50_000_000  # samples of one job's steps, each of which takes about 100 bytes on every rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A job with its data read and its steps laid out."""

    config: JobConfig
    data: JobData
    rows: JobRows

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the job."""
        return len(self.rows.steps)

    def adapter(self) -> AdapterSpec:
        """Return what the arena needs."""
        c = self.config
        return AdapterSpec(r=c.r, scale=c.scale, dropout=c.lora_dropout, target_modules=frozenset(c.target_modules))

    def optimizer(self) -> OptimizerSettings:
        """Return what the optimizer needs."""
        c = self.config
        return OptimizerSettings(
            learning_rate=c.learning_rate,
            lr_scheduler=c.lr_scheduler,
            warmup_ratio=c.warmup_ratio,
            num_steps=self.num_steps,
            weight_decay=c.weight_decay,
            adam_beta1=c.adam_beta1,
            adam_beta2=c.adam_beta2,
            adam_epsilon=c.adam_epsilon,
            max_grad_norm=c.max_grad_norm,
        )


def read_jobs(configs: Sequence[JobConfig], tokenizer, cache_dir: Path | None, vocab_size: int) -> tuple[TrainingJob, ...]:
    """Tokenise every job's data (from the cache where it was before) and lay out its steps; UserError for data that cannot be used."""
    jobs = []
    for c, data in zip(configs, load_jobs_data(configs, tokenizer, cache_dir, vocab_size), strict=True):
        _check_visits(c, len(data.samples))
        steps = job_steps(len(data.samples), c.global_batch_size, c.num_epochs, c.max_steps, c.shuffle, c.seed)
        jobs.append(TrainingJob(config=c, data=data, rows=JobRows(seed=c.seed, samples=data.samples, steps=steps)))
    return tuple(jobs)


def read_jobs_in_turn(configs: Sequence[JobConfig], model_dir: Path, vocab_size: int, host: dist.ProcessGroup) -> tuple[TrainingJob, ...]:
    """Read the jobs' data on every rank, the first before the others, so that they find it in the cache; `host` is a group of all."""
    tokenizer = tokenizer_for(configs, model_dir)
    jobs = None
    for turn in (True, False):
        if (dist.get_rank() == 0) == turn:
            jobs = read_jobs(configs, tokenizer, cache_dir(), vocab_size)
        dist.barrier(group=host)
    assert jobs is not None
    return jobs


def _check_visits(job: JobConfig, num_samples: int) -> None:
    """Refuse a job that is longer than its steps can be laid out."""
    if job.max_steps is None:
        key, each = "num_epochs", num_samples
    else:
        key, each = "max_steps", min(job.global_batch_size, num_samples)
    value = getattr(job, key)
    if value * each > MOST_VISITS:
        raise UserError(
            f"jobs.{job.name}.{key}: {value} takes {value * each} samples, and a job may take {MOST_VISITS}; "
            f"use at most {MOST_VISITS // each}"
        )
