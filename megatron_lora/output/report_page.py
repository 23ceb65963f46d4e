"""`report.html`: a run on one page that needs nothing else: no network, no fonts, no script to be readable.

    write_report_page(output_dir)        # at the end of a run by its first rank, and by `megatron-lora report RUN --html`

What the directory says (run_view.py) becomes figures, curves, tables and a picture of a window of
the plan in which jobs joined, left or were evaluated. A policy in the page forbids it to load
anything and to run any script but its own; names, reasons and paths are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from megatron_lora.files import write_atomically
from megatron_lora.output.display import STYLES, duration
from megatron_lora.output.job_view import JobView
from megatron_lora.output.report_charts import DETAILED, HATCHED, Pass, bare_curve, colour, job_chart, overview_chart, timeline_picture
from megatron_lora.output.report_style import NUM_COLOURS, SCRIPT, STYLE
from megatron_lora.output.report_sweeps import sweep_sections
from megatron_lora.output.run_view import PlanWindow, RunView, event_time

REPORT = "report.html"
MOST_LARGE_CHARTS, MOST_OPEN_CHARTS, MOST_EVENTS, MOST_SLOTS = 8, 120, 300, 64
MOST_PLANNED = 20_000  # slots that are looked at where there is no timeline yet
SYMBOLS = {"done": "✓", "failed": "✕", "running": "▸", "paused": "‖", "queued": "○", "stopped": "■", "cancelled": "–"}


def write_report_page(output_dir: str | Path, file: Path | None = None) -> Path:
    """Write the page of a run, by default into its directory; returns its path. UserError where the directory is no run's."""
    view = RunView.read(Path(output_dir))
    file = file or view.path / REPORT
    write_atomically(file, report_page(view))
    return file


def report_page(view: RunView) -> str:
    """Return the page as HTML."""
    jobs = list(view.jobs.values())
    colours = _colours(jobs)
    sections = [
        _header(view),
        _figures(view, jobs),
        _failures(jobs),
        sweep_sections(view.leaderboards),
        _overview(jobs, colours),
        _charts(jobs),
        _jobs_table(view, jobs),
    ]
    sections += [_timeline(view, colours), _accounting(view, jobs), _events(view), _footer(view)]
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(_name(view))} · megatron-lora</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _name(view: RunView) -> str:
    return view.path.resolve().name


def _colours(jobs: Sequence[JobView]) -> dict[str, str]:
    """Return the colours of the jobs that stand out: all of a few, or those with the best evaluations (or losses) of many."""
    if len(jobs) > NUM_COLOURS:
        jobs = sorted((job for job in jobs if job.steps), key=_rank)[:5]
    return {job.name: colour(number) for number, job in enumerate(jobs)}


def _rank(job: JobView) -> float:
    best = job.best()
    value = best[1] if best else job.loss
    sign = -1 if best and job.best_is_largest else 1
    return math.inf if value is None else sign * value


def _header(view: RunView) -> str:
    if view.exit_status is None:
        state, said = ("running", "running") if view.is_live() else ("paused", "no longer running")
    else:
        state, said = {
            0: ("done", "all jobs are over"),
            3: ("failed", "ended, some jobs failed"),
            75: ("paused", "stopped and saved"),
        }.get(view.exit_status, ("failed", f"ended with {view.exit_status}"))
    config = view.config
    words = [str(config.get("base_model") or ""), view.layout, str(config.get("precision") or "")]
    words += [f"{config['microbatch_tokens']} tokens a microbatch"] if "microbatch_tokens" in config else []
    reason = f'<p class="muted">{escape(view.reason)}</p>' if view.reason else ""
    line = escape(" · ".join(word for word in words if word))
    return f'<header><h1>{escape(_name(view))}</h1>{_pill(state, said)}<p class="muted">{line}</p>{reason}</header>'


def _pill(state: str, said: str | None = None) -> str:
    known = state if state in STYLES else "queued"
    return f'<span class="state {known}">{SYMBOLS[known]} {escape(said or state)}</span>'


