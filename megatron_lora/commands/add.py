"""`add`: more jobs for a run, checked exactly like those of a config before they are queued, their data and longest samples too."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from megatron_lora.commands.checks import read_inputs
from megatron_lora.commands.control import OpenRun, open_run, send
from megatron_lora.config.added_jobs import load_added_jobs
from megatron_lora.output.changes import decide, job_mapping
from megatron_lora.output.requests import new_request


def main(run_path: str, file: str, overrides: Sequence[str], wait: bool) -> int:
    """Ask a run to train more jobs, and print their names; returns 0."""
    opened = open_run(run_path)
    jobs = load_added_jobs(file, overrides, opened.run.config)
    decide(new_request("add", jobs=[job_mapping(job) for job in jobs]), opened.run)  # names that are taken, before any data are read
    config = opened.run.config
    jobs = read_inputs(dataclasses.replace(config, base_model=_base_model(opened), jobs=jobs)).jobs
    request = new_request("add", jobs=[job_mapping(job) for job in jobs])
    print(f"{', '.join(job.name for job in jobs)}: checked against {opened.path / 'config.yaml'}", flush=True)
    return send(opened, request, wait)


def _base_model(opened: OpenRun) -> str:
    """Return the run's base model: a relative path leads from the directory in which the run was started."""
    base_model = opened.run.config.base_model
    try:
        started_in = json.loads((opened.path / "env.json").read_text(encoding="utf-8"))["directory"]
    except (OSError, ValueError, KeyError, TypeError):  # of a run that does not say
        return base_model
    there = os.path.join(started_in, base_model)
    return there if os.path.isdir(there) else base_model
