"""What people see of a run: a live table of its jobs on a terminal, plain lines elsewhere.

Rates are measured over a job's last steps on the wall clock, because co-trained jobs share the
machine. A job's share is its part of all tokens per second. When the terminal is closed, the
display ends and the run continues.
"""

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_lora.output.metrics import EvalReport, JobSummary, Observer, StepReport

RECENT_STEPS = 20
REFRESH_S = 0.25
LINE_INTERVAL_S = 10.0
STYLES = {  # of every state of a job, in the order of interest
    "running": "green",
    "failed": "bold red",
    "paused": "yellow",
    "queued": "dim",
    "stopped": "cyan",
    "cancelled": "cyan",
    "done": "cyan",
}


class Progress:
    """How far one job is and how fast it trains."""

    def __init__(self, job: JobSummary, now: float):
        self.name = job.name
        self.total_steps = job.total_steps
        self.state = "queued"
        self.reason = ""
        self.last: StepReport | None = None
        self.last_evaluation: EvalReport | None = None
        self.best = job.best
        self._recent = deque([(now, 0)], maxlen=RECENT_STEPS + 1)  # (when, tokens of the step that ended then)

    def add(self, report: StepReport, now: float) -> None:
        """Count a step."""
        self.last = report
        self._recent.append((now, report.tokens))
        if self.state == "queued":
            self.state = "running"

    def add_evaluation(self, report: EvalReport) -> None:
        """Take note of an evaluation."""
        self.last_evaluation, self.best = report, report.best

    @property
    def _is_running(self) -> bool:
        return self.state == "running" and (self.last is None or self.last.step < self.total_steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall-clock time over the last steps; 0 when unknown or when no steps remain."""
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in list(self._recent)[1:]) / seconds if self._is_running and seconds > 0 else 0.0

    @property
    def seconds_remaining(self) -> float | None:
        """Time to the job's end at the rate of its last steps; None when unknown."""
        if not self._is_running or self.last is None:
            return None
        return (self.total_steps - self.last.step) * (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)


def make_display(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Observer:
    """Return a live table for a terminal, and plain lines for any other stream."""
    out = sys.stdout if stream is None else stream
    console = Console(file=out)
    return LiveTable(console, clock) if out.isatty() and not console.is_dumb_terminal else PlainLines(out, clock)


class Display(Observer):
    """Keeps the progress of every job, by name."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._jobs: dict[str, Progress] = {}

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        now = self._clock()
        self._jobs |= {job.name: Progress(job, now) for job in jobs}

    def on_evaluation(self, report: EvalReport) -> None:
        self._jobs[report.job].add_evaluation(report)

    def on_status(self, job: str, state: str, reason: str) -> None:
        if job in self._jobs:  # else it has never joined
            self._jobs[job].state, self._jobs[job].reason = state, reason


class LiveTable(Display):
    """A table of the jobs, redrawn in place a few times a second, on the caller's thread."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self._console = console
        self._drawn_at = float("-inf")
        self._live: Live | None = None

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        super().on_start(jobs)
        if self._live is not None:
            return
        self._live = Live(self._table(), console=self._console, auto_refresh=False)
        self._live.start()
        self._console.show_cursor(True)  # a killed run must not leave the terminal without a cursor

    def on_step(self, report: StepReport) -> None:
        now = self._clock()
        self._jobs[report.job].add(report, now)
        if now - self._drawn_at >= REFRESH_S:
            self._drawn_at = now
            self._refresh()

    def on_status(self, job: str, state: str, reason: str) -> None:
        super().on_status(job, state, reason)
        self._refresh()

    def close(self) -> None:
        if self._live is not None:
            self._refresh()
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.refresh()

    def _table(self) -> Table:
        max_shown = max(1, self._console.height - 6)
        jobs = list(self._jobs.values())
        if len(jobs) > max_shown:
            jobs.sort(key=lambda job: list(STYLES).index(job.state))
        return jobs_table(jobs, max_shown)


def jobs_table(jobs: Sequence[Progress], max_shown: int) -> Table:
    """Lay out the first `max_shown` jobs, with a last line that counts the others by state; evaluations take the learning rate's place."""
    table = Table(title=None, expand=False)
    table.add_column("job", overflow="fold")
    evaluated = any(job.last_evaluation or job.best for job in jobs)
    headings = ["step", "loss", *(["eval loss", "best"] if evaluated else ["lr"]), "grad norm", "tokens/s", "share", "ETA"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", min_width=10)
    total = sum(job.tokens_per_second for job in jobs)
    for job in jobs[:max_shown]:
        state = Text(f"{job.state}: {job.reason}" if job.reason else job.state, style=STYLES[job.state])
        step, loss, learning_rate, *others = cells(job, total)
        table.add_row(Text(job.name), step, loss, *(evaluation_cells(job) if evaluated else [learning_rate]), *others, state)
    if hidden := jobs[max_shown:]:
        counts = Counter(job.state for job in hidden)
        table.add_row(
            Text(f"and {len(hidden)} more"), *[""] * len(headings), Text(", ".join(f"{n} {state}" for state, n in counts.items()))
        )
    return table


def cells(job: Progress, total_tokens_per_second: float) -> list[str]:
    """Write a job's step, loss, learning rate, gradient norm, tokens/s, share and remaining time."""
    if job.last is None:
        return [f"0/{job.total_steps}", *[""] * 6]
    rate, remaining = job.tokens_per_second, job.seconds_remaining
    return [
        f"{job.last.step}/{job.total_steps}",
        f"{job.last.loss:.4f}",
        f"{job.last.learning_rate:.2e}",
        f"{job.last.grad_norm:.3g}" + (" skipped" if job.last.skipped else ""),
        f"{rate:,.0f}" if rate else "",
        f"{rate / total_tokens_per_second:.0%}" if rate else "",
        duration(remaining) if remaining is not None else "",
    ]


def evaluation_cells(job: Progress) -> list[str]:
    """Write a job's last loss of an evaluation, and the value and step of its best one."""
    last, best = job.last_evaluation, job.best
    return [f"{last.eval_loss:.4f}" if last else "", f"{best.value:.4f} at {best.step}" if best else ""]


class PlainLines(Display):
    """Prints a line for a job's first, last and skipped steps, for one step per interval, for its evaluations, and for its end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self._stream = stream
        self._shown_at: dict[str, float] = {}
        self._interval_s = LINE_INTERVAL_S

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        super().on_start(jobs)
        self._interval_s = max(LINE_INTERVAL_S, 0.5 * len(self._jobs))

    def on_step(self, report: StepReport) -> None:
        now, job = self._clock(), self._jobs[report.job]
        job.add(report, now)
        due = now - self._shown_at.get(job.name, float("-inf")) >= self._interval_s
        if due or report.step == report.total_steps or report.skipped:
            self._shown_at[job.name] = now
            print(line(job, sum(other.tokens_per_second for other in self._jobs.values())), file=self._stream, flush=True)

    def on_evaluation(self, report: EvalReport) -> None:
        super().on_evaluation(report)
        parts = [f"{report.job}: after step {report.step}: eval loss {report.eval_loss:.4f}"]
        parts += rewards(report, "eval_") or [f"perplexity {report.eval_perplexity:.4g}"]
        is_best = ", the best so far" if report.best is not None and report.best.step == report.step else ""
        print(f"{', '.join(parts)}, accuracy {report.eval_accuracy:.1%}{is_best}", file=self._stream, flush=True)

    def on_status(self, job: str, state: str, reason: str) -> None:
        super().on_status(job, state, reason)
        if state not in ("queued", "running"):
            print(f"{job}: {state}{f': {reason}' if reason else ''}", file=self._stream, flush=True)


def line(job: Progress, total_tokens_per_second: float) -> str:
    """Write a job's progress as one line."""
    step, loss, learning_rate, grad_norm, rate, share, remaining = cells(job, total_tokens_per_second)
    shown = [] if job.last is None else rewards(job.last)
    parts = [f"{job.name}: step {step}", f"loss {loss}", *shown, f"lr {learning_rate}", f"grad norm {grad_norm}"]
    parts += [f"{rate} tokens/s ({share})"] if rate else []
    parts += [f"ETA {remaining}"] if remaining else []
    return ", ".join(parts)


def rewards(report: StepReport | EvalReport, prefix: str = "") -> list[str]:
    """Say a preference's margin, and of pairs how often the chosen answer is the better one; nothing of another objective."""
    found, right = report.reported, prefix + "rewards/accuracies"
    margin = found.get(prefix + "rewards/margins")
    shown = [] if margin is None else [f"reward margin {margin:.4f}" if math.isfinite(margin) else "no reward margin"]
    return shown + ([f"chosen above rejected {found[right]:.1%}"] if right in found else [])


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
