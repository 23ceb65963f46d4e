"""The sweeps in report.html: a heat map over two keys, and the leaderboard; the curves of all points are in the page's overview."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from megatron_lora.output.leaderboard import cells, columns, heading, heat_map

MOST_ROWS = 50


def sweep_sections(boards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a section for each sweep."""
    return "".join(_section(name, board) for name, board in boards.items() if board["points"])


def _section(name: str, board: Mapping[str, Any]) -> str:
    points, names = board["points"], columns(board)
    left = [" class=l" if name in ("job", "state") else "" for name in names]
    shown = ["point" if name == "job" else name for name in names]
    head = "".join(f"<th{side}>{escape(name)}</th>" for side, name in zip(left, shown, strict=True))
    rows = []
    for place, row in enumerate(points[:MOST_ROWS], 1):
        tds = "".join(f"<td{side}>{escape(cell)}</td>" for side, cell in zip(left, cells(board, place, row), strict=True))
        rows.append(f"<tr>{tds}</tr>")
    more = f'<p class="muted small">and {len(points) - MOST_ROWS} more, in leaderboard.json</p>' if len(points) > MOST_ROWS else ""
    table = f'<div class="box scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>{more}</div>'
    heat = _heat(board) if len(board["over"]) > 1 else ""
    return f'<h2>Sweep {escape(name)}</h2><p class="muted small">{escape(heading(board))}</p>{heat}{table}'


def _heat(board: Mapping[str, Any]) -> str:
    """Draw the heat map as a table: the better a cell's best value, the darker it is."""
    names, (rows, labels), best_of = heat_map(board)
    values = [value for line in best_of for value in line if value is not None]
    if not values:
        return ""
    worst, best = (max(values), min(values)) if board["mode"] == "min" else (min(values), max(values))
    body = []
    for label, line in zip(rows, best_of, strict=True):
        tds = []
        for value in line:
            share = 0.0 if value is None or worst == best else (worst - value) / (worst - best)
            shade = f' style="background:color-mix(in srgb,var(--c0) {5 + 65 * share:.0f}%,transparent)"' if value is not None else ""
            tds.append(f"<td{shade}>{'' if value is None else f'{value:.4f}'}</td>")
        body.append(f'<tr><th class="l">{escape(label)}</th>{"".join(tds)}</tr>')
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    corner = f'<th class="l">{escape(names[0])} \\ {escape(names[1])}</th>'
    return f'<div class="box scroll"><table><thead><tr>{corner}{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
