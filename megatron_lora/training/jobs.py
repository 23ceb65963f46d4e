"""From a config to jobs that can be planned and trained: their samples, the order of their steps, their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.samples import JobData, load_jobs_data
from megatron_lora.data.steps import JobSamples, job_steps
from megatron_lora.errors import UserError
from megatron_lora.model.adapter_arena import AdapterSpec
from megatron_lora.training.optimizer import OptimizerSettings

MOST_VISITS = 50_000_000  # samples over all of a job's steps (a sample counts once per epoch); each takes about 100 bytes on every rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A job with its samples, and which of them each step takes."""

    config: JobConfig
    data: JobData
    step_samples: JobSamples

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the job."""
        return len(self.step_samples.steps)

    def adapter(self) -> AdapterSpec:
        """Return the settings that the arena needs."""
        c = self.config
        return AdapterSpec(r=c.r, scale=c.scale, dropout=c.lora_dropout, target_modules=frozenset(c.target_modules))

    def optimizer(self) -> OptimizerSettings:
        """Return the settings that the optimizer needs."""
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
    """Tokenise every job's data, or read it from the cache, and choose the samples of its steps.

    Raises UserError for data that cannot be used.
    """
    jobs = []
    for c, data in zip(configs, load_jobs_data(configs, tokenizer, cache_dir, vocab_size), strict=True):
        _check_visits(c, len(data.samples))
        steps = job_steps(len(data.samples), c.global_batch_size, c.num_epochs, c.max_steps, c.shuffle, c.seed)
        jobs.append(TrainingJob(config=c, data=data, step_samples=JobSamples(seed=c.seed, samples=data.samples, steps=steps)))
    return tuple(jobs)


def _check_visits(job: JobConfig, num_samples: int) -> None:
    """Raise UserError for a job with more steps than memory can list."""
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
