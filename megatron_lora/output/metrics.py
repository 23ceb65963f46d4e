"""What a run reports: a StepReport per optimizer step of each job and an EvalReport per evaluation, passed to observers.

An observer gets the reports and changes nothing; no number is computed only for it. One observer is
always there: it writes `jobs/<name>/metrics.jsonl`, one object per step or evaluation, flushed line by
line, in which a number that is not finite is null. Invariant: its steps are 1, 2, ... n, and an evaluation
after k steps, of which there is at most one, stands directly behind the line of step k. Others show progress (display.py) and feed trackers
(trackers.py); observers.py starts those that a run has.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_lora.errors import UserError, one_line
from megatron_lora.output.job_states import OVER
from megatron_lora.output.standing import Best

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
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what else the job's objective reports

    def logged(self) -> dict[str, Any]:
        """Return what metrics.jsonl says of the step; a number that is not finite becomes None."""
        fields = dataclasses.asdict(self)
        del fields["job"], fields["total_steps"], fields["reported"]
        return _finite(fields | dict(self.reported))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation of one job: the mean loss over the targets of its validation set, and the share of them that are predicted right."""

    job: str
    step: int  # steps taken; 0: before the first one
    eval_loss: float
    eval_accuracy: float
    eval_tokens: int  # targets
    eval_samples: int
    seconds: float  # from the evaluation's first forward to its sums
    best: Best | None = None  # of the job's evaluations, this one included
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what else a preference reports, which has no perplexity

    def value(self, metric: str) -> float:
        """Return the value of a metric by its name."""
        return self.reported[metric] if metric in self.reported else getattr(self, metric)

    @property
    def eval_perplexity(self) -> float:
        """Perplexity of a target: exp(eval_loss)."""
        return math.exp(self.eval_loss) if self.eval_loss < 700 else self.eval_loss * math.inf

    def logged(self) -> dict[str, Any]:
        """Return what metrics.jsonl says of the evaluation; a number that is not finite becomes None."""
        names = ("step", "eval_loss", "eval_perplexity", "eval_accuracy", "eval_tokens", "eval_samples", "seconds")
        found = {name: getattr(self, name) for name in names if name != "eval_perplexity" or not self.reported}
        return _finite(found | dict(self.reported))


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Put None in the place of numbers that are not finite."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class JobSummary:
    """What observers know of a job before its first step."""

    name: str
    total_steps: int
    first_step: int = 0  # steps that earlier starts of the run have taken
    best: Best | None = None  # of the evaluations in earlier starts


class Observer:
    """Gets the events of a run. Each method does nothing unless a subclass overrides it."""

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        """Get jobs that join the run, before any other event of theirs; a job that was paused joins again."""

    def on_step(self, report: StepReport) -> None:
        """Get the report of a step; a job's steps come in order."""

    def on_evaluation(self, report: EvalReport) -> None:
        """Get the report of an evaluation, behind that of the job's step `report.step`."""

    def on_status(self, job: str, state: str, reason: str) -> None:
        """Get a job's new state, one of job_states.py."""

    def close(self) -> None:
        """Close files and connections; no event follows."""


class JsonlMetrics(Observer):
    """Appends every step and evaluation to its job's metrics.jsonl."""

    def __init__(self, output_dir: str | Path):
        self._output_dir = Path(output_dir)
        self._files: dict[str, IO[str]] = {}

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        for job in (job for job in jobs if job.name not in self._files):
            path = metrics_file(self._output_dir, job.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_partial_line(path)
            self._files[job.name] = path.open("a", encoding="utf-8")

    def on_step(self, report: StepReport | EvalReport) -> None:
        file = self._files[report.job]
        file.write(json.dumps(report.logged(), allow_nan=False) + "\n")
        file.flush()

    on_evaluation = on_step

    def on_status(self, job: str, state: str, reason: str) -> None:
        if state in OVER and job in self._files:
            self._files.pop(job).close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def metrics_file(output_dir: str | Path, job: str) -> Path:
    """Name a job's metrics file."""
    return Path(output_dir) / "jobs" / job / METRICS_FILE


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the steps in a metrics file, as `read_lines` finds them."""
    return [line for line in read_lines(path) if not is_evaluation(line)]


def read_evaluations(path: str | Path) -> list[dict[str, Any]]:
    """Return the evaluations in a metrics file, as `read_lines` finds them."""
    return [line for line in read_lines(path) if is_evaluation(line)]


def describe_evaluations(path: Path, step: int, best: Best | None) -> str:
    """Return a sentence on a job's evaluations in its first `step` steps, the last one and the best; empty where none can be read."""
    try:
        evaluations = read_evaluations(path)
    except UserError:  # it was damaged since; an adapter is written all the same
        return ""
    losses = {line["step"]: line["eval_loss"] for line in evaluations if line["step"] <= step and line["eval_loss"] is not None}
    if not losses:
        return ""
    found = f"The eval_loss was {losses[max(losses)]:.4f} in the last evaluation, after {max(losses)} steps"
    return found + (f", and {losses[best.step]:.4f} in the best, after {best.step}." if best and best.step in losses else ".")


def is_evaluation(line: dict[str, Any]) -> bool:
    """Whether a line of a metrics file is an evaluation's."""
    return "eval_loss" in line


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without a last one that was cut off; UserError for any other broken line or order."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: does not exist; give the metrics.jsonl of a job that has run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the metrics.jsonl of a job that has run") from None
    lines: list[dict[str, Any]] = []
    try:
        for line, _ in in_order(content.split(b"\n")[:-1]):
            lines.append(line)
    except ValueError as error:
        where = f"{path}:{len(lines) + 1}"
        raise UserError(f"{where}: is no step or evaluation of the job ({one_line(error, 100)}); restore the file") from None
    return lines


def in_order(texts: Iterable[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield what each line of a metrics file says, and its text; ValueError for one that is broken, or not in its place."""
    step, evaluated = 0, False
    for text in texts:
        try:
            line = json.loads(text)
            following, is_evaluated = line["step"], is_evaluation(line)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if type(following) is not int or following != step + (not is_evaluated) or (is_evaluated and evaluated):
            what = "an evaluation at step" if is_evaluated else "step"
            raise ValueError(f"{what} {one_line(following, 20)} behind {'an evaluation at ' if evaluated else ''}step {step}")
        step, evaluated = following, is_evaluated
        yield line, text


def is_logged_by(line: dict[str, Any], step: int, evaluation_due: bool) -> bool:
    """Whether a line stands before what follows `step` steps; an evaluation there that is due is made anew."""
    return line["step"] < step or (line["step"] == step and not (is_evaluation(line) and evaluation_due))


class LoggedDigest:
    """The digest of a metrics file's lines up to a step, read on as steps are logged."""

    def __init__(self, path: Path):
        """Begin in front of the first line; the file may be missing."""
        self._path = path
        self._size = 0  # bytes of the lines so far
        self._hash = hashlib.sha256()

    def until(self, step: int, evaluation_due: bool) -> str:
        """Return the digest of the lines up to `step`, no earlier than the one before."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._size)
            for text in file:
                if not is_logged_by(json.loads(text), step, evaluation_due):
                    break
                self._hash.update(text)
                self._size += len(text)
        return self._hash.hexdigest()


def _drop_partial_line(path: Path) -> None:
    """Remove the last line if a killed run did not complete it, so that the next line begins on its own."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
