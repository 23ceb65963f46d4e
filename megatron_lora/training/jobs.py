"""A job as one rank holds it: its config and data, where it resumes, its adapter and optimizer, its state.

    jobs = read_jobs(config.jobs, tokenizer, cache_dir, vocab_size, resume_points)      # number -> Job

A job is *resident* while it has an adapter row and an optimizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_lora.config.objective_keys import KtoConfig, OrpoConfig
from megatron_lora.config.schema import JobConfig
from megatron_lora.data.evaluation import evaluation_steps
from megatron_lora.data.microbatch import Part
from megatron_lora.data.sample_arrays import JobSamples, Samples
from megatron_lora.data.samples import JobData, load_jobs_data
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.data.tokenizer import tokenizer_for
from megatron_lora.model.arena_region import AdapterSpec, LinearSpec
from megatron_lora.output.standing import ResumePoint
from megatron_lora.planning.adapter_rows import modules_of
from megatron_lora.training.objectives import Outcome, cross_entropy, labelled, preference
from megatron_lora.training.optimizer import JobOptimizer, OptimizerSettings
from megatron_lora.training.references import References
from megatron_lora.training.window_changes import Leaving


@dataclass(slots=True, kw_only=True)
class Job:
    """A job as one rank holds it.

    Plans and messages name it by its number, the arena by its adapter row.
    """

    number: int
    config: JobConfig
    data: JobData
    step_samples: JobSamples
    resume_point: ResumePoint = ResumePoint()
    adapter_row: int = -1  # in the arena; -1: not resident
    resident_optimizer: JobOptimizer | None = None  # of its adapter on this rank, while it is resident
    references: References | None = None  # of an objective that has some
    divergences: dict[int, Tensor] = field(default_factory=dict)  # on the last stage, of batches under way: sums over mismatched samples
    initial: Tensor | None = None  # of one whose reference is the adapter it began from: its factors, as the arena takes them
    state: str = "queued"  # one of output/job_states.py; kept by the first rank
    steps_taken: int = 0
    steps_saved: int = 0  # steps taken at its last checkpoint
    evaluated_after: int = -1  # steps taken at its last evaluation here that is complete
    evaluation_steps: tuple[int, ...] = ()  # after which numbers of steps it is still to be evaluated, ascending
    leaving: Leaving | None = None  # after which step it leaves, where that is decided
    skipped_in_a_row: int = 0  # as reported; the optimizer counts its own on the device
    exported_after: int = -1  # steps that the adapter in its PEFT directory has taken, as the first rank has written it here
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of its PEFT directory's files, as the first rank has written them here
    advice: str = ""  # for those who serve its adapter, as in the card there

    def __post_init__(self):
        point = self.resume_point
        self.steps_taken = self.steps_saved = point.step
        self.evaluation_steps = evaluation_steps(self.config, self.step_samples.steps, point.step, point.evaluation_due)
        self.skipped_in_a_row = point.state.skipped_in_a_row if point.state else 0

    @property
    def name(self) -> str:
        """The job's name in the config."""
        return self.config.name

    @property
    def optimizer(self) -> JobOptimizer:
        """The optimizer of the job's adapter on this rank; the job must be resident."""
        assert self.resident_optimizer is not None, f"job {self.name} has no adapter row"
        return self.resident_optimizer

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the job."""
        return len(self.step_samples.steps)

    @property
    def validation_samples(self) -> Samples:
        """What the job is evaluated on; none without validation data."""
        return self.data.validation_samples

    @property
    def has_reference(self) -> bool:
        """Whether its objective holds it to a reference."""
        return self.config.reference is not None

    @property
    def reference_has_adapter(self) -> bool:
        """Whether its reference is the adapter that it began from, and not the base model."""
        return self.config.reference == "init_adapter"

    @property
    def has_mismatched(self) -> bool:
        """Whether its objective compares the policy with the reference on mismatched samples, in front of each batch."""
        return isinstance(self.config.preference, KtoConfig)

    @property
    def trains_prompts(self) -> bool:
        """Whether the cross-entropy counts the prompts of chosen answers too."""
        return isinstance(self.config.preference, OrpoConfig)

    def outcome(self, rows: Tensor, part: Part, weights: Tensor) -> Outcome:
        """Return what the job's objective makes of a segment's rows (objectives.py) with their `weights`."""
        if part.pairs is None:
            return cross_entropy(rows, weights)
        config = self.config.preference
        assert config is not None
        reference = None if self.references is None else self.references.of(part.pairs)
        if isinstance(config, KtoConfig):
            assert reference is not None
            return labelled(config, rows, part.pairs, reference, self.divergences[part.batch] * part.pairs.pair_weight)
        return preference(config, rows, part.pairs, reference, weights)

    def is_evaluated_after(self, step: int) -> bool:
        """Whether an evaluation comes after `step` steps."""
        place = bisect_left(self.evaluation_steps, step)
        return place < len(self.evaluation_steps) and self.evaluation_steps[place] == step

    def owes_evaluation(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is not complete yet."""
        return self.is_evaluated_after(step) and self.evaluated_after < step

    def next_rung(self, num_passed: int) -> int | None:
        """Return after which step a point of a sweep is at its next rung; None where it has none before its end."""
        return self.rungs[num_passed] if num_passed < len(self.rungs) else None

    @property
    def rungs(self) -> Sequence[int]:
        """After how many steps a point of a sweep is at each of its rungs."""
        return self.config.point.sweep.rung_steps(self.num_steps) if self.config.point else ()

    def adapter_spec(self) -> AdapterSpec:
        """Return the settings that the arena needs."""
        return spec_of(self.config)

    def optimizer_settings(self) -> OptimizerSettings:
        """Return the settings that the optimizer needs."""
        keys = (field.name for field in fields(OptimizerSettings) if field.name != "num_steps")
        return OptimizerSettings(num_steps=self.num_steps, **{key: getattr(self.config, key) for key in keys})


