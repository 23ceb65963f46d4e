"""Taking up a run that has ended: what of its config may change, which jobs are left, and from which checkpoint each goes on.

A job that is done or has failed (its own loss or gradients were not finite) stays as it is. Any other goes on from its newest checkpoint,
or from its start where it has none; what its metrics say of later steps is taken away, since those steps are taken again. Layout, budget
and recomputation may differ from those before; jobs may be added. Whatever decides a job's updates must be as it was.

This is the part that needs no tensors; checkpoint.py has those.
"""

import dataclasses
import json
import operator
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig, RunConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.files import write_atomically
from megatron_lora.output.metrics import metrics_file, read_metrics
from megatron_lora.output.standing import ENDED_STATES, ResumePoint, resume_points

RUN_KEYS_THAT_MAY_CHANGE = ("output_dir", "parallel", "microbatch_tokens", "recompute", "backend", "jobs")  # keys of a run that may change
JOB_KEYS_THAT_MAY_CHANGE = ("datasets", "save_steps")  # rows are compared by their digest


def changed_key(before: RunConfig, now: RunConfig) -> str | None:
    """Say in one line which key keeps a config from taking up a run that began with another; None where none does."""
    for name, (old, new) in _differing(before, now, RUN_KEYS_THAT_MAY_CHANGE).items():
        return f"{name}: {show(new)} differs from {show(old)}"
    jobs = {job.name: job for job in now.jobs}
    for old_job in before.jobs:
        if old_job.name not in jobs:
            return f"jobs: {old_job.name!r}, which the run has, is not among them"
        for name, (old, new) in _differing(old_job, jobs[old_job.name], JOB_KEYS_THAT_MAY_CHANGE).items():
            return f"jobs.{old_job.name}.{name}: {show(new)} differs from {show(old)}"
    return None


def _differing(before: RunConfig | JobConfig, now: RunConfig | JobConfig, free: Sequence[str]) -> dict[str, tuple[object, object]]:
    """Return the keys in which two configs differ, those left out that are free to."""
    names = [field.name for field in dataclasses.fields(before) if field.name not in free]
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_resume(path: Path, states: dict[str, str], config: RunConfig) -> dict[str, ResumePoint]:
    """Return where each job goes on that is not over; UserError where a config cannot take up the run, whose jobs are in these states."""
    where = f"output_dir: {str(path)!r}"
    if all(states.get(job.name) in ENDED_STATES for job in config.jobs):
        counts = ", ".join(f"{list(states.values()).count(state)} {state}" for state in ENDED_STATES if state in states.values())
        raise UserError(f"{where} holds a finished run (jobs: {counts}); choose another directory, or remove this one")
    try:
        before = load_config(path / "config.yaml")
    except UserError as error:
        raise UserError(
            f"{where} holds a run whose config.yaml cannot be read ({error}); restore it, or choose another directory"
        ) from None
    if unknown := [job.name for job in before.jobs if job.name not in states]:
        raise UserError(f"{where} holds a run whose status.json lacks the job {unknown[0]!r}; restore it, or choose another directory")
    changed = changed_key(before, config)
    if changed:
        raise UserError(f"{changed} in {str(path / 'config.yaml')!r}, whose run would go on; set it back, or choose another output_dir")
    left = resume_points(config, states)
    for name, standing in left.items():
        logged_steps(metrics_file(path, name), standing.step)
    return left


def logged_steps(metrics: Path, step: int) -> list[dict]:
    """Return what a job's metrics say of its first so many steps; UserError where the file is not one of ours."""
    try:
        rows = read_metrics(metrics) if metrics.exists() else []
        return [row for row in rows if operator.index(row["step"]) <= step]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{metrics}: has a line that is no step of the job; restore the file, or remove it") from None


def rewind(path: Path, resume_points: dict[str, ResumePoint]) -> None:
    """Take a run's files back to where its jobs go on: their metrics, and plan and timeline of the last start, which are kept aside."""
    told = {metrics_file(path, name): logged_steps(metrics_file(path, name), standing.step) for name, standing in resume_points.items()}
    for metrics, rows in told.items():
        if metrics.exists():
            write_atomically(metrics, "".join(json.dumps(row) + "\n" for row in rows))
    plan, number = path / "plan", 1
    while (plan / f"start-{number}").exists():
        number += 1
    kept = [*plan.glob("window-*.json"), *path.glob("timeline.json")]
    if kept:
        (plan / f"start-{number}").mkdir(parents=True)
    for file in kept:
        shutil.move(file, plan / f"start-{number}" / file.name)
