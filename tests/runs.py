"""Whole runs inside tests: write a config, train it on a pool of ranks, read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path


def write_config(path: Path, model: Path, output_dir: Path, jobs: list[dict], parallel: dict, microbatch_tokens: int) -> Path:
    """Write a config file; JSON is YAML."""
    keys = {"pp": "pipeline", "tp": "tensor", "dp": "data", "sequence": "sequence"}
    config = {
        "base_model": str(model),
        "output_dir": str(output_dir),
        "precision": "fp32",
        "parallel": {keys[key]: value for key, value in parallel.items()},
        "microbatch_tokens": microbatch_tokens,
        "jobs": jobs,
    }
    path.write_text(json.dumps(config))
    return path


def train(config_path: Path) -> int:
    """Run a config on this rank; top level, so that pool ranks can be told to call it."""
    from megatron_lora.config import load_config
    from megatron_lora.train import run

    return run(load_config(config_path))


def start(pool, config_path: Path, parallel: dict) -> int:
    """Run a config on pool ranks as the launcher would: the directory is made first. Returns the exit status that all ranks agree on."""
    from megatron_lora.config import load_config
    from megatron_lora.run_dir import RunDirectory

    with RunDirectory.create(load_config(config_path)):
        statuses = set(pool(**parallel).run(train, config_path))
    assert len(statuses) == 1, statuses
    return statuses.pop()


def losses_of(output_dir: Path, name: str) -> list[float]:
    """Return the logged loss of every step of a job."""
    rows = [json.loads(line) for line in (output_dir / "jobs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
