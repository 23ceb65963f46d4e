"""Whole runs inside tests: write a config, train it on a pool of ranks, read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path


def write_config(path: Path, model: Path, output_dir: Path, jobs: list[dict], parallel: dict, microbatch_tokens: int) -> Path:
    """Write a config file; JSON is YAML."""
    keys = {"pp": "pipeline", "tp": "tensor", "dp": "data", "ep": "expert", "sequence": "sequence"}
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


def train(config_path: Path, stop_after: int | None = None, replay: str | None = None) -> None:
    """Run a config on this rank; top level, so that pool ranks can import it.

    The last rank is asked to stop once it has checked `stop_after` times whether it is. `replay`: the run whose events are repeated.
    """
    import torch.distributed as dist

    from megatron_lora.config.live import Live
    from megatron_lora.config.schema import load_config
    from megatron_lora.training.stop_request import StopRequest
    from megatron_lora.training.train import run

    class StopAfter(StopRequest):
        checks = 0

        @property
        def requested(self) -> bool:
            self.checks += 1
            return stop_after is not None and dist.get_rank() == dist.get_world_size() - 1 and self.checks > stop_after

        @requested.setter
        def requested(self, value: bool) -> None:
            assert not value

    run(load_config(config_path), StopAfter(), Live(replay=None if replay is None else Path(replay)))


def start(pool, config_path: Path, parallel: dict, stop_after: int | None = None, from_older: bool = False) -> int:
    """Run a config on pool ranks as the launcher would: check, make the directory, record the end. Returns the run's exit status."""
    from megatron_lora.commands.checks import check_run, choice
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.run_directory import RunDirectory

    inputs = check_run(load_config(config_path), from_older=from_older)
    with RunDirectory.create(
        load_config(config_path), failed=inputs.failed, choose=choice(from_older), rests_on=inputs.rests_on
    ) as directory:
        pool(**parallel).run(train, config_path, stop_after)
        return directory.finish()


def losses_of(output_dir: Path, name: str) -> list[float]:
    """Return the logged loss of every step of a job."""
    return [line["loss"] for line in lines_of(output_dir, name) if "loss" in line]


def lines_of(output_dir: Path, name: str) -> list[dict]:
    """Return the lines of a job's metrics."""
    return [json.loads(line) for line in (output_dir / "jobs" / name / "metrics.jsonl").read_text().splitlines()]
