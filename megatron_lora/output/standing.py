"""Where each job of a run stands: at its newest checkpoint, from which it resumes, or at its start.

This is read from the output directory alone, by the checks, the first rank and the commands:

    resume_points(config, job_states(output_dir))["summarise"].step      # steps taken

Nothing here reads a tensor; checkpoint.py does.
"""

import dataclasses
import json
import re
from pathlib import Path

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.output.job_states import OVER

STATE_FILE = "state.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """What a checkpoint's state.json says of its job."""

    step: int  # steps taken
    num_steps: int  # of the complete job
    num_updates: int  # steps that Adam has counted: those that were not skipped
    skipped_in_a_row: int
    samples: str  # data.samples.JobData.digest of the job


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """From where a job resumes: a checkpoint and its state, or the job's start."""

    checkpoint: Path | None = None
    state: CheckpointState | None = None

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step if self.state else 0


def checkpoint_name(step: int) -> str:
    """Name the directory of the checkpoint that a job wrote after `step` steps."""
    return f"checkpoint-{step}"


def resume_point_of(job_dir: Path) -> ResumePoint:
    """Return a job's newest checkpoint, or its start if it has none; UserError for a checkpoint that cannot be read."""
    steps = {int(match[1]): path for path in job_dir.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    if not steps:
        return ResumePoint()
    checkpoint = steps[max(steps)]
    file = checkpoint / STATE_FILE
    try:
        state = CheckpointState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {how_to_recover(checkpoint)}") from None
    numbers = (state.step, state.num_steps, state.num_updates, state.skipped_in_a_row)
    are_counts = all(type(number) is int and number >= 0 for number in numbers)
    if not are_counts or state.step != max(steps) or not 0 < state.step < state.num_steps:
        raise UserError(f"{file}: does not describe a job after {max(steps)} steps; {how_to_recover(checkpoint)}")
    return ResumePoint(checkpoint=checkpoint, state=state)


def how_to_recover(checkpoint: Path) -> str:
    """Say what to do about a damaged checkpoint, for the end of a message."""
    return f"remove {checkpoint}, to resume from the checkpoint before it or from the start"


def resume_points(config: RunConfig, states: dict[str, str]) -> dict[str, ResumePoint]:
    """Return the resume point of each job that is not over; `states` has those of the jobs that the run knows."""
    remaining = [job.name for job in config.jobs if states.get(job.name) not in OVER]
    return {name: resume_point_of(Path(config.output_dir) / "jobs" / name) for name in remaining}
