"""Jobs of random tokens whose samples have the lengths of a named workload (lengths.json), or one length: 16x4096 is steps of 16 samples.

Job i has the lengths of the workload's job i modulo its number of jobs, and every further round of jobs starts one step later; steps go
around when more are asked for than the workload has. The last `completion` of each sample's tokens are its targets.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.samples import JobData, Sample
from megatron_lora.data.steps import JobSamples
from megatron_lora.errors import UserError
from megatron_lora.training.jobs import TrainingJob
from scheduling.types import Lengths

SUITE = Path(__file__).resolve().parent / "lengths.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpecs:
    """What all jobs of a case have in common, and the rank and dropout of each (the last of either for all further jobs)."""

    count: int
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    completion: float = 0.25
    learning_rate: float = 1e-4
    seed: int = 0

    def of(self, job: int) -> tuple[int, float]:
        """Return rank and dropout of a job."""
        return self.ranks[min(job, len(self.ranks) - 1)], self.dropouts[min(job, len(self.dropouts) - 1)]

    def configs(self) -> tuple[JobConfig, ...]:
        """Return the jobs as a config has them."""
        jobs = []
        for job in range(self.count):
            r, dropout = self.of(job)
            jobs.append(
                JobConfig(
                    name=f"job-{job}",
                    seed=self.seed + job,
                    datasets=(DatasetConfig(path="random.jsonl", type="text"),),
                    r=r,
                    lora_alpha=2.0 * r,
                    lora_dropout=dropout,
                    learning_rate=self.learning_rate,
                    lr_scheduler="constant",
                    warmup_ratio=0.0,
                )
            )
        return tuple(jobs)


def read_workload(path: Path, name: str) -> Lengths:
    """Return the lengths [job][step][sample] of a named workload, or of COUNTxLENGTH; UserError where there is none."""
    if even := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return [[[int(even[2])] * int(even[1])]]
    try:
        workloads = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--lengths: {path} cannot be read ({error}); name a JSON file of workloads") from None
    if name not in workloads:
        raise UserError(f"--workload: {path.name} has no {name!r}; choose among {', '.join(workloads)}, or COUNTxLENGTH")
    return workloads[name]["data"]


def take(workload: Lengths, num_jobs: int, num_steps: int) -> Lengths:
    """Return lengths for any number of jobs and steps of a workload."""
    chosen = []
    for job in range(num_jobs):
        steps, first = workload[job % len(workload)], job // len(workload)
        chosen.append([steps[(first + step) % len(steps)] for step in range(num_steps)])
    return chosen


def head(lengths: Lengths, tokens: int) -> Lengths:
    """Return the first step of as many jobs, and of as many samples of each, as give about `tokens` tokens; something of each job first."""
    per_job = max(1, math.ceil(tokens / max(1, len(lengths))))
    chosen: list[list[list[int]]] = []
    for steps in lengths:
        batch: list[int] = []
        for sample in steps[0]:
            if batch and sum(batch) + sample > per_job:
                break
            batch.append(sample)
        chosen.append([batch])
        if sum(sum(steps[0]) for steps in chosen) >= tokens:
            break
    return chosen


def make_jobs(lengths: Lengths, configs: Sequence[JobConfig], vocab_size: int, completion: float) -> tuple[TrainingJob, ...]:
    """Return jobs of random tokens; a step's samples are rows of their own, whatever the number of steps."""
    jobs = []
    for config, steps in zip(configs, lengths, strict=False):
        generator = np.random.default_rng(config.seed)
        samples, order = [], []
        for batch in steps:
            order.append(tuple((0, len(samples) + k) for k in range(len(batch))))
            for length in batch:
                targets = np.arange(length) >= min(length - 1, math.floor(length * (1 - completion)))
                targets[0] = False
                tokens = generator.integers(0, vocab_size, length, dtype=np.int32)
                samples.append(Sample(len(samples), tokens, targets))
        data = JobData(tuple(samples), 0, 0)
        jobs.append(
            TrainingJob(config=config, data=data, step_samples=JobSamples(seed=config.seed, samples=data.samples, steps=tuple(order)))
        )
    return tuple(jobs)
