"""`megatron-lora jobs RUN`: a line for each job of a run, live or after the fact, as a table or as JSON. Reads its directory alone.

Shares are of the predicted device time so far. The time left is that of the steps left, each as long as the job's last ones.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lora.commands.output_streams import keep_running_unread
from megatron_lora.output.display import RECENT_STEPS, STYLES, duration
from megatron_lora.output.job_view import JobView
from megatron_lora.output.requests import RequestFolder
from megatron_lora.output.run_view import RunView

COLUMNS = ("job", "state", "step", "loss", "eval loss", "share", "device s", "place", "ETA", "reason")
PRINTED_WIDTH = 200  # of a table that is not on a terminal
TAIL_BYTES = 16384  # of a metrics file: more than its last RECENT_STEPS lines


def main(run_path: str, as_json: bool) -> int:
    """Print the jobs of a run; returns 0."""
    view = RunView.read(Path(run_path))
    is_live, jobs = view.is_live(), rows(view)
    requests, bad, _ = RequestFolder(view.path).look(())
    if as_json:
        said = {"live": is_live, "exit_status": view.exit_status, "requests": len(requests) + len(bad), "jobs": jobs}
        print(json.dumps(said | {"unreadable": view.unreadable}, indent=1))
        return 0
    keep_running_unread()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    console.print(table(jobs))
    counts = Counter(row["state"] for row in jobs)
    footer = [", ".join(f"{count} {state}" for state, count in counts.items()), "live" if is_live else "no process runs it"]
    waiting = len(requests) + len(bad)
    footer += [f"{waiting} request{' waits' if waiting == 1 else 's wait'}"] if waiting else []
    footer += [f"{file} cannot be read: {why}" for file, why in view.unreadable.items()]
    console.print(Text("; ".join(footer)))
    return 0


def rows(view: RunView) -> list[dict[str, Any]]:
    """Return what is known of each job, in the order of the run's jobs; None where nothing is."""
    queue = {entry["job"]: entry for entry in view.queue}
    shares, is_live = view.shares(), view.is_live()
    return [_row(view, job, queue.get(name, {}), shares.get(name), is_live) for name, job in view.jobs.items()]


def _row(view: RunView, job: JobView, queued: dict[str, Any], share: float | None, is_live: bool) -> dict[str, Any]:
    evaluations = job.evaluated()
    steps, seconds = job.num_steps, _seconds_of_a_step(job.metrics)
    trains = is_live and job.state == "running"
    return {
        "job": job.name,
        "state": job.state,
        "step": job.step,
        "steps": steps,
        "loss": job.loss,
        "eval_loss": evaluations[-1][1] if evaluations else None,
        "share": share,
        "device_seconds": view.accounting.get(job.name, {}).get("device_seconds"),
        "place": queued.get("place") if job.state == "queued" else None,
        "eta_s": seconds * max(0, steps - job.step) if trains and seconds and steps else None,
        "reason": job.reason or (queued.get("reason", "") if job.state == "queued" else ""),
    }


def _seconds_of_a_step(metrics: Path) -> float | None:
    """Return the mean time of a job's last steps; None where it has taken none."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")[-1 - RECENT_STEPS : -1]
        found = [line["seconds"] for line in map(json.loads, lines) if "loss" in line]
        return fmean(found) if found else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a run's view names a file that cannot be read
        return None


def table(jobs: list[dict[str, Any]]) -> Table:
    """Lay out the jobs."""
    laid_out = Table(title=None, expand=False)
    for heading in COLUMNS:
        is_text = heading in ("job", "state", "reason")
        laid_out.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in jobs:
        steps = "?" if row["steps"] is None else row["steps"]
        cells = [
            f"{row['step']}/{steps}",
            *("" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "eval_loss")),
            "" if not row["share"] else f"{row['share']:.0%}",
            "" if row["device_seconds"] is None else f"{row['device_seconds']:,.1f}",
            "" if row["place"] is None else str(row["place"]),
            "" if row["eta_s"] is None else duration(row["eta_s"]),
        ]
        state = Text(row["state"], style=STYLES.get(row["state"], ""))
        laid_out.add_row(Text(row["job"]), state, *cells, Text(row["reason"]))
    return laid_out