def _figures(view: RunView, jobs: Sequence[JobView]) -> str:
    counts = Counter(job.state for job in jobs)
    figures = [("jobs", f"{len(jobs):,}"), *((state, f"{counts[state]:,}") for state in STYLES if 0 < counts[state] < len(jobs))]
    figures += [("steps", f"{sum(job.step for job in jobs):,}"), ("tokens", _short(view.tokens))]
    if (seconds := view.seconds()) is not None:
        figures += [("training", duration(seconds)), ("tokens/s", _short(view.tokens / seconds))]
    evaluations = sum(len(job.evaluations) for job in jobs)
    figures += [("evaluations", f"{evaluations:,}")] if evaluations else []
    return f'<div class="figures">{"".join(f"<div><b>{value}</b><span>{escape(what)}</span></div>" for what, value in figures)}</div>'


def _short(number: float) -> str:
    """Write a number in at most seven characters."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {name}"
    return f"{number:,.0f}"


def _failures(jobs: Sequence[JobView]) -> str:
    failed = [job for job in jobs if job.state == "failed"]
    if not failed:
        return ""
    items = "".join(f"<li><b>{escape(job.name)}</b>: {escape(job.reason or 'no reason is recorded')}</li>" for job in failed[:10])
    more = f"<li>and {len(failed) - 10} more, in the table of jobs</li>" if len(failed) > 10 else ""
    return f'<div class="box notice"><b>{len(failed)} job{"s" * (len(failed) > 1)} failed</b><ul>{items}{more}</ul></div>'


def _overview(jobs: Sequence[JobView], colours: dict[str, str]) -> str:
    metrics = Counter(job.metric for job in jobs if len(job.evaluated(job.metric)) > 1)
    metric = metrics.most_common(1)[0][0] if metrics else None
    if sum(bool(job.evaluated(metric) if metric else job.steps) for job in jobs) < 2:
        return ""
    shown = "The five best are named; point at a line for its job." if len(jobs) > NUM_COLOURS else ""
    chart = overview_chart(jobs, metric, colours)
    return f'<h2>All jobs</h2><div class="box"><p class="key">{shown}</p>{chart}</div>'


def _charts(jobs: Sequence[JobView]) -> str:
    begun = [job for job in jobs if job.steps]
    if not begun:
        return '<h2>Curves</h2><p class="muted">No job has taken a step yet.</p>'
    small = len(begun) > MOST_LARGE_CHARTS
    size = (200, 96) if small else (400, 220) if len(begun) > 1 else (1120, 320)
    cards = "".join(_card(job, *size) for job in begun)
    thin = ", thin: step by step" if any(len(job.losses) >= DETAILED for job in begun) else ""
    key = f'<span><i style="background:{colour(0)}"></i>training loss{", smoothed" if small else thin}</span>'
    if any(job.evaluations for job in begun):
        key += f'<span><i style="background:{colour(1)}"></i>evaluation loss, its best step ringed</span>'
    missing = len(jobs) - len(begun)
    key += f"<span>{missing} job{'s have' if missing > 1 else ' has'} taken no step yet</span>" if missing else ""
    body = f'<p class="key">{key}</p><div class="charts{" many" if small else ""}"{" data-filter" if small else ""}>{cards}</div>'
    if len(begun) > MOST_OPEN_CHARTS:
        body = f"<details><summary>{len(begun):,} charts, one per job</summary>{body}</details>"
    return f"<h2>Curves</h2>{body}"


def _card(job: JobView, width: int, height: int) -> str:
    found, small = job.evaluated(), width < 300
    values = [f"loss {job.loss:.4f}"] if job.loss is not None else []
    values += [f"eval {found[-1][1]:.4f}"] if found else []
    margin = job.last.get("rewards/margins")
    values += [f"margin {margin:.4f}"] if isinstance(margin, float) else []
    said = " · ".join(values)
    state = f" {_pill(job.state)}" if not small else f' · <span class="{job.state}">{escape(job.state)}</span>' * (job.state != "done")
    head = f'<h3>{escape(job.name)}</h3><p class="muted small">{said}{state}</p>'
    return f'<div class="card" data-find="{escape(job.name)} {escape(job.state)}">{head}{job_chart(job, width, height)}</div>'


def _table(heads: Sequence[tuple[str, bool]], rows: str, foot: str = "", filtered: bool = False) -> str:
    """Return a table; `heads`: (heading, whether it is of text)."""
    row = "".join(f"<th data-sort{' class=l' if is_text else ''}>{escape(name)}</th>" for name, is_text in heads)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    mark = " data-filter" if filtered else ""
    return f'<div class="box scroll"{mark}><table><thead><tr>{row}</tr></thead><tbody>{rows}</tbody>{foot}</table></div>'


def _cell(value: float | None, text: str) -> str:
    """Return a cell of a number, with what it is sorted by."""
    return "<td data-value=''></td>" if value is None else f'<td data-value="{value:.9g}">{text}</td>'


def _jobs_table(view: RunView, jobs: Sequence[JobView]) -> str:
    evaluated, reasons = any(job.evaluations for job in jobs), any(job.reason for job in jobs)
    places = {entry["job"]: entry for entry in view.queue}
    heads = [("job", True), ("state", True), ("step", False), ("loss", False), ("curve", True)]
    heads += [("eval loss", False), ("best", False), ("of step", False)] if evaluated else []
    heads += [("learning rate", False), ("r", False)] + ([("reason", True)] if reasons or places else [])
    rows = []
    for job in jobs:
        of = f"/{job.num_steps}" if job.num_steps and job.num_steps != job.step else ""
        cells = [f'<td class="l">{escape(job.name)}</td><td class="l" data-value="{escape(job.state)}">{_pill(job.state)}</td>']
        cells += [_cell(job.step, f"{job.step:,}{of}"), _cell(job.loss, f"{job.loss or 0:.4f}"), f'<td class="l">{bare_curve(job)}</td>']
        if evaluated:
            found, best = job.evaluated(), job.best()
            named = "" if job.metric == "eval_loss" else f' <span class="muted">{escape(job.metric.removeprefix("eval_"))}</span>'
            cells.append(_cell(found[-1][1], f"{found[-1][1]:.4f}") if found else _cell(None, ""))
            cells.append((_cell(best[1], f"{best[1]:.4f}{named}") + _cell(best[0], f"{best[0]:,}")) if best else _cell(None, "") * 2)
        for key in ("learning_rate", "r"):
            value = job.settings.get(key)
            cells.append(_cell(value, f"{value:g}") if isinstance(value, int | float) else _cell(None, ""))
        place = places.get(job.name)
        why = job.reason or (f"place {place.get('place', '?')} in the queue, {place.get('reason', '')}" if place else "")
        cells.append(f'<td class="why">{escape(why)}</td>' if reasons or places else "")
        rows.append(f'<tr data-find="{escape(job.name)} {escape(job.state)}">{"".join(cells)}</tr>')
    return f"<h2>Jobs</h2>{_table(heads, ''.join(rows), filtered=len(jobs) > 20)}"


def _accounting(view: RunView, jobs: Sequence[JobView]) -> str:
    used = view.accounting or {job.name: {"tokens": job.tokens} for job in jobs if job.tokens}
    used = {name: entry for name, entry in used.items() if name in view.jobs}
    if not used:
        return ""
    shares = view.shares()
    keys = [key for key in ("tokens", "slots", "device_seconds", "padding") if any(key in entry for entry in used.values())]
    most = max(shares.values()) or 1.0
    rows, totals = [], dict.fromkeys(keys, 0.0)
    for name, entry in used.items():
        cells = [f'<td class="l">{escape(name)}</td>']
        for key in keys:
            value = float(entry.get(key) or 0)
            totals[key] += value
            cells.append(_cell(value, f"{value:,.0f}"))
        bar = f'<span class="track"><span class="bar" style="width:{80 * shares[name] / most:.0f}px"></span></span>'
        cells.append(f'<td class="l" data-value="{shares[name]:.6f}">{bar}{shares[name]:.1%}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    foot = f'<tr><td class="l">all</td>{"".join(f"<td>{totals[key]:,.0f}</td>" for key in keys)}<td></td></tr>'
    names = {"device_seconds": "device seconds", "padding": "padding rows"}
    heads = [("job", True), *((names.get(key, key), False) for key in keys), ("share", True)]
    of = "predicted device time" if "device_seconds" in keys else "tokens"
    table = _table(heads, "".join(rows), foot)
    return f'<h2>Accounting</h2><p class="muted small">A job\'s share is that of the {of}.</p>{table}'


def _timeline(view: RunView, colours: dict[str, str]) -> str:
    """Draw the part of the run in which most happened: as it ran where the timeline has it, else as it was planned."""
    by_rank = view.spans()
    stages = {events[0]["pid"]: events for _, events in sorted(by_rank.items(), reverse=True) if events}  # the first rank of each
    ran = {event["index"] for event in stages.get(0, []) if event["cat"] == "F"}
    newest = view.window.first if view.window else None
    firsts, windows, first = {}, view.windows(since=min(ran, default=(newest or 0) - MOST_PLANNED)), 0
    for window in windows:
        firsts[window.number] = first = first if window.first is None else window.first
        first += len(window.slots)
    ended = [window for window in windows if ran & set(range(firsts[window.number], firsts[window.number] + len(window.slots)))]
    candidates = [window for window in ended or windows if any(window.slots)]
    if not candidates:
        return ""
    window = max(candidates, key=lambda each: (_interest(each), -abs(each.number - len(windows) / 2)))
    begin, slots = _part(window)
    passes = _passes_as_run(window, firsts[window.number], slots, stages) if ended else _passes_as_planned(window, slots, view.num_stages)
    if not passes:
        return ""
    names = list(dict.fromkeys(name for each in passes for name in each.tokens))
    if len(view.jobs) > NUM_COLOURS:
        colours = {name: colour(number) for number, name in enumerate(names)}
    zero = firsts[window.number] if ended else 0
    came = {
        name: [each.start for each in passes if name in each.tokens and each.slot >= zero + slot] for name, slot in window.joined.items()
    }
    went = {name: [each.end for each in passes if name in each.tokens and each.slot < zero + slot] for name, slot in window.left.items()}
    marks = [(min(starts), f"{name} joins") for name, starts in came.items() if starts]
    marks = marks if len(marks) <= 6 and window.number > 0 else []
    marks += [(max(ends), f"{name} leaves") for name, ends in went.items() if ends][:6]
    picture = timeline_picture(passes, view.num_stages, "seconds" if ended else "slots", colours, marks)
    key = "".join(f'<span><i class="tile" style="background:{colours[name]}"></i>{escape(name)}</span>' for name in names[:24])
    how = "pale: forward, full: backward, grey: slots of other windows" if ended else "forwards alone, each slot as long as another"
    key += f"<span>{how}</span>"
    hatch = f'<svg viewBox="0 0 12 12">{HATCHED}</svg>'
    key += f"<span>{hatch}evaluation</span>" if any(each.kind == "EVAL" for each in passes) else ""
    said = f"{window.title.capitalize()}, slots {firsts[window.number] + begin} to {firsts[window.number] + begin + len(slots) - 1}"
    said += ", as it ran." if ended else ", as it was planned."
    return f'<h2>Timeline</h2><div class="box"><p class="key"><span>{said}</span>{key}</p>{picture}</div>'


def _interest(window: PlanWindow) -> int:
    """Say how much happens in a window; what all of a run's jobs do at its start does not count."""
    return 4 * bool(window.joined and window.number) + 2 * bool(window.evaluate) + bool(window.left)


