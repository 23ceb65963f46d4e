"""The sweeps in report.html: a heat map over two keys, and the leaderboard; the curves of all points are in the page's overview."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from megatron_lora.output.leaderboard import heat_map, written

MOST_ROWS = 50


def sweep_sections(boards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a section for each sweep."""
    return "".join(_section(name, board) for name, board in boards.items() if board["points"])


def _section(name: str, board: Mapping[str, Any]) -> str:
    over, points = list(board["over"]), board["points"]
    heads = [("place", False), ("point", True), *((key, False) for key in over), (board["metric"], False), ("step", False)]
    head = "".join(f"<th{' class=l' if is_text else ''}>{escape(key)}</th>" for key, is_text in [*heads, ("rungs", False), ("state", True)])
    rows = []
    for place, row in enumerate(points[:MOST_ROWS], 1):
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        cells = [str(place), *(escape(written(row["values"].get(key))) for key in over), value, str(row["step"] or ""), str(row["rung"])]
        cells.insert(1, escape(row["job"]))
        tds = "".join(f"<td{' class=l' if at == 1 else ''}>{cell}</td>" for at, cell in enumerate(cells))
        rows.append(f'<tr>{tds}<td class="l">{escape(row["state"])}</td></tr>')
    more = f'<p class="muted small">and {len(points) - MOST_ROWS} more, in leaderboard.json</p>' if len(points) > MOST_ROWS else ""
    said = f"{len(points)} points, {board['strategy']}, {board['mode']} {board['metric']}"
    table = f'<div class="box scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>{more}</div>'
    return f'<h2>Sweep {escape(name)}</h2><p class="muted small">{escape(said)}</p>{_heat(board) if len(over) > 1 else ""}{table}'


def _heat(board: Mapping[str, Any]) -> str:
    """Draw the heat map as a table: the better a cell's best value, the darker it is."""
    names, (rows, columns), cells = heat_map(board)
    values = [value for line in cells for value in line if value is not None]
    if not values:
        return ""
    worst, best = (max(values), min(values)) if board["mode"] == "min" else (min(values), max(values))
    body = []
    for label, line in zip(rows, cells, strict=True):
        tds = []
        for value in line:
            share = 0.0 if value is None or worst == best else (worst - value) / (worst - best)
            shade = f' style="background:color-mix(in srgb,var(--c0) {5 + 65 * share:.0f}%,transparent)"' if value is not None else ""
            tds.append(f"<td{shade}>{'' if value is None else f'{value:.4f}'}</td>")
        body.append(f'<tr><th class="l">{escape(label)}</th>{"".join(tds)}</tr>')
    head = "".join(f"<th>{escape(label)}</th>" for label in columns)
    corner = f'<th class="l">{escape(names[0])} \\ {escape(names[1])}</th>'
    return f'<div class="box scroll"><table><thead><tr>{corner}{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
