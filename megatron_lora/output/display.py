"""What people see of a run: a live table of its jobs on a terminal, plain lines elsewhere.

Rates are measured over a job's last steps on the wall clock, because co-trained jobs share the machine: a job's share is its part
of all tokens per second. A terminal that goes away ends the display, not the run.
"""

import io
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_lora.output.metrics import JobSummary, Observer, StepReport

RECENT_STEPS = 20
REFRESH_S = 0.25
LINE_INTERVAL_S = 10.0
STATES = ("running", "failed", "paused", "queued", "done")  # in the order of interest
STYLES = {"running": "green", "failed": "bold red", "paused": "yellow", "queued": "dim", "done": "cyan"}


class Progress:
    """How far one job is and how fast it goes."""

    def __init__(self, job: JobSummary, now: float):
        self.name, self.total_steps = job.name, job.total_steps
        self.state, self.reason = "queued", ""
        self.last: StepReport | None = None
        self._recent = deque([(now, 0)], maxlen=RECENT_STEPS + 1)  # (when, tokens of the step that ended then)

    def add(self, report: StepReport, now: float) -> None:
        """Count a step."""
        self.last = report
        self._recent.append((now, report.tokens))
        if self.state == "queued":
            self.state = "running"

    @property
    def _is_running(self) -> bool:
        return self.state == "running" and (self.last is None or self.last.step < self.total_steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall-clock time over the last steps; 0 when none is known or the job has no step left to run."""
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in list(self._recent)[1:]) / seconds if self._is_running and seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of the last steps; None when unknown."""
        if not self._is_running or self.last is None:
            return None
        return (self.total_steps - self.last.step) * (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)


def make_display(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Observer:
    """Choose the display that fits where the run's output goes."""
    outlet = Outlet(sys.stdout if stream is None else stream)
    console = Console(file=outlet)
    return LiveTable(console, clock) if outlet.isatty() and not console.is_dumb_terminal else PlainLines(outlet, clock)


class Outlet(io.TextIOBase):
    """A text stream that never fails: characters it cannot show become '?', and without a reader it swallows what is written.

    rich, left alone, ends the process when a pipe breaks, and with it the run.
    """

    def __init__(self, stream: TextIO):
        self._stream: TextIO | None = stream
        self._is_terminal, self._encoding = stream.isatty(), stream.encoding or "utf-8"

    @property
    def encoding(self) -> str:
        """The stream's, by which rich chooses its lines and boxes."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether this is a terminal, or was one."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Write, or lose the reader."""
        shown = text.encode(self._encoding, "replace").decode(self._encoding)
        self._do(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush, or lose the reader."""
        self._do(lambda stream: stream.flush())

    def _do(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is not None:
            try:
                action(self._stream)
            except OSError:
                self._stream = None


class LiveTable(Observer):
    """Redraws a table of the jobs in place, a few times a second, on the caller's thread."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock, self._drawn = console, clock, float("-inf")
        self._jobs: dict[str, Progress] = {}
        self._live: Live | None = None

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        now = self._clock()
        self._jobs = {job.name: Progress(job, now) for job in jobs}
        self._live = Live(self._table(), console=self._console, auto_refresh=False)
        self._live.start()
        self._console.show_cursor(True)  # a run that is killed must not leave the terminal without one

    def on_step(self, report: StepReport) -> None:
        now = self._clock()
        self._jobs[report.job].add(report, now)
        if now - self._drawn >= REFRESH_S:
            self._drawn = now
            self._refresh()

    def on_status(self, job: str, state: str, reason: str) -> None:
        self._jobs[job].state, self._jobs[job].reason = state, reason
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
        room = max(1, self._console.height - 6)
        jobs = sorted(self._jobs.values(), key=lambda job: STATES.index(job.state)) if len(self._jobs) > room else self._jobs.values()
        return jobs_table(list(jobs), room)


def jobs_table(jobs: Sequence[Progress], room: int) -> Table:
    """Lay out the first `room` jobs and count the others."""
    table = Table(title=None, expand=False)
    table.add_column("job", overflow="fold")
    for heading in ("step", "loss", "lr", "grad norm", "tokens/s", "share", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state")
    total = sum(job.tokens_per_second for job in jobs)
    for job in jobs[:room]:
        state = Text(f"{job.state}: {job.reason}" if job.reason else job.state, style=STYLES[job.state])
        table.add_row(Text(job.name), *cells(job, total), state)
    if hidden := jobs[room:]:
        counts = Counter(job.state for job in hidden)
        table.add_row(Text(f"and {len(hidden)} more"), *[""] * 7, Text(", ".join(f"{n} {state}" for state, n in counts.items())))
    return table


def cells(job: Progress, total_tokens_per_second: float) -> list[str]:
    """Write a job's step, loss, learning rate, gradient norm, tokens/s, share and time left."""
    if job.last is None:
        return [f"0/{job.total_steps}", *[""] * 6]
    rate, left = job.tokens_per_second, job.seconds_left
    return [
        f"{job.last.step}/{job.total_steps}",
        f"{job.last.loss:.4f}",
        f"{job.last.learning_rate:.2e}",
        f"{job.last.grad_norm:.3g}" + (" skipped" if job.last.skipped else ""),
        f"{rate:,.0f}" if rate else "",
        f"{rate / total_tokens_per_second:.0%}" if rate else "",
        duration(left) if left is not None else "",
    ]


class PlainLines(Observer):
    """Prints a line for a job's first and last step, for one step now and then, and for each that is skipped, and for its end."""

    def __init__(self, outlet: Outlet, clock: Callable[[], float] = time.monotonic):
        self._outlet, self._clock = outlet, clock
        self._jobs: dict[str, Progress] = {}
        self._shown_at: dict[str, float] = {}
        self._interval_s = LINE_INTERVAL_S

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        now = self._clock()
        self._jobs = {job.name: Progress(job, now) for job in jobs}
        self._interval_s = max(LINE_INTERVAL_S, 0.5 * len(jobs))

    def on_step(self, report: StepReport) -> None:
        now, job = self._clock(), self._jobs[report.job]
        job.add(report, now)
        due = now - self._shown_at.get(job.name, float("-inf")) >= self._interval_s
        if due or report.step == report.total_steps or report.skipped:
            self._shown_at[job.name] = now
            print(line(job, sum(other.tokens_per_second for other in self._jobs.values())), file=self._outlet, flush=True)

    def on_status(self, job: str, state: str, reason: str) -> None:
        self._jobs[job].state, self._jobs[job].reason = state, reason
        if state not in ("queued", "running"):
            print(f"{job}: {state}{f': {reason}' if reason else ''}", file=self._outlet, flush=True)


def line(job: Progress, total_tokens_per_second: float) -> str:
    """Write a job's progress as one line."""
    step, loss, learning_rate, grad_norm, rate, share, left = cells(job, total_tokens_per_second)
    parts = [f"{job.name}: step {step}", f"loss {loss}", f"lr {learning_rate}", f"grad norm {grad_norm}"]
    parts += [f"{rate} tokens/s ({share})"] if rate else []
    parts += [f"ETA {left}"] if left else []
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Write a time in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
