"""leaderboard.json: the points of a run's sweeps, the best first; and `best`, a link to the PEFT directory of the best that is over.

    {"tune": {"metric": "eval_loss", "mode": "min", "strategy": "asha", "over": ["r"], "points": [
        {"job": "tune-003", "values": {"r": 8}, "state": "done", "value": 1.25, "step": 27, "rung": 2}, ...]}}

A point's value is that of the weights which it keeps: of its best evaluation, or of its last under `keep: last`; None before
there is a finite one. `step` is that of the evaluation, `rung` the number of rungs that it has passed. Among equals the first
point comes first. With several sweeps, `best` is of the first; of the others the leaderboard names the job.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import JobConfig
from megatron_lora.config.sweep_keys import badness, by_sweep
from megatron_lora.errors import UserError
from megatron_lora.files import sealed, unsealed, write_atomically

LEADERBOARD, BEST = "leaderboard.json", "best"
MOST_CELLS = 8  # of a heat map, along a key
Evaluated = Sequence[tuple[int, float]]  # (step, value)


def leaderboard(
    jobs: Sequence[JobConfig], states: Mapping[str, str], evaluated: Mapping[str, Evaluated], rungs: Mapping[str, int]
) -> dict[str, Any]:
    """Return the leaderboards of all sweeps among jobs, by their names."""
    found = {}
    for name, points in by_sweep(jobs).items():
        first = points[0]
        rows = []
        for job in points:
            step, value = kept(job, evaluated.get(job.name, ())) or (None, None)
            row = {"job": job.name, "values": job.point.values, "state": states.get(job.name, "queued")}
            rows.append(row | {"value": value, "step": step, "rung": rungs.get(job.name, 0)})
        rows.sort(key=lambda row: badness(row["value"], first.mode))
        of = {"metric": first.metric, "mode": first.mode, "strategy": first.point.sweep.strategy, "over": list(first.point.sweep.over)}
        found[name] = of | {"points": rows}
    return found


def kept(job: JobConfig, evaluated: Evaluated) -> tuple[int, float] | None:
    """Return (step, value) of the weights that a job keeps; None where no evaluation has a finite value."""
    finite = [(step, value) for step, value in evaluated if math.isfinite(value)]
    if not finite:
        return None
    return min(finite, key=lambda each: badness(each[1], job.mode)) if job.keep == "best" else finite[-1]


def write_leaderboard(output_dir: Path, boards: Mapping[str, Any]) -> None:
    """Replace the file, and the link to the best adapter where there is one."""
    write_atomically(output_dir / LEADERBOARD, sealed(json.dumps(boards, indent=1)))
    rows = next(iter(boards.values()))["points"]
    best = next((row["job"] for row in rows if row["state"] in ("done", "stopped") and row["value"] is not None), None)
    link, target = output_dir / BEST, Path("jobs") / (best or "")
    if best is None or (link.is_symlink() and Path(os.readlink(link)) == target):
        return
    aside = output_dir / f".{BEST}.{secrets.token_hex(4)}"
    aside.symlink_to(target)
    aside.replace(link)


def read_leaderboard(output_dir: Path) -> dict[str, Any]:
    """Return what the file says; UserError where there is none, or it has changed."""
    path = output_dir / LEADERBOARD
    try:
        boards = unsealed(path.read_text(encoding="utf-8"))
        if not all({"metric", "mode", "points"} <= board.keys() for board in boards.values()):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{output_dir}: has no {LEADERBOARD}; name the output_dir of a run with a sweep that has begun") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: is not the leaderboard of a run; restore it, or resume the run, which writes it anew") from None
    return boards


def written(value: Any) -> str:
    """Write a value of a sweep's key."""
    return f"{value:.4g}" if isinstance(value, float) else str(value) if isinstance(value, int | str) else json.dumps(value)


def heading(board: Mapping[str, Any]) -> str:
    """Say what is compared, and how."""
    return f"{len(board['points'])} points, {board['strategy']}, {board['mode']} {board['metric']}"


def columns(board: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the headings of a leaderboard as a table."""
    return ("place", "job", *board["over"], board["metric"], "step", "rungs", "state")


def cells(board: Mapping[str, Any], place: int, row: Mapping[str, Any]) -> list[str]:
    """Return a point's line of that table; `place` is 1 for the best."""
    value = "" if row["value"] is None else f"{row['value']:.4f}"
    values = [written(row["values"].get(key)) for key in board["over"]]
    return [str(place), row["job"], *values, value, str(row["step"] or ""), str(row["rung"]), row["state"]]


def heat_map(board: Mapping[str, Any]) -> tuple[list[str], tuple[list[str], list[str]], list[list[float | None]]]:
    """Return the first two keys of a leaderboard, the labels of rows and columns, and the best value of each cell, None without one.

    Of a key with more than MOST_CELLS values, neighbours share a cell.
    """
    names, rows = board["over"][:2], board["points"]
    places, labels = [], []
    for name in names:
        found = [row["values"].get(name) for row in rows]
        numbers = all(isinstance(value, int | float) for value in found)
        order = sorted(set(found)) if numbers else list({written(value): value for value in found}.values())
        num = min(MOST_CELLS, len(order))
        of = {written(value): at * num // len(order) for at, value in enumerate(order)}
        parts = [[value for at, value in enumerate(order) if at * num // len(order) == cell] for cell in range(num)]
        places.append(of)
        labels.append([written(part[0]) + (f" to {written(part[-1])}" if len(part) > 1 else "") for part in parts])
    cells: list[list[float | None]] = [[None] * len(labels[1]) for _ in labels[0]]
    for row in rows:  # the best first
        line, column = (of[written(row["values"].get(name))] for of, name in zip(places, names, strict=True))
        if cells[line][column] is None:
            cells[line][column] = row["value"]
    return names, (labels[0], labels[1]), cells
