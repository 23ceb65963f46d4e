"""`megatron-lora watch RUN`: a run in a terminal, while it trains or after it: jobs, queue, events, the newest window of the plan.

It reads the run's directory alone and is no part of the run: leaving it, by Ctrl-C too, changes
nothing. A frame fits the terminal. Where the output is no terminal, or with --once, one frame is printed.

A window is drawn as one line per stage: a slot's letters are its jobs, by their shares of its
tokens; small letters evaluate, a dot is a no-op. A slot reaches each stage one slot after the one before.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_lora.commands.output_streams import keep_running_unread
from megatron_lora.errors import UserError
from megatron_lora.output.display import STYLES, duration
from megatron_lora.output.job_states import OVER
from megatron_lora.output.job_view import JobView
from megatron_lora.output.leaderboard import written
from megatron_lora.output.run_view import PlanWindow, RunView, event_time

REFRESH_S = 1.0
RATE_S = 60.0  # tokens/s are of the last minute
PRINTED_LINES = 60  # of a frame that is no terminal's
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
MOST_POINTS = 5  # of a sweep that are shown
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main(run: str, names: Sequence[str], once: bool) -> int:
    """Show a run until it ends or the user leaves; returns 0."""
    view = RunView.read(Path(run))
    if unknown := [name for name in names if name not in view.jobs]:
        raise UserError(f"--job: {unknown[0]!r} is no job of {run}; its jobs are {', '.join(list(view.jobs)[:12])}")
    keep_running_unread()
    console = Console(highlight=False)
    rate = Rate()
    if not once and console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while view.is_live():
                    rate.add(view.tokens, time.monotonic())
                    live.update(Group(*frame(view, rate, *console.size, names, console.options.ascii_only)), refresh=True)
                    time.sleep(REFRESH_S)
                    view.refresh()
            except KeyboardInterrupt:
                pass
    height = console.height - 1 if console.is_terminal else PRINTED_LINES
    for line in frame(view, rate, console.width, height, names, console.options.ascii_only):
        console.print(line, no_wrap=True, crop=True, soft_wrap=False)
    return 0


class Rate:
    """Tokens per second on the wall clock of the one who watches."""

    def __init__(self):
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, tokens: int, now: float) -> None:
        """Take the run's tokens so far."""
        self._seen.append((now, tokens))
        while self._seen[0][0] < now - RATE_S:
            self._seen.popleft()

    def of(self, view: RunView) -> float | None:
        """Return the rate: as watched, else over the whole of a run that has events of its beginning and its end."""
        if len(self._seen) > 1 and self._seen[-1][1] > self._seen[0][1]:
            return (self._seen[-1][1] - self._seen[0][1]) / (self._seen[-1][0] - self._seen[0][0])
        seconds = view.seconds()
        return view.tokens / seconds if seconds and view.tokens else None


