"""Where each job of a run stands: at its newest checkpoint, from which it resumes, or at its start; and what its best weights are.

This is read from the output directory alone, by the checks, the first rank and the commands:

    resume_points(config, job_states(output_dir))["summarise"].step      # steps taken

Nothing here reads a tensor; checkpoint.py does.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import unsealed
from megatron_lora.output.job_states import OVER

STATE_FILE = "state.json"
READ_AT_START = 64  # jobs: more are read when their turn in the queue nears


class Damaged(UserError):
    """A checkpoint that cannot be resumed from: `what` is wrong with it, without the remedy."""

    def __init__(self, checkpoint: Path, what: str):
        super().__init__(checkpoint, what)
        self.checkpoint = checkpoint
        self.what = what

    def __str__(self) -> str:
        return f"{self.what}; train --from-older resumes from a whole checkpoint before {self.checkpoint}, or from the start"


@dataclasses.dataclass(frozen=True, slots=True)
class Best:
    """A job's best evaluation: the steps taken by then, and the value of its metric. The weights lie in `best-<step>/`."""

    step: int
    value: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """What a checkpoint's state.json says of its job."""

    step: int  # steps taken
    num_steps: int  # of the complete job
    num_updates: int  # steps that Adam has counted: those that were not skipped
    skipped_in_a_row: int
    samples: str  # data.samples.JobData.digest of the job
    best: Best | None = None  # of the evaluations up to `step`
    evaluations_without_improvement: int = 0  # in a row
    evaluation_due: bool = False  # whether the job is to be evaluated at `step` and that is not recorded yet
    # Of an earlier version that did not say them: nothing, and they cannot be checked.
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of each other file of the checkpoint
    job: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the keys that decide the job's updates, and its name
    reference: str = ""  # SHA-256 of the weights of the adapter that it is held to, where it is held to one
    metrics: str = ""  # SHA-256 of the lines of metrics.jsonl up to `step`


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """From where a job resumes: a checkpoint and its state, or the job's start."""

    checkpoint: Path | None = None
    state: CheckpointState | None = None

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step if self.state else 0

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation at `step` would still have to run: what an earlier start did before a job's first step does not count."""
        return self.state.evaluation_due if self.state else True

    @property
    def best(self) -> Best | None:
        """The job's best evaluation so far."""
        return self.state.best if self.state else None


def checkpoint_name(step: int) -> str:
    """Name the directory of the checkpoint that a job wrote after `step` steps."""
    return f"checkpoint-{step}"


def best_name(step: int) -> str:
    """Name the directory of the best weights, those after `step` steps."""
    return f"best-{step}"


def steps_of(job_dir: Path, kind: str) -> dict[int, Path]:
    """Return the directories `<kind>-<step>` of a job by their steps, ascending."""
    found = ((re.fullmatch(rf"{kind}-(\d+)", path.name), path) for path in job_dir.glob(f"{kind}-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def resume_point_of(job_dir: Path, before: float = math.inf) -> ResumePoint:
    """Return a job's newest checkpoint `before` a step, or its start if it has none; Damaged for a checkpoint that cannot be read."""
    steps = [each for each in steps_of(job_dir, "checkpoint").items() if each[0] < before]
    if not steps:
        return ResumePoint()
    step, checkpoint = steps[-1]
    state = read_state(checkpoint)
    if not _is_valid(state) or state.step != step:
        raise Damaged(checkpoint, f"{checkpoint / STATE_FILE}: does not describe a job after {step} steps")
    if state.best is not None and not (job_dir / best_name(state.best.step)).is_dir():
        raise Damaged(checkpoint, f"{job_dir / best_name(state.best.step)}: is missing, the best weights by then")
    return ResumePoint(checkpoint=checkpoint, state=state)


def read_state(checkpoint: Path) -> CheckpointState:
    """Read a checkpoint's state.json, its values unchecked; Damaged if it cannot be read."""
    file = checkpoint / STATE_FILE
    try:
        state = CheckpointState(**unsealed(file.read_text(encoding="utf-8")))
        return dataclasses.replace(state, best=Best(**cast(dict, state.best))) if state.best else state
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(checkpoint, f"{file}: cannot be read ({one_line(error, 120)})") from None


def _is_valid(state: CheckpointState) -> bool:
    """Whether a state's values are of their kinds, and a step or an evaluation of the job is still to come."""
    counts = (state.step, state.num_steps, state.num_updates, state.skipped_in_a_row, state.evaluations_without_improvement)
    if not all(type(count) is int and count >= 0 for count in counts) or type(state.evaluation_due) is not bool:
        return False
    if not (isinstance(state.files, dict) and isinstance(state.job, dict) and isinstance(state.metrics, str)):
        return False
    best = state.best or Best(0, 0.0)
    if type(best.step) is not int or not 0 <= best.step <= state.step or type(best.value) is not float or not math.isfinite(best.value):
        return False
    return 0 < state.step < state.num_steps + state.evaluation_due


Choose = Callable[[Path, JobConfig], ResumePoint]  # of a job's directory


def newest(job_dir: Path, job: JobConfig) -> ResumePoint:
    """Choose a job's newest checkpoint."""
    return resume_point_of(job_dir)


def resume_points(config: RunConfig, states: Mapping[str, str], choose: Choose = newest) -> dict[str, ResumePoint]:
    """Return the resume point of each job that is not over; `states` has those of the jobs that the run knows."""
    remaining = [job for job in config.jobs if states.get(job.name) not in OVER]
    return {job.name: choose(Path(config.output_dir) / "jobs" / job.name, job) for job in remaining}


def first_jobs(config: RunConfig, points: Mapping[str, ResumePoint]) -> list[JobConfig]:
    """Return the jobs that are read before a run starts: the first READ_AT_START of those in `points`, begun ones first."""
    remaining = [job for job in config.jobs if job.name in points]
    return sorted(remaining, key=lambda job: points[job.name].step == 0)[:READ_AT_START]