def _part(window: PlanWindow) -> tuple[int, range]:
    """Return the first slot to draw, and the slots: a long window's part around its first evaluation or its start."""
    begin = 0
    if len(window.slots) > MOST_SLOTS and window.evaluate and not window.joined:
        begin = max(0, min(min(window.evaluate) - MOST_SLOTS // 2, len(window.slots) - MOST_SLOTS))
    return begin, range(begin, min(len(window.slots), begin + MOST_SLOTS))


def _passes_as_run(window: PlanWindow, first: int, slots: range, stages: dict[int, list[dict]]) -> list[Pass]:
    """Return the passes of a window's slots, and of what ran between them, without names."""
    kinds = {"F": "F", "B": "B", "EVAL": "EVAL", "E": "EVAL"}
    work = [(stage, event, event["index"] - first) for stage, events in stages.items() for event in events if event["cat"] in kinds]
    own = [event for _, event, slot in work if slot in slots and window.slots[slot]]
    begin, end = min((e["ts"] for e in own), default=0.0), max((e["ts"] + e["dur"] for e in own), default=0.0)
    passes = []
    for stage, event, slot in work:
        tokens = window.tokens(slot) if slot in slots else {}
        started, ended = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        if started < ended and (tokens or slot not in slots):
            kind = "EVAL" if slot in window.evaluate and tokens else kinds[event["cat"]]
            passes.append(Pass(stage, kind, event["index"], started / 1e6, ended / 1e6, tokens))
    return passes if own else []


def _passes_as_planned(window: PlanWindow, slots: range, num_stages: int) -> list[Pass]:
    kept = [(slot, window.tokens(slot)) for slot in slots]
    kinds = {slot: "EVAL" if slot in window.evaluate else "F" for slot in slots}
    return [Pass(stage, kinds[slot], slot, slot + stage, slot + stage + 0.94, of) for stage in range(num_stages) for slot, of in kept if of]


def _events(view: RunView) -> str:
    if not view.events:
        return ""
    rows = []
    for event in view.events[-MOST_EVENTS:]:
        when = event_time(event)
        more = [f"{event['key']} = {event.get('value')}"] if "key" in event else []
        more += [f"step {event['step']}"] if "step" in event else []
        more += [str(event["reason"])] if event.get("reason") else []
        slot = event.get("slot")
        rows.append(
            f'<tr><td class="l">{f"{when:%Y-%m-%d %H:%M:%S}" if when else ""}</td><td class="l">{escape(str(event.get("job") or ""))}</td>'
            f'<td class="l">{escape(str(event.get("event") or ""))}</td><td>{escape("" if slot is None else str(slot))}</td>'
            f'<td class="why">{escape(", ".join(more))}</td></tr>'
        )
    heads = [("time (UTC)", True), ("job", True), ("event", True), ("slot", False), ("", True)]
    earlier = len(view.events) - len(rows)
    said = f"{len(view.events):,} events" + (f", the last {len(rows)} of them" if earlier > 0 else "")
    return f"<h2>Events</h2><details{' open' if len(rows) <= 30 else ''}><summary>{said}</summary>{_table(heads, ''.join(rows))}</details>"


def _footer(view: RunView) -> str:
    try:
        environment: dict[str, Any] = dict(json.loads((view.path / "env.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        environment = {}
    devices = Counter(str(device) for device in environment.get("devices") or [])
    words = [f"{count} x {device}" for device, count in devices.items()]
    words += [f"commit {str(environment['commit'])[:12]}"] if environment.get("commit") else []
    words += [
        f"{package} {version}" for package, version in (environment.get("packages") or {}).items() if package in ("torch", "megatron-core")
    ]
    words += [f"written {datetime.now():%Y-%m-%d %H:%M}", f"of {view.path}"]
    damaged = [f"{file} cannot be read ({why})" for file, why in view.unreadable.items()]
    damaged += [f"{job.num_unreadable} lines of {job.name}'s metrics cannot be read" for job in view.jobs.values() if job.num_unreadable]
    missing = f'<p class="failed">Left out: {escape("; ".join(damaged[:20]))}</p>' if damaged else ""
    return f"<footer>{missing}{escape(' · '.join(words))}</footer>"
