"""A live sweep of a tiny model: unbroken, and killed at random moments; what it decides, and what its points come to.

scene = make_scene(root)
whole = play(pool, scene, root / "whole", {"pp": 2})
check(whole, play(pool, scene, root / "killed", {"pp": 2}, rng=random.Random(0), num_kills=10))
check_survivors(pool, scene, whole)                     # each as the job that was never in a sweep
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import live_scripts
import oracle
import runs
from rank_pool import RankError
from safetensors.torch import load_file

STEPS = 9
OVER = {"learning_rate": [1e-4, 1e-3, 1e-2], "r": [4, 8, 24]}
SWEEP = {"job": "tune", "over": OVER, "strategy": "successive_halving"}


class Outcome(NamedTuple):
    """A sweep that was played: its directory, the decisions by (point, rung), and how many of its starts were killed."""

    run: Path
    decisions: dict[tuple[str, int], str]
    kills: int

    @property
    def survivors(self) -> list[str]:
        """The points that have trained to their end."""
        return sorted(row["job"] for row in self.leaderboard if row["state"] == "done")

    @property
    def leaderboard(self) -> list[dict[str, Any]]:
        """Its rows."""
        from megatron_lora.output.leaderboard import read_leaderboard

        return read_leaderboard(self.run)["tune"]["points"]


class Scene(NamedTuple):
    """A model, and the job that is varied."""

    root: Path
    model: Path
    job: dict[str, Any]


def make_scene(root: Path) -> Scene:
    """Make the model and the data."""
    rows = oracle.make_rows(root / "rows.jsonl", num_rows=24, seed=3)
    job = {"name": "tune", "datasets": [{"path": str(rows), "type": "prompt_completion"}], "val_set_size": 6, "keep": "last"}
    job |= {"lora_alpha": 16, "global_batch_size": 2, "max_steps": STEPS, "adam_epsilon": 1e-6, "warmup_ratio": 0.0, "save_steps": 2}
    return Scene(root, oracle.make_model(root / "model"), job)


def play(pool, scene: Scene, folder: Path, parallel: dict, rng: random.Random | None = None, num_kills: int = 0) -> Outcome:
    """Train the sweep; its first `num_kills` starts are killed at random moments."""
    from megatron_lora.config.schema import load_config
    from megatron_lora.output.events import read_events
    from megatron_lora.output.job_states import exit_status
    from megatron_lora.output.run_directory import RunDirectory, job_states

    folder.mkdir()
    config, run, kills, status = folder / "config.yaml", folder / "run", 0, 75
    runs.write_config(config, scene.model, run, [scene.job], parallel, 96)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sweep": SWEEP, "window_s": 1e-3}))
    for start in range(num_kills + 1):
        kill = live_scripts.random_kill(rng, parallel, folder / f"killed-{start}") if rng and start < num_kills else None
        with RunDirectory.create(load_config(config)) as directory:
            try:
                pool(**parallel).run(live_scripts.train, config, {}, None, kill, None, "inline")
            except RankError:
                if kill is None or not kill.marker.exists():
                    raise
                kills += 1
            status = exit_status(job_states(run).values())
            if kill is None or not kill.marker.exists():
                directory.finish(status)
        if status != 75:
            break
    assert status == 0, job_states(run)
    made = [((event.job, event.details["rung"]), event.event) for event in read_events(run) if "rung" in event.details]
    assert len(made) == len(dict(made)), "a decision was made twice"
    return Outcome(run, dict(made), kills)


def check(whole: Outcome, other: Outcome) -> None:
    """Compare decisions, survivors and leaderboard of two runs of the sweep."""
    assert other.decisions == whole.decisions
    assert [{**row, "value": 0} for row in other.leaderboard] == [{**row, "value": 0} for row in whole.leaderboard]
    for one, two in zip(whole.leaderboard, other.leaderboard, strict=True):
        assert abs(one["value"] - two["value"]) <= 1e-5 * abs(one["value"]), (one, two)


def check_stopped(outcome: Outcome) -> None:
    """Check that each point which was stopped has the adapter of its rung, whose digests are recorded, and no checkpoint."""
    from megatron_lora.output.final_files import check_run_files

    check_run_files(outcome.run)
    for row in outcome.leaderboard:
        folder = outcome.run / "jobs" / row["job"]
        assert (folder / "adapter_model.safetensors").is_file(), row
        assert row["state"] != "stopped" or not list(folder.glob("checkpoint-*")) or outcome.kills, row


def check_survivors(pool, scene: Scene, outcome: Outcome) -> None:
    """Compare each point that has trained to its end with the job that was never in a sweep."""
    for name in outcome.survivors:
        values = next(row["values"] for row in outcome.leaderboard if row["job"] == name)
        solo = scene.root / f"solo-{name}"
        if not solo.exists():
            job = scene.job | values | {"name": name, "eval_steps": 1}
            config = runs.write_config(scene.root / f"solo-{name}.yaml", scene.model, solo, [job], {}, 96)
            assert runs.start(pool, config, {}) == 0
        mine, alone = runs.lines_of(outcome.run, name), runs.lines_of(solo, name)
        for kind in ("loss", "eval_loss"):
            found, wanted = ({line["step"]: line[kind] for line in lines if kind in line} for lines in (mine, alone))
            assert len(found) == (STEPS if kind == "loss" else 3), (name, kind, found)
            assert all(abs(value - wanted[step]) <= 1e-5 * abs(wanted[step]) for step, value in found.items()), (name, kind)
        adapters = [load_file(run / "jobs" / name / "adapter_model.safetensors") for run in (outcome.run, solo)]
        assert all(oracle.distance(*adapters, kind) < 1e-4 for kind in ("lora_A", "lora_B")), name
