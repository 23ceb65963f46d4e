"""Where a job stands: its newest checkpoint, or its start. Needs no tensors; checkpoint.py has those.

Read from the output directory alone, by the checks, the first rank and the commands:

    resume_points(config, job_states(output_dir))["summarise"].step      # steps taken
"""

import dataclasses
import json
import re
from pathlib import Path

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError

STATE_FILE = "state.json"
ENDED_STATES = ("done", "failed")  # states of jobs that do not go on


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """Where a job stood at its checkpoint (checkpoint.py)."""

    step: int  # steps taken
    num_steps: int  # of the whole job
    num_updates: int  # steps that Adam has counted: those that were not skipped
    skipped_in_a_row: int
    samples: str  # data.digest_of the job's samples


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """From where a job goes on: a checkpoint, or its start."""

    checkpoint: Path | None = None
    state: CheckpointState | None = None

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step if self.state else 0


def checkpoint_name(step: int) -> str:
    """Name the directory of a job's checkpoint after so many steps."""
    return f"checkpoint-{step}"


def resume_point_of(job_dir: Path) -> ResumePoint:
    """Return where a job goes on: its checkpoint of most steps, if it has any; UserError for one that cannot be read."""
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
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not whole or state.step != max(steps) or not 0 < state.step < state.num_steps:
        raise UserError(f"{file}: does not say where a job stands after {max(steps)} steps; {how_to_recover(checkpoint)}")
    return ResumePoint(checkpoint=checkpoint, state=state)


def how_to_recover(checkpoint: Path) -> str:
    """Say what helps where a checkpoint is damaged."""
    return f"remove {checkpoint}, to go on from the checkpoint before it or from the start"


def resume_points(config: RunConfig, states: dict[str, str]) -> dict[str, ResumePoint]:
    """Return the jobs that are not over, each with where it goes on. `states`: of the jobs that the run has had."""
    left = [job.name for job in config.jobs if states.get(job.name) not in ENDED_STATES]
    return {name: resume_point_of(Path(config.output_dir) / "jobs" / name) for name in left}
