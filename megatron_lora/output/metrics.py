"""What a run reports: a StepReport per optimizer step of each job, handed to observers, never computed for them.

An observer is told what happens and changes nothing. The one that is always there writes `jobs/<name>/metrics.jsonl`, an object per
step, flushed line by line; a number that is not finite is null. Others show progress (display.py) and feed trackers (trackers.py);
observers.py starts those that a run has.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_lora.errors import UserError

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step of one job. `loss` and `grad_norm` are from before the update and before clipping; nan is allowed."""

    job: str
    step: int  # from 1
    total_steps: int
    epoch: float  # share of epochs consumed, this step included
    loss: float
    learning_rate: float  # as used in this step
    grad_norm: float
    tokens: int
    target_tokens: int
    samples: int
    seconds: float  # from the step's first forward to its update
    skipped: bool

    def row(self) -> dict[str, object]:
        """Give the step as its line in metrics.jsonl."""
        fields = dataclasses.asdict(self)
        del fields["job"], fields["total_steps"]
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class JobSummary:
    """What observers know of a job beforehand."""

    name: str
    total_steps: int
    first_step: int = 0  # steps taken before this start


class Observer:
    """Is told what happens in a run; each method does nothing unless a subclass says otherwise."""

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        """Learn of the run's jobs, before anything else."""

    def on_step(self, report: StepReport) -> None:
        """Learn of a step; a job's steps come in order."""

    def on_status(self, job: str, state: str, reason: str) -> None:
        """Learn of a job's new state: queued, running, paused, done or failed."""

    def close(self) -> None:
        """Finish what was begun."""


class JsonlMetrics(Observer):
    """Appends every step to its job's metrics.jsonl."""

    def __init__(self, output_dir: str | Path):
        self._output_dir = Path(output_dir)
        self._files: dict[str, IO[str]] = {}

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        for job in jobs:
            path = metrics_file(self._output_dir, job.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_half_line(path)
            self._files[job.name] = path.open("a", encoding="utf-8")

    def on_step(self, report: StepReport) -> None:
        file = self._files[report.job]
        file.write(json.dumps(report.row(), allow_nan=False) + "\n")
        file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def metrics_file(output_dir: str | Path, job: str) -> Path:
    """Name a job's metrics file."""
    return Path(output_dir) / "jobs" / job / METRICS_FILE


def read_metrics(path: str | Path) -> list[dict[str, object]]:
    """Read a metrics file back; a last line that was cut off is left out, any other broken line is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: does not exist; give the metrics.jsonl of a job that has run")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not valid JSON ({error}); restore the file") from None
    return rows


def _drop_half_line(path: Path) -> None:
    """Cut off what a killed run left of its last line, so that the next line is one of its own."""
    if path.is_file():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            os.truncate(path, whole.rfind(b"\n") + 1)
