"""The jobs that `megatron-lora add` reads from a YAML file, checked as in a config.

The file holds one job's mapping, or `jobs:` with `defaults:` and `sweep:`.

jobs = load_added_jobs("job.yaml", ["r=32"], config)      # config: the run's; its seed is that of jobs without one
"""

import dataclasses
import os
from collections.abc import Sequence

from megatron_lora.config.dataset_paths import is_hub_id
from megatron_lora.config.overrides import apply_override
from megatron_lora.config.rules import key_name, show
from megatron_lora.config.schema import DatasetConfig, JobConfig, RunConfig, load_jobs
from megatron_lora.config.sweep_keys import sweep, with_points
from megatron_lora.config.yaml_file import read_yaml
from megatron_lora.errors import UserError


def load_added_jobs(path: str, overrides: Sequence[str], config: RunConfig) -> tuple[JobConfig, ...]:
    """Read jobs to add to a run; paths of their data and adapters become absolute. UserError is one line."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {show(tree)}; write one job's mapping, or jobs: with defaults:")
    for override in overrides:
        apply_override(tree, override)
    if not tree.keys() & {"jobs", "defaults", "sweep"}:
        tree = {"jobs": [tree]}
    if others := sorted(tree.keys() - {"jobs", "defaults", "sweep"}):
        raise UserError(f"{path}: {key_name(others[0])}: belongs to the run, whose config stays; beside jobs give defaults and sweep alone")
    swept, jobs = sweep("sweep", tree.get("sweep")), tree.get("jobs")
    return tuple(map(_from_anywhere, load_jobs(tree.get("defaults"), with_points(swept, jobs) if swept else jobs, config.seed)))


def _from_anywhere(job: JobConfig) -> JobConfig:
    """Return a job whose paths do not depend on the directory of the command, since the run has one of its own."""
    paths = {
        "datasets": tuple(map(_absolute, job.datasets)),
        "val_datasets": job.val_datasets and tuple(map(_absolute, job.val_datasets)),
        "init_adapter": job.init_adapter and os.path.abspath(job.init_adapter),
    }
    if job.chat_template is not None and os.path.isfile(job.chat_template):  # otherwise the name of one of ours
        paths["chat_template"] = os.path.abspath(job.chat_template)
    return dataclasses.replace(job, **paths)


def _absolute(dataset: DatasetConfig) -> DatasetConfig:
    return dataset if is_hub_id(dataset.path) else dataclasses.replace(dataset, path=os.path.abspath(dataset.path))
