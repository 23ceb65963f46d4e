"""Resuming a run that has ended: which of its config may change, which jobs remain, and where each resumes.

A job that is done stays as it is, and so does one that has failed because its loss or gradients
were not finite. Any other job resumes from its newest checkpoint, or from its start if it has none.
The steps and evaluations after that are made anew, so they are removed from its metrics, and weights
that were the best by a later evaluation from its directory. Layout, budget and
recomputation may differ from those before, and jobs may be added. Every key that decides a job's
updates must be as it was. Jobs that were added while the run trained are kept: the config that is
compared has them already (run_directory.with_changes).

Nothing here reads a tensor; checkpoint.py does.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lora.config.consistent_job import same_targets
from megatron_lora.config.objective_keys import Preference
from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig, RunConfig, load_config
from megatron_lora.config.sweep_keys import Point, SweepConfig
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import check_yaml, pack, write_atomically
from megatron_lora.output.changes import SETTABLE, job_mapping
from megatron_lora.output.job_states import OVER
from megatron_lora.output.metrics import METRICS_FILE, in_order, is_logged_by
from megatron_lora.output.standing import Choose, Damaged, ResumePoint, newest, resume_points, steps_of

RUN_KEYS_THAT_MAY_CHANGE = (
    *("output_dir", "parallel", "microbatch_tokens", "recompute", "activation_offloading", "backend", "jobs"),
    *("adapter_memory", "max_wait_s", "window_s", "on_save"),
)
JOB_KEYS_THAT_MAY_CHANGE = ("datasets", "val_datasets", "bad_rows", "export", "export_dtype", *SETTABLE)  # records: by their digest


def changed_key(before: RunConfig, now: RunConfig) -> str | None:
    """Say in one line which key keeps a config from resuming a run that began with another; None if it can resume it."""
    for name, (old, new) in _differences(before, with_precision_of(before, now), RUN_KEYS_THAT_MAY_CHANGE).items():
        return f"{name}: {show(new)} differs from {show(old)}"
    jobs = {job.name: job for job in now.jobs}
    for old_job in before.jobs:
        if old_job.name not in jobs:
            return f"jobs: {old_job.name!r}, which the run has, is not among them"
        for name, (old, new) in _differences(old_job, jobs[old_job.name], JOB_KEYS_THAT_MAY_CHANGE).items():
            if name in ("target_modules", "linears") and same_targets(old_job, jobs[old_job.name]):
                continue
            if isinstance(old, Point) and isinstance(new, Point) and old.sweep != new.sweep:
                return _changed_sweep(old.sweep, new.sweep)
            if isinstance(old, Preference) and type(old) is type(new):
                key, (old, new) = next(iter(_differences(old, new, ()).items()))
                name = f"{name}.{key}"
            elif name == "objective":
                old, new = (getattr(each, "type", each) for each in (old, new))
            return f"jobs.{old_job.name}.{name}: {show(new)} differs from {show(old)}"
    return None


def _changed_sweep(before: SweepConfig, now: SweepConfig) -> str:
    """Say which key of a sweep differs."""
    old, new = ({f"over.{name}": axis for name, axis in each.over.items()} | dataclasses.asdict(each) for each in (before, now))
    name = next(name for name in old | new if old.get(name) != new.get(name))
    return f"sweep.{name}: {show(new.get(name))} differs from {show(old.get(name))}"


def as_begun(before: RunConfig, now: RunConfig) -> RunConfig:
    """Return a config with what a run began with where it is open: precision and targets, and under `deterministic` what decides its plan.

    Those are microbatch_tokens, adapter_memory and, in the same pipeline, layers_per_stage, which depend on the memory that is free.
    """
    now = with_targets_of(before, with_precision_of(before, now))
    if not now.deterministic:
        return now
    if now.microbatch_tokens == "auto":
        now = dataclasses.replace(now, microbatch_tokens=before.microbatch_tokens)
    if now.adapter_memory == "auto":
        now = dataclasses.replace(now, adapter_memory=before.adapter_memory)
    if now.parallel.layers_per_stage is None and now.parallel.pipeline == before.parallel.pipeline:
        layers = before.parallel.layers_per_stage
        now = dataclasses.replace(now, parallel=dataclasses.replace(now.parallel, layers_per_stage=layers))
    return now


def with_targets_of(before: RunConfig, now: RunConfig) -> RunConfig:
    """Return a config whose jobs target the modules that they began with in a run; `changed_key` has found them the same."""
    began = {job.name: {"target_modules": job.target_modules, "linears": job.linears} for job in before.jobs if job.target_modules}
    jobs = tuple(dataclasses.replace(job, **began.get(job.name, {})) for job in now.jobs)
    return dataclasses.replace(now, jobs=jobs)


def with_precision_of(before: RunConfig, now: RunConfig) -> RunConfig:
    """Return a config in which `precision: auto` is the precision that the run began with."""
    return dataclasses.replace(now, precision=before.precision) if now.precision == "auto" else now


def _differences(before: Any, now: Any, may_change: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configs differ, with both values, except those that may change."""
    names = [field.name for field in dataclasses.fields(before) if field.name not in may_change]
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def deciding_keys(job: JobConfig) -> dict[str, Any]:
    """Return what a job is: its name and the keys that may not change, as plain data."""
    return {key: value for key, value in job_mapping(job).items() if key not in JOB_KEYS_THAT_MAY_CHANGE}


