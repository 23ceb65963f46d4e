"""What requests and events do to a run: pure functions, by which the first rank, a resumed run and the commands decide alike.

    changes = decide(request, run)              # UserError in one line where the request cannot be applied; all of it, or nothing
    run = then(run, changes)

`apply` derives a run from its events, so it may be called again with the same ones: nothing happens
twice. States that need files on disk (done, stopped by patience) are taken from status.json and never from
events. At a start jobs that are not over are queued again, except those that a request, or their
watchdog, has paused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_lora.config.rules import show, suggest
from megatron_lora.config.schema import JobConfig, RunConfig, load_jobs
from megatron_lora.errors import UserError, one_line
from megatron_lora.output.events import Change
from megatron_lora.output.job_states import OVER
from megatron_lora.output.requests import Request

SETTABLE = (  # keys of a job that decide none of its updates
    *("priority", "save_steps", "save_total_limit", "early_stopping_patience"),
    *("loss_watchdog_threshold", "loss_watchdog_patience", "eval_watchdog_patience"),
)
ON_REQUEST = "on request"
CHANGE_OF = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}  # by verb
STATE_OF = {"paused": "paused", "resumed": "queued", "cancelled": "cancelled", "failed": "failed"}  # by event


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as its events leave it: its config, with added jobs and set values; the state of each job, and the reasons of some."""

    config: RunConfig
    states: dict[str, str]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def with_jobs(self, change: Callable[[JobConfig], JobConfig]) -> Run:
        """Return the run with `change` made to each of its jobs."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, jobs=tuple(map(change, self.config.jobs))))


def states_to_start_from(states: Mapping[str, str]) -> dict[str, str]:
    """Return the states to which all events of a run are applied, from those of status.json: queued, unless a job is over."""
    return {name: state if state in OVER else "queued" for name, state in states.items()}


def apply(changes: Sequence[Change], states: Mapping[str, str], config: RunConfig) -> Run:
    """Derive a run from its changes, in their order. A job that the config lacks, and that was not added, is left out."""
    jobs = {job.name: job for job in config.jobs}
    names = {name.lower() for name in jobs}
    found, reasons = dict(states), {}
    for change in changes:
        name, details = change.job, change.details
        if change.event == "added":
            if name.lower() not in names:
                jobs[name] = job_from(details["config"], config.seed)
                names.add(name.lower())
            found.setdefault(name, "queued")
        elif change.event == "set" and name in jobs:
            jobs[name] = with_values(jobs[name], {details["key"]: details["value"]}, config.seed)
        elif (state := _state_after(change)) is not None and name in jobs:
            if found.get(name) not in OVER:
                found[name] = state
            if found[name] == state:
                reasons[name] = details.get("reason", "") if found[name] != "queued" else ""
    return Run(config=dataclasses.replace(config, jobs=tuple(jobs.values())), states=found, reasons=reasons)


def _state_after(change: Change) -> str | None:
    """Return the state of a job that a change decides; of a point that its sweep stops, the files are there before."""
    return "stopped" if change.event == "stopped" and "rung" in change.details else STATE_OF.get(change.event)


def then(run: Run, changes: Sequence[Change]) -> Run:
    """Return a run after more changes."""
    after = apply(changes, run.states, run.config)
    return dataclasses.replace(after, reasons={**run.reasons, **after.reasons})


def decide(request: Request, run: Run) -> list[Change]:
    """Return what a request changes; UserError where any part of it cannot be applied."""
    if request.verb == "add":
        return _additions(request.jobs, run)
    for name in request.names:
        _check_job(name, request.verb, run)
    names = tuple(dict.fromkeys(request.names))
    if request.verb != "set":
        return [Change(event=CHANGE_OF[request.verb], job=name, details={"reason": ON_REQUEST}) for name in names]
    jobs = {job.name: job for job in run.config.jobs}
    for name in names:
        jobs[name] = with_values(jobs[name], request.values, run.config.seed)
    return [
        Change(event="set", job=name, details={"key": key, "value": getattr(jobs[name], key)}) for name in names for key in request.values
    ]


def foresee(requests: Sequence[Request], run: Run) -> Run:
    """Return the run as requests that still wait will leave it; those that will be refused change nothing."""
    for request in requests:
        try:
            run = then(run, decide(request, run))
        except UserError:
            continue
    return run


def job_from(mapping: Mapping[str, Any], seed: int) -> JobConfig:
    """Make a job of a complete mapping, every key checked; `seed` is the run's."""
    return load_jobs(None, [dict(mapping)], seed)[0]


def job_mapping(job: JobConfig) -> dict[str, Any]:
    """Return a job as plain data, as in a config, every key given."""
    return json.loads(json.dumps(dataclasses.asdict(job)))  # with lists in place of tuples


def with_values(job: JobConfig, values: Mapping[str, Any], seed: int) -> JobConfig:
    """Return a job with other values of SETTABLE keys; UserError for another key, or a value that is not accepted."""
    for key, value in values.items():
        if key not in SETTABLE:
            raise UserError(
                f"{one_line(key, 60)}={one_line(show(value), 60)}: cannot be set while a job trains{suggest(key, SETTABLE)}, because its "
                f"result must not depend on when; set takes {', '.join(SETTABLE)}"
            )
    return job_from(job_mapping(job) | dict(values), seed)


def _check_job(name: str, verb: str, run: Run) -> None:
    """Raise UserError unless the run has a job of this name, in a state in which `verb` changes something."""
    known = [job.name for job in run.config.jobs]
    if name not in known:
        any_case = {other.lower(): other for other in known}
        meant = [f" (did you mean {any_case[close]}?)" for close in difflib.get_close_matches(name.lower(), any_case, n=1)]
        raise UserError(
            f"{one_line(show(name), 80)}: is no job of this run{''.join(meant)}; its jobs are {one_line(', '.join(known), 300)}"
        )
    state = run.states.get(name, "queued")
    if state in OVER:
        raise UserError(f"{name}: is {state}, so that nothing changes it any more; {verb} a job that is not over")
    if verb == "pause" and state == "paused":
        raise UserError(f"{name}: is paused already; resume or cancel it")
    if verb == "resume" and state != "paused":
        raise UserError(f"{name}: is {state}, not paused; only a job that is paused can be resumed")


def _additions(mappings: Sequence[Mapping[str, Any]], run: Run) -> list[Change]:
    """Return the changes that add jobs; UserError where a name is taken, or a mapping is no job."""
    names = {job.name.lower() for job in run.config.jobs}
    jobs = load_jobs(None, [dict(mapping) for mapping in mappings], run.config.seed)
    for job in jobs:
        if job.name.lower() in names:
            raise UserError(
                f"jobs.{job.name}.name: the run has a job of this name (upper and lower case count as the same); choose another"
            )
    return [Change(event="added", job=job.name, details={"config": job_mapping(job)}) for job in jobs]