Jobs = Mapping[int, Job]  # by number


def spec_of(job: JobConfig) -> AdapterSpec:
    """Return what the arena needs to know of a job's adapter."""
    return AdapterSpec(
        r=job.lora_rank,
        scale=job.scale,
        dropout=job.lora_dropout,
        target_modules=frozenset(modules_of(job)),
        expert_rank=job.expert_rank,
        expert_scale=job.lora_alpha / max(1, job.expert_rank),
        linears=tuple(
            LinearSpec(each.module, frozenset(each.layers), each.r * job.halves, job.scale_of(each.r, each.lora_alpha) / job.scale)
            for each in (job.linears.of if job.linears else ())
        ),
        has_frozen_half=job.has_frozen_half,
    )


def read_jobs(
    configs: Sequence[JobConfig],
    tokenizer,
    cache_dir: Path | None,
    vocab_size: int,
    resume_points: Mapping[str, ResumePoint] | None = None,
) -> dict[int, Job]:
    """Tokenise every job's data, or read it from the cache, and number the jobs in their order; returns number -> job.

    `resume_points` are by name; a job without one starts at step 0. Raises UserError for data that
    cannot be used.
    """
    jobs = {}
    for number, (c, data) in enumerate(zip(configs, load_jobs_data(configs, tokenizer, cache_dir, vocab_size), strict=True)):
        point = (resume_points or {}).get(c.name, ResumePoint())
        jobs[number] = Job(number=number, config=c, data=data, step_samples=data.steps_of(c), resume_point=point)
    return jobs


def read_jobs_in_turn(
    configs: Sequence[JobConfig],
    model_dir: Path,
    vocab_size: int,
    host_group: dist.ProcessGroup,
    resume_points: Mapping[str, ResumePoint] | None = None,
) -> dict[int, Job]:
    """Read the jobs' data on every rank, the first before the others, which then find the tokens in the cache.

    With `resume_points`, only jobs that are named there.
    """
    configs = [c for c in configs if resume_points is None or c.name in resume_points]
    tokenizer = tokenizer_for(configs, model_dir)
    jobs = {}
    for first_rank_reads in (True, False):
        if (dist.get_rank() == 0) == first_rank_reads:
            jobs = read_jobs(configs, tokenizer, cache_dir(), vocab_size, resume_points)
        dist.barrier(group=host_group)
    return jobs