def frame(view: RunView, rate: Rate, width: int, height: int, names: Sequence[str] = (), ascii_only: bool = False) -> list[Text]:
    """Return the lines of one frame: at most `height`, each at most `width` wide. `names`: the jobs to show, if not all."""
    lines = _header(view, rate)
    timeline = _timeline(view.window, view.num_stages, width, max(1, height // 4)) if height >= 20 and view.window else []
    events = [_event(event) for event in view.events[-min(8, max(0, (height - 14) // 3)) :]] if height >= 18 else []
    queue = [_queue(view)] if view.queue else []
    best = [line for name, board in view.leaderboards.items() for line in _leaderboard(name, board)] if height >= 18 else []
    rest = [block for block in (best, queue, events, timeline) if block]
    spare = height - len(lines) - sum(len(block) + 1 for block in rest) - 1
    lines += [Text(), *_table(view, [view.jobs[name] for name in names] or list(view.jobs.values()), width, max(3, spare), ascii_only)]
    for block in rest:
        lines += [Text(), *block]
    for line in lines[:height]:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _header(view: RunView, rate: Rate) -> list[Text]:
    config, jobs = view.config, view.jobs.values()
    known = [(job, job.num_steps) for job in jobs if job.state not in OVER]
    remaining = sum(max(0, num_steps - job.step) * _tokens_per_step(job, view) for job, num_steps in known if num_steps)
    speed = rate.of(view)
    state = "running" if view.exit_status is None else f"ended with {view.exit_status}{f': {view.reason}' if view.reason else ''}"
    budget = f", {config['microbatch_tokens']} tokens a microbatch" if "microbatch_tokens" in config else ""
    counts = Counter(job.state for job in jobs)
    second = [
        f"{len(view.jobs)} job{'s' * (len(view.jobs) != 1)}: " + ", ".join(f"{counts[name]} {name}" for name in STYLES if counts[name])
    ]
    second += [f"{speed:,.0f} tokens/s"] if speed else []
    if speed and remaining and view.exit_status is None:
        at_least = "" if all(num_steps for _, num_steps in known) else "at least "
        second.append(f"ETA {at_least}{duration(remaining / speed)}")
    second += [f"{sum(job.step for job in jobs):,} steps", f"{view.tokens:,} tokens"]
    first = Text.assemble(
        (view.path.resolve().name, "bold"), "  ", (state, "bold"), f"  {config.get('base_model', '')}  {view.layout}{budget}"
    )
    lines = [first, Text("  ".join(second))]
    lines += [Text(f"cannot be read: {file} ({why})", style="red") for file, why in list(view.unreadable.items())[:2]]
    if damaged := sum(job.num_unreadable for job in jobs):
        lines.append(Text(f"{damaged} lines of metrics.jsonl files are damaged and left out", style="red"))
    return lines


def _tokens_per_step(job: JobView, view: RunView) -> float:
    """Return a job's tokens per step so far; of one without steps, the mean of the others."""
    if job.steps:
        return job.tokens / len(job.steps)
    steps = sum(len(other.steps) for other in view.jobs.values())
    return view.tokens / steps if steps else 0.0


def _table(view: RunView, jobs: list[JobView], width: int, height: int, ascii_only: bool) -> list[Text]:
    """Lay out the jobs in at most `height` lines; the last one counts those that are left out."""
    rows = height - 1
    if len(jobs) > rows:
        jobs.sort(key=lambda job: list(STYLES).index(job.state) if job.state in STYLES else len(STYLES))
        rows -= 1
    shown, hidden = jobs[:rows], jobs[rows:]
    name_width = max([8, *(len(job.name) for job in shown)])
    name_width = min(name_width, max(10, width - 66))
    steps = {job.name: f"{job.step}/{job.num_steps}" if job.num_steps else f"{job.step}" for job in shown}
    step_width = max([5, *map(len, steps.values())])
    evaluated = f" {'eval loss':>9}{'':8}" if any(job.evaluations for job in shown) else ""
    heading = f"{'job':{name_width}} {'state':9} {'step':>{step_width}} {'loss':>8}{evaluated} {'share':>6}"
    lines = [Text(heading, style="bold")]
    places = {entry["job"]: entry for entry in view.queue}
    shares, rest = view.shares(), max(0, width - len(heading) - 2)
    for job in shown:
        style = STYLES.get(job.state, "")
        name = job.name if len(job.name) <= name_width else job.name[: name_width - 1] + ("~" if ascii_only else "…")
        line = Text.assemble(
            f"{name:{name_width}} ", (f"{job.state:9.9}", style), f" {steps[job.name]:>{step_width}} {_number(job.loss):>8}"
        )
        line.append_text(_evaluated(job) if evaluated else Text())
        line.append(f" {f'{shares[job.name]:.1%}' if job.steps else '':>6}  ")
        if job.name in places:
            line.append(f"place {places[job.name].get('place', '?')}, {places[job.name].get('reason', '')}", style="dim")
        elif job.reason:
            line.append(job.reason, style=style)
        else:
            line.append(sparkline(job.losses, min(rest, 48), ascii_only), style="cyan")
        lines.append(line)
    if hidden:
        counts = Counter(job.state for job in hidden)
        lines.append(Text(f"and {len(hidden)} more: " + ", ".join(f"{count} {state}" for state, count in counts.items()), style="dim"))
    return lines


def _number(value: float | None) -> str:
    """Write a loss in at most eight characters."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.2e}"


def _evaluated(job: JobView) -> Text:
    """Write the last evaluation's loss and its change from the one before; a star where its step is the best."""
    found, best = job.evaluated(), job.best()
    if not found:
        return Text(" " * 18)
    step, value = found[-1]
    star = "*" if best and best[0] == step else " "
    if len(found) == 1:
        return Text(f" {_number(value):>8}{star}{'':8}")
    change = value - found[-2][1]
    written = f"{change:>+8.3f}" if abs(change) < 100 else f"{change:>+8.0e}"
    return Text.assemble(f" {_number(value):>8}{star}", (written, "green" if change < 0 else "red"))


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Draw values as `width` bars at most, each the mean of those that it stands for; what is not finite is left blank."""
    bars = ".:-=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    parts = [values[len(values) * at // count : len(values) * (at + 1) // count] for at in range(count)]
    finite = [[value for value in part if math.isfinite(value)] for part in parts]
    means = [math.fsum(part) / len(part) if part else math.nan for part in finite]
    low, high = min(filter(math.isfinite, means), default=0.0), max(filter(math.isfinite, means), default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def _queue(view: RunView) -> Text:
    reasons = Counter(str(entry.get("reason", "")) for entry in view.queue)
    why = ", ".join(f"{count} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items())
    first = ", ".join(str(entry["job"]) for entry in view.queue[:8])
    return Text.assemble(("queue ", "bold"), f"{len(view.queue)} ({why}): {first}{', ...' if len(view.queue) > 8 else ''}")


def _leaderboard(name: str, board: Mapping[str, Any]) -> list[Text]:
    """Write the heading and the best points of a sweep."""
    rows = board["points"]
    over = sum(row["state"] in OVER for row in rows)
    lines = [Text(f"sweep {name}: {over} of {len(rows)} points are over; the best by {board['metric']}", style="bold")]
    for row in [row for row in rows if row["value"] is not None][:MOST_POINTS]:
        values = ", ".join(f"{key} {written(row['values'].get(key))}" for key in board["over"])
        state = (f"{row['state']:9}", STYLES.get(row["state"], ""))
        lines.append(Text.assemble(f"{row['job']:16} ", state, f" {_number(row['value']):>8} at step {row['step']:<5} {values}"))
    return lines


def _event(event: dict) -> Text:
    when = event_time(event)
    style = STYLES.get(str(event.get("event")), "")
    more = [f"{event['key']} = {event.get('value')}"] if "key" in event else []
    more += [f"at step {event['step']}"] if "step" in event else []
    said = " ".join([*more, *([f"({event['reason']})"] if event.get("reason") else [])])
    return Text.assemble(
        (f"{when:%H:%M:%S}  " if when else " " * 10, "dim"),
        f"{event.get('job') or '':16} ",
        (str(event.get("event", "")), style),
        f" {said}",
    )


def _timeline(window: PlanWindow, num_stages: int, width: int, max_stages: int) -> list[Text]:
    """Draw a window, a line per stage, with a heading and a legend."""
    label = len(f"stage {num_stages - 1} ")
    num_slots = min(len(window.slots), max(1, width - label - num_stages + 1))
    cell = min(4, max(1, (width - label) // (num_slots + num_stages - 1)))
    names = list(dict.fromkeys(name for slot in range(num_slots) for name in window.tokens(slot)))
    letters = {name: LETTERS[at] if at < len(LETTERS) else "#" for at, name in enumerate(names)}
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    slots = Text()
    for slot in range(num_slots):
        slots.append_text(_cell(window.tokens(slot), slot in window.evaluate, cell - (cell > 2), letters, colours)).append(" " * (cell > 2))
    said = [f"{window.title}: {len(window.slots)} slot{'s' * (len(window.slots) != 1)}"]
    said += [f"the first {num_slots}"] if num_slots < len(window.slots) else []
    said += [f"+ {', '.join(window.joined)}"] if window.joined else []
    said += [f"- {', '.join(window.left)}"] if window.left else []
    lines = [Text("  ".join(said), style="bold")]
    for stage in range(min(num_stages, max_stages)):
        lines.append(Text(f"{f'stage {stage}':{label}}" + " " * (stage * cell)).append_text(slots))
    if num_stages > max_stages:
        lines[-1] = Text(f"and {num_stages - max_stages + 1} more stages", style="dim")
    entries = [Text(f"{letters[name]} ", style=f"bold {colours[name]}").append(name, style="not bold default") for name in names]
    entries.append(Text("small: evaluation  .: no-op" if window.evaluate else ".: no-op", style="dim"))
    legend = [Text()]
    for entry in entries:
        if legend[-1] and legend[-1].cell_len + 2 + entry.cell_len > width:
            legend.append(Text())
        legend[-1].append("  " if legend[-1] else "").append_text(entry)
    return [*lines, *legend[:3]]


def _cell(tokens: Mapping[str, int], evaluates: bool, cell: int, letters: Mapping[str, str], colours: Mapping[str, str]) -> Text:
    """Draw a slot in `cell` letters, divided by tokens; the largest job comes first where there is no room for all."""
    if not tokens:
        return Text("." * cell, style="dim")
    total, text, seen, end = sum(tokens.values()), Text(), 0, 0
    for name, count in sorted(tokens.items(), key=lambda each: -each[1]):
        seen += count
        begin, end = end, round(cell * seen / total)
        letter = letters[name].lower() if evaluates else letters[name]
        text.append(
            letter * (max(end, 1) - begin if begin == 0 else end - begin), style=f"{'italic ' if evaluates else 'bold '}{colours[name]}"
        )
        end = max(end, 1)
    return text
