"""What a run's directory says, as plain data: for `megatron-lora watch` and report.html, of a live run or one that has ended.

    view = RunView.read(Path("runs/quickstart"))       # UserError where it is no run's directory
    view.jobs["summarise"].losses, view.queue, view.events, view.window
    view.refresh()                                     # reads what was added since

status.json must be there; any other file may be missing, as in a run of an earlier version. A file
that cannot be read is named in `unreadable`, and what was known of it stays. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lora.config.yaml_file import parse_yaml
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import check_yaml, unsealed
from megatron_lora.output.final_files import STATUS
from megatron_lora.output.job_view import JobView
from megatron_lora.output.leaderboard import LEADERBOARD
from megatron_lora.output.lock_file import is_in_use
from megatron_lora.output.metrics import metrics_file
from megatron_lora.output.run_files import read_spans, read_windows, window_files

DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
WINDOW_SLOTS = 32  # of a usual window; of slower slots, windows that are bounded in seconds have fewer
QUIET_S = 15.0  # a run whose files are younger is taken for live; its lock is looked at after that
JOB_KEYS = ("max_steps", "num_epochs", "metric", "mode", "priority", "r", "learning_rate", "global_batch_size")
JOB_LINE = re.compile(rf"^(?:- (name)|  ({'|'.join(JOB_KEYS)})): (.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class PlanWindow:
    """A window of the plan, or short ones in a row: slots of (job, step, sample, tokens), which of them evaluate, who joined and left.

    Of those who joined, in front of which of its slots; of those who left, behind how many.
    """

    number: int
    slots: list[list[list[int]]]
    evaluate: frozenset[int] = frozenset()
    joined: dict[str, int] = dataclasses.field(default_factory=dict)
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    names: dict[int, str] = dataclasses.field(default_factory=dict)  # of the jobs' numbers
    num_windows: int = 1
    first: int | None = None  # of the run's slots, its first one, if the file says that

    @property
    def title(self) -> str:
        """Its number, or those of the first and the last of several."""
        return f"window {self.number}" if self.num_windows == 1 else f"windows {self.number} to {self.last}"

    @property
    def last(self) -> int:
        """The number of the last one."""
        return self.number + self.num_windows - 1

    def joined_by(self, after: PlanWindow) -> PlanWindow | None:
        """Return this and the window `after` it as one, if that is as short as a usual one; the first of a run, which all join, stays."""
        if self.number == 0 or len(self.slots) + len(after.slots) > WINDOW_SLOTS:
            return None
        begin = len(self.slots)
        return PlanWindow(
            self.number,
            self.slots + after.slots,
            self.evaluate | {begin + slot for slot in after.evaluate},
            self.joined | {name: begin + slot for name, slot in after.joined.items()},
            self.left | {name: begin + slot for name, slot in after.left.items()},
            self.names | after.names,
            self.num_windows + after.num_windows,
            self.first,
        )

    def tokens(self, slot: int) -> dict[str, int]:
        """Return name -> tokens of the jobs in a slot, in their order there."""
        found: Counter[str] = Counter()
        for job, _, _, tokens in self.slots[slot]:
            found[self.names.get(job, f"job {job}")] += tokens
        return dict(found)


class RunView:
    """A run's directory, read again by `refresh`."""

    def __init__(self, path: Path):
        """Use `read` instead."""
        self.path = path
        self.config: dict[str, Any] = {}  # the run's keys, without jobs
        self.exit_status: int | None = None
        self.reason = ""
        self.jobs: dict[str, JobView] = {}
        self.events: list[dict[str, Any]] = []
        self.queue: list[dict[str, Any]] = []
        self.leaderboards: dict[str, dict[str, Any]] = {}  # of sweeps, by name
        self.accounting: dict[str, dict[str, float]] = {}  # name -> tokens, slots, device_seconds, padding
        self.window: PlanWindow | None = None  # the newest
        self.unreadable: dict[str, str] = {}  # file -> why
        self._seen: dict[str, tuple[int, ...]] = {}  # file -> its inode, size and time of change when it was read
        self._settled: dict[str, str] = {}  # name -> the state in which its metrics were read to their end
        self._events_read = 0

    @classmethod
    def read(cls, path: Path) -> RunView:
        """Read a directory; UserError where it is not that of a run."""
        view = cls(path)
        view.refresh()
        return view

    def refresh(self) -> None:
        """Read what was added or replaced since the last call; of jobs that do not train, no metrics are looked at twice."""
        if not (self.path / STATUS).is_file():
            raise UserError(f"{self.path}: is not the directory of a run (it has no {STATUS}); name a run's output_dir")
        self._if_changed(STATUS, self._read_status)
        if STATUS in self.unreadable and not self.jobs:
            raise UserError(f"{self.path / STATUS}: cannot be read ({self.unreadable[STATUS]}); restore it, or name another run")
        self._if_changed("config.yaml", self._read_config)
        self._if_changed("queue.json", self._read_queue)
        self._if_changed("accounting.json", self._read_accounting)
        self._if_changed(LEADERBOARD, self._read_leaderboards)
        self._if_changed("events.jsonl", self._read_events)
        for name, job in self.jobs.items():
            if job.state == "running" or self._settled.get(name) != job.state:
                self._settled[name] = job.state
                self._guarded(f"jobs/{name}/{job.metrics.name}", job.read)
        self._guarded("plan", self._read_newest_window)

    def _if_changed(self, name: str, read: Callable[[str], None]) -> None:
        """Pass a file's text to `read` if the file is there and has changed."""
        path = self.path / name
        try:
            stat = path.stat()
        except OSError:
            return
        if (seen := (stat.st_ino, stat.st_size, stat.st_mtime_ns)) != self._seen.get(name):
            self._seen[name] = seen
            self._guarded(name, lambda: read(path.read_text(encoding="utf-8")))

    def _guarded(self, name: str, read: Callable[[], None]) -> None:
        self.unreadable.pop(name, None)
        try:
            read()
        except DAMAGED as error:
            self.unreadable[name] = one_line(error, 120)

    def _read_status(self, text: str) -> None:
        status = unsealed(text)
        jobs = {str(name): dict(job) for name, job in status["jobs"].items()}
        for name, recorded in jobs.items():
            job = self.jobs.get(name) or JobView(name, metrics_file(self.path, name))
            job.state, job.reason, job.recorded = str(recorded["state"]), str(recorded.get("reason") or ""), recorded
            self.jobs[name] = job
        self.exit_status, self.reason = status.get("exit_status"), str(status.get("reason") or "")

    def _read_config(self, text: str) -> None:
        self.config, settings = read_config(check_yaml(text), str(self.path / "config.yaml"))
        for name, job in self.jobs.items():
            job.settings = settings.get(name, {})

    def _read_queue(self, text: str) -> None:
        self.queue = [entry for entry in json.loads(text)["queue"] if entry["job"] in self.jobs]

    def _read_accounting(self, text: str) -> None:
        self.accounting = {str(name): dict(used) for name, used in unsealed(text)["jobs"].items()}

    def _read_leaderboards(self, text: str) -> None:
        self.leaderboards = {
            str(name): {**board, "points": [row for row in board["points"] if row["job"] in self.jobs]}
            for name, board in unsealed(text).items()
        }

    def _read_events(self, text: str) -> None:
        """Take the lines that are new: the file only grows, and a line that is being written waits."""
        lines = text.split("\n")[:-1]
        for number, line in enumerate(lines[self._events_read :], self._events_read + 1):
            try:
                self.events.append(dict(unsealed(line)))
            except DAMAGED:
                self.unreadable["events.jsonl"] = f"line {number} is damaged"
        self._events_read = len(lines)

    def _read_newest_window(self) -> None:
        """Read the newest window, which usually is the known one or the one after it, and short ones before it."""
        files, known = self.path / "plan", -1 if self.window is None else self.window.last
        if known >= 0 and (files / f"window-{known:04d}.json").exists():
            while (files / f"window-{known + 1:04d}.json").exists():
                known += 1
            newest = files / f"window-{known:04d}.json"
        else:
            found = window_files(self.path)
            if not found:
                return
            newest = found[-1]
        self._if_changed(f"plan/{newest.name}", lambda text: self._read_windows_before(newest, text))

    def _read_windows_before(self, newest: Path, text: str) -> None:
        window = self._window(newest.name, unsealed(text))
        while (file := newest.with_name(f"window-{window.number - 1:04d}.json")).exists():
            before = self._window(file.name, unsealed(file.read_text(encoding="utf-8"))).joined_by(window)
            if before is None:
                break
            window = before
        self.window = window

    def _window(self, file_name: str, content: dict[str, Any]) -> PlanWindow:
        names = {int(number): str(name) for number, name in (content.get("jobs") or self._first_names).items()}

        def named(entries: Any, slot: int) -> dict[str, int]:
            return {str(entry) if entry in self.jobs else names.get(int(entry), f"job {entry}"): slot for entry in entries or ()}

        slots = [[list(map(int, entry)) for entry in slot] for slot in content["microbatches"]]
        evaluate = frozenset(map(int, content.get("evaluate") or ()))
        number, first = int(file_name.partition(".")[0].rpartition("-")[2]), content.get("slot")
        joined, left = named(content.get("joined"), 0), named(content.get("left"), len(slots))
        return PlanWindow(number, slots, evaluate, joined, left, names, first=None if first is None else int(first))

    @cached_property
    def _first_names(self) -> dict[int, str]:
        """The jobs by their numbers where a window does not say: as the run began with them."""
        try:
            names = unsealed((self.path / "cost.json").read_text(encoding="utf-8"))["jobs"]
        except DAMAGED:
            names = list(self.jobs)
        return dict(enumerate(names))

    def windows(self, since: int = 0) -> list[PlanWindow]:
        """Read the windows of the last start from slot `since` on, up to the first that cannot be read; short ones are joined."""
        windows: list[PlanWindow] = []
        name = "plan"
        try:
            for file_name, text in read_windows(self.path, since):
                name = f"plan/{file_name}"
                window = self._window(file_name, unsealed(text))
                both = windows[-1].joined_by(window) if windows else None
                windows[-1:] = [both] if both else [*windows[-1:], window]
        except DAMAGED as error:
            self.unreadable[name] = one_line(error, 120)
        return windows

    def spans(self) -> dict[int, list[dict]]:
        """Return rank -> what it did when, or nothing where there is no timeline.json yet."""
        try:
            return read_spans(self.path)
        except FileNotFoundError:
            return {}
        except DAMAGED as error:
            self.unreadable["timeline.json"] = one_line(error, 120)
            return {}

    @property
    def tokens(self) -> int:
        """Tokens trained on, of all jobs."""
        return sum(job.tokens for job in self.jobs.values())

    @property
    def layout(self) -> str:
        """The layout in words, such as `pipeline 4 x tensor 2`."""
        parallel = self.config.get("parallel") or {}
        sizes = [f"{name} {parallel[name]}" for name in ("pipeline", "tensor", "data") if parallel.get(name, 1) > 1]
        return " x ".join(sizes) or "one rank"

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return int((self.config.get("parallel") or {}).get("pipeline") or 1)

    def shares(self) -> dict[str, float]:
        """Return every job's share of the predicted device time so far, or of the tokens where that is not accounted for."""
        used = {job: float(entry.get("device_seconds") or 0) for job, entry in self.accounting.items()}
        if not any(used.values()):
            used = {job.name: float(job.tokens) for job in self.jobs.values()}
        total = math.fsum(used.values())
        return {name: used.get(name, 0.0) / total if total else 0.0 for name in self.jobs}

    def seconds(self) -> float | None:
        """Return the seconds that the run has trained, over all of its starts, by its events; None where it has none."""
        starts: dict[int, list[float]] = {}
        for event in self.events:
            if (when := event_time(event)) is not None:
                starts.setdefault(event.get("start", 1), []).append(when.timestamp())
        return sum(max(times) - min(times) for times in starts.values()) or None

    def is_live(self) -> bool:
        """Whether a process still runs it; the lock is looked at only where nothing was written for a while."""
        if self.exit_status is not None:
            return False
        times = [(self.path / STATUS).stat().st_mtime]
        times += [job.metrics.stat().st_mtime for job in self.jobs.values() if job.state == "running" and job.metrics.exists()]
        if time.time() - max(times) < QUIET_S:
            return True
        try:
            return is_in_use(self.path)
        except OSError:  # not ours to lock: what is not known to have ended is taken for live
            return True


def event_time(event: dict[str, Any]) -> datetime | None:
    """Return when an event was, if it says so."""
    try:
        return datetime.fromisoformat(str(event["time"]))
    except (KeyError, ValueError):
        return None


def read_config(text: str, source: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a run's keys, and of each job the JOB_KEYS, whatever version wrote the config.

    The YAML parser takes 5 ms a job, so of a config as runs write it the jobs' lines are read one by one.
    """
    head, mark, tail = text.partition("\njobs:\n- name: ")
    if not mark:
        whole = parse_yaml(text, source)
        if not isinstance(whole, dict):
            raise ValueError("it holds no mapping")
        return whole, {job["name"]: job for job in whole.pop("jobs", None) or []}
    jobs: dict[str, dict[str, Any]] = {}
    job: dict[str, Any] = {}
    for name, key, value in JOB_LINE.findall(f"- name: {tail}"):
        if name:
            job = jobs[value.strip("'\"")] = {}
        else:
            job[key] = _scalar(value)
    top = parse_yaml(head, source)
    return (dict(top) if isinstance(top, dict) else {}), jobs


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("'\"")