def recorded_config(path: Path) -> RunConfig:
    """Read the config that a run wrote into its directory; UserError where it cannot be read, or is another now."""
    config = load_config(path / "config.yaml")
    try:
        check_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'config.yaml'}: {error}") from None
    return config


def check_resume(
    path: Path, states: dict[str, str], config: RunConfig, choose: Choose = newest, keep_alive: bool = False
) -> dict[str, ResumePoint]:
    """Return the resume points of the remaining jobs of the run in `path`; UserError if `config` cannot resume it.

    `states`: the state of each of the run's jobs, which are not all over unless the run is to wait for others.
    """
    where = f"output_dir: {str(path)!r}"
    if not keep_alive and all(states.get(job.name) in OVER for job in config.jobs):
        counts = ", ".join(f"{list(states.values()).count(state)} {state}" for state in OVER if state in states.values())
        raise UserError(f"{where} holds a finished run (jobs: {counts}); choose another directory, or remove this one")
    try:
        before = recorded_config(path)
    except UserError as error:
        raise UserError(
            f"{where} holds a run whose config.yaml cannot be read ({error}); restore it, or choose another directory"
        ) from None
    if unknown := [job.name for job in before.jobs if job.name not in states]:
        raise UserError(f"{where} holds a run whose status.json lacks the job {unknown[0]!r}; restore it, or choose another directory")
    changed = changed_key(before, config)
    if changed:
        raise UserError(f"{changed} in {str(path / 'config.yaml')!r}, the run to resume; set it back, or choose another output_dir")
    remaining = resume_points(config, states, choose)
    for name, point in remaining.items():
        logged_lines(path / "jobs" / name, point)
    return remaining


def logged_lines(job_dir: Path, point: ResumePoint) -> bytes:
    """Return the lines of a job's metrics up to its resume point; Damaged where they are not those of its steps, or have changed."""
    kept, step, file, reason = [], 0, job_dir / METRICS_FILE, ""
    if point.checkpoint is None or point.state is None:
        return b""
    try:
        for line, text in in_order(file.read_bytes().split(b"\n")[:-1]):
            if not is_logged_by(line, point.step, point.evaluation_due):
                break
            step = line["step"]
            kept.append(text + b"\n")
    except (OSError, ValueError) as error:
        reason = f" ({one_line(error, 100)})"  # what stands behind the resume point is not read back
    content = b"".join(kept)
    if step < point.step:
        raise Damaged(point.checkpoint, f"{file}: has the lines of {step} steps, of {point.step}{reason}")
    if point.state.metrics and hashlib.sha256(content).hexdigest() != point.state.metrics:
        raise Damaged(point.checkpoint, f"{file}: differs from what was logged by step {point.step}")
    return content


def rewind(path: Path, points: dict[str, ResumePoint]) -> None:
    """Take a run's files back to where its jobs resume: metrics, best weights; move plan and timeline to `plan/start-N`."""
    logged = {path / "jobs" / name / METRICS_FILE: logged_lines(path / "jobs" / name, point) for name, point in points.items()}
    for metrics, lines in logged.items():
        if metrics.exists():
            write_atomically(metrics, lines.decode())
    for name, point in points.items():
        for step, checkpoint in steps_of(path / "jobs" / name, "checkpoint").items():
            if step > point.step:  # it is damaged, and the user chose an older one
                checkpoint.rename(_unused(checkpoint.with_name(f"damaged-{checkpoint.name}")))
        for step, best in steps_of(path / "jobs" / name, "best").items():
            if step >= point.step + (not point.evaluation_due):
                shutil.rmtree(best)
    plan = path / "plan"
    outdated, start, timeline = [*plan.glob("window*.json*")], _unused(plan / "start"), path / "timeline.json"
    if outdated or timeline.exists():
        start.mkdir(parents=True)
    for file in outdated:
        shutil.move(file, start / file.name)
    if timeline.exists():
        pack([timeline], start / "timeline.json.gz")


def _unused(path: Path) -> Path:
    """Return the first of `<path>-1`, `<path>-2`, ... that does not exist."""
    number = 1
    while (found := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found
