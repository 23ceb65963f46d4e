"""`megatron-lora sweep RUN`: the leaderboards of a run's sweeps, live or after the fact; also the curves and a heat map as a picture.

A curve is a point's metric at its evaluations, over the share of its steps; those of points that train to their end are drawn over the
others. The heat map has the best value for each pair of values of the sweep's first two keys.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lora.commands.output_streams import keep_running_unread
from megatron_lora.output.display import STYLES
from megatron_lora.output.leaderboard import cells, columns, heading, heat_map, read_leaderboard
from megatron_lora.output.run_view import RunView
from megatron_lora.planning.plan_picture import check_plot_path

PRINTED_WIDTH = 200


def main(run_path: str, as_json: bool, plot: str | None) -> int:
    """Print the leaderboards of a run, and draw them into the file `plot`; returns 0."""
    if plot is not None:
        check_plot_path(plot)
    boards = read_leaderboard(Path(run_path))
    if plot is not None:
        draw(plot, boards, RunView.read(Path(run_path)))
    if as_json:
        print(json.dumps(boards, indent=1))
        return 0
    keep_running_unread()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    for name, board in boards.items():
        console.print(table(name, board))
    return 0


def table(name: str, board: dict[str, Any]) -> Table:
    """Lay out a leaderboard, the best point first."""
    laid_out = Table(title=f"{name}: {heading(board)}", expand=False)
    for column in columns(board):
        laid_out.add_column(column, justify="left" if column in ("job", "state") else "right", no_wrap=True)
    for place, row in enumerate(board["points"], 1):
        *line, state = cells(board, place, row)
        laid_out.add_row(*line, Text(state, style=STYLES.get(state, "")))
    return laid_out


def draw(path: str, boards: dict[str, Any], view: RunView) -> None:
    """Draw each sweep's curves, and its heat map where it goes over two keys or more, into a new picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5 * len(boards)), layout="constrained")
    for row, (name, board) in zip(figure.subplots(len(boards), 2, squeeze=False), boards.items(), strict=True):
        curves, heat = row
        for place, point in reversed(list(enumerate(board["points"]))):
            job = view.jobs[point["job"]]
            found = [(step / (job.num_steps or step), value) for step, value in job.evaluated(board["metric"])]
            if found:
                style = {"color": "tab:red", "lw": 2, "zorder": 3} if place == 0 else {"color": "tab:blue"}
                style |= {} if point["state"] == "done" else {"alpha": 0.35}
                label = f"{point['job']}, the best" if place == 0 else None
                curves.plot(*zip(*found, strict=True), marker="o", markersize=3, label=label, **style)
        curves.set(title=name, xlabel="share of the point's steps", ylabel=board["metric"], xscale="log")
        curves.legend()
        if len(board["over"]) < 2:
            heat.set_axis_off()
            continue
        names, labels, best = heat_map(board)
        image = heat.imshow([[float("nan") if cell is None else cell for cell in line] for line in best], cmap="viridis_r", aspect="auto")
        heat.set_xticks(range(len(labels[1])), labels[1], rotation=30)
        heat.set_yticks(range(len(labels[0])), labels[0])
        heat.set(title=f"best {board['metric']}", xlabel=names[1], ylabel=names[0])
        figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=120)
