"""The first rank's control of a live run: which jobs join, leave, wait, are read, and what users ask for.

It is the director of the plan feed (planning/plan_feed.py), whose thread asks it before each window:

    1  rows of jobs that have drained are free again        4  jobs that wait in the queue join, in its order, where rows are free
    2  failures, early ends and written checkpoints         5  the next ones in the queue are read
    3  requests of users (output/requests.py)               6  where one does not fit though rows are free, residents move

What it decides is written to events.jsonl before it takes effect, so a run can be explained, and
repeated: with a Replay the events come from an earlier run, and nothing else decides.

A job joins where its adapter fits and while another resident still pays (admission.py): up to MOST_USEFUL
of them, or four times as many as keep all stages busy where that is more.
"""

from __future__ import annotations

import math
import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import JobConfig
from megatron_lora.output.changes import Run, then
from megatron_lora.output.events import Change, Event, EventLog, Replay, utc_now
from megatron_lora.output.job_states import OVER
from megatron_lora.output.queue_file import Waiting as QueueEntry
from megatron_lora.output.queue_file import write_queue
from megatron_lora.output.requests import RequestFolder
from megatron_lora.output.standing import resume_point_of
from megatron_lora.output.take_requests import take_requests
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.planning.plan_feed import Asked, Planned
from megatron_lora.training import admission
from megatron_lora.training.accounts import Accounts
from megatron_lora.training.job_reader import JobReader
from megatron_lora.training.run_job import Entry, RunFiles, misfits
from megatron_lora.training.sweeps import Sweeps
from megatron_lora.training.window_changes import Continuing, Joining, Leaving, Places, WindowChanges
from scheduling.types import Ending

IDLE_S = 0.2  # between windows where nothing trains
STATE_AFTER = {"resumed": "queued", "parked": "queued"} | {state: state for state in ("paused", *OVER)}  # of a job, by event


class Control:
    """Decides what changes with each window."""

    def __init__(
        self,
        output_dir: Path,
        run: Run,
        book: Book,
        reader: JobReader,
        *,
        read: Collection[str],
        begun: Collection[str],
        gap: int,
        check_fits: Callable[[JobConfig], None] = lambda job: None,
        complete: Callable[[JobConfig], JobConfig] = lambda job: job,
        num_devices: int = 1,
        deterministic: bool = False,
        keep_alive: bool = False,
        max_wait_s: float | None = None,
        replay: Replay | None = None,
    ):
        """Begin with the jobs of `run` that are not over: in the queue unless they are paused, those named in `read` ready to join.

        Jobs that have `begun` come first in the queue. `check_fits(job)` raises UserError for one that
        could never have rows; `complete(job)` says of one that was added what it leaves to the base model.
        """
        self.output_dir = output_dir
        self.run = run
        self.book = book
        self.reader = reader
        self.gap = gap
        self.check_fits = check_fits
        self.complete = complete
        self.deterministic = deterministic
        self.keep_alive = keep_alive
        self.max_wait_s = max_wait_s
        self.replay = replay
        self.log = EventLog(output_dir)
        self.folder = RequestFolder(output_dir)
        self.accounts = Accounts(output_dir, self.log.start, num_devices)
        self.sweeps = Sweeps(output_dir, self.log.events if replay is None else (), run.config.jobs)
        self.num_jobs = len(run.config.jobs)
        self.entries: dict[str, Entry] = {}
        for number, config in sorted(enumerate(run.config.jobs), key=lambda item: item[1].name not in begun):
            state = run.states.get(config.name, "queued")
            if state not in OVER:
                entry = Entry(number=number, config=config, state=state, is_read=config.name in read)
                entry.at_rung = self.sweeps.is_at_rung(config.name)
                entry.left_after = resume_point_of(output_dir / "jobs" / config.name).step if entry.at_rung else 0
                self.entries[config.name] = entry
        self.window, self.slot = 0, 0  # the next window, and its first slot
        self.index = 0  # of that slot, among those that have a backward
        self.recent: list[tuple[int, Ending]] = []  # endings of steps whose STEP is still to come, with their index
        self.changes = WindowChanges()
        self.continued: list[Continuing] = []  # with the next window
        self.left: dict[int, Leaving] = {}  # with the next window, from the rungs where they rest
        self.news: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()  # (what, job, reason)
        self.later: deque[tuple[int, Callable[[RunFiles], None]]] = deque()  # what the training thread writes, by window
        self.shown: object = None

    def tell(self, what: str, name: str, reason: str = "") -> None:
        """Take note, in any thread, of a job that is "failed", "stopped" or "done", is to be "paused", or who is "saved" or "exported"."""
        self.news.put((what, name, reason))

    def finish(self) -> None:
        """Write the last news; after the run's last report."""
        over = [told for told in self._take_news() if told[0] in OVER]  # who is to be paused now was stopped with the run
        for event in self._write_news(over):
            self.entries.pop(event.job, None)
        self.sweeps.hear(self.slot)
        self.run = replace(self.run, states={**self.run.states, **{name: what for what, name, _ in over}})
        self._show()
        self.accounts.write(ended=True)
        self.reader.close()

    def write_later(self, files: RunFiles, num_begun: float = math.inf) -> None:
        """Write what changed with the first `num_begun` windows; where they begin, so that a run that is repeated does it there too."""
        while self.later and self.later[0][0] < num_begun:
            self.later.popleft()[1](files)

    def ask(self, window: int, slot: int) -> Asked | None:
        """Return what changes with the next window; None where the run ends."""
        self.window, self.slot = window, slot
        self.accounts.write()
        self.continued, self.left = [], {}
        freed = self._free()
        self.sweeps.hear(slot)
        events = self._happened() if self.replay is None else self._repeated(self.replay)
        self._add([event.job for event in events if event.event == "added"])
        self._promote(events)
        joined = [self._join(event.job) for event in events if event.event == "started"]
        leave: dict[int, bool] = {}
        for event in events:
            if event.event in STATE_AFTER:
                self._change(event, STATE_AFTER[event.event], leave)
        configs = self._set({event.job for event in events if event.event == "set"})
        self._read_ahead()
        self._show()
        if not any(entry.resident and not entry.rests for entry in self.entries.values()):
            if not (freed or joined or self._goes_on()):
                return None
            if not freed and self.replay is None:
                time.sleep(IDLE_S if not any(entry.rests for entry in self.entries.values()) else IDLE_S / 10)
        self.changes = WindowChanges(freed=freed, joined=joined, continued=self.continued, left=self.left, configs=configs)
        planned = {entry.number for entry in self.entries.values() if entry.resident and not entry.departed}
        priorities = {number: config.priority for number, config in configs.items() if number in planned}
        return Asked(changes=self.changes, leave=leave, priorities=priorities)

    def planned(self, planned: Planned) -> tuple[WindowChanges, frozenset[tuple[int, int]], dict[str, Any]]:
        """Complete the changes of the window that was planned; choose who moves, so that a job that waits fits.

        Returns the changes, the moves, and what the window's file says: who the numbers are, who joins, and who departs.
        """
        residents = {entry.number: entry for entry in self.entries.values() if entry.resident}
        first = self.index
        for microbatch, ended in zip(planned.stream, planned.ended, strict=True):
            for segment in microbatch.segments:
                residents[segment.job].last_index = self.index  # of an evaluation slot: where its sums are sent
            if not microbatch.evaluate:
                self.recent += [(self.index, ending) for ending in ended if not ending.evaluation]
                self.index += 1
        for number, used in planned.used.items():
            residents[number].used += used.time
        self.accounts.plan(self.window, {residents[number].name: used for number, used in planned.used.items()})
        left = dict(self.changes.left)
        for number, step in planned.left.items():
            entry = residents[number]
            entry.at_rung = number in planned.at_rung
            if entry.at_rung and entry.leaving is None and admission.may_rest(entry, self.entries.values()):
                entry.left_after = step
                continue
            assert entry.leaving is not None or entry.at_rung, f"job {number} has left unasked"
            entry.leaving = entry.leaving or "queued"
            left[number] = Leaving(step=step, state=entry.leaving)
            entry.saved, entry.left_after = not left[number].saves, step
        for number in planned.departed:
            entry = residents[number]
            entry.departed = True
            if number not in left and not entry.rests and entry.leaving not in OVER:
                entry.leaving = "done"  # what was asked came too late
        moves = self._moves({ending.job: ending.step for index, ending in self.recent if first <= index + self.gap < self.index})
        self.recent = [(index, ending) for index, ending in self.recent if index + self.gap >= self.index]
        told = {
            "jobs": {number: entry.name for number, entry in residents.items()},
            "joined": [joining.config.name for joining in self.changes.joined],
            "left": [residents[number].name for number in sorted(planned.departed | left.keys()) if not residents[number].rests],
        }
        return replace(self.changes.as_used_by(planned.stream), left=left, moves=moves), frozenset(moves), told

    def _free(self) -> list[int]:
        """Give back the rows of jobs that have drained; they are over, or wait now."""
        self.book.finish_moves()
        freed = []
        for entry in list(self.entries.values()):
            if not (entry.resident and entry.departed) or (entry.last_index is not None and self.index <= entry.last_index + self.gap):
                continue
            entry.drained = True
            if entry.rests:
                continue
            self.book.give_back(entry.name)
            freed.append(entry.number)
            if entry.leaving in OVER:
                del self.entries[entry.name]
            else:
                assert entry.leaving is not None
                entry.state, entry.leaving, entry.resident, entry.departed, entry.drained = entry.leaving, None, False, False, False
                entry.last_index, entry.used, entry.since, entry.since_s = None, 0.0, utc_now(), time.monotonic()
        return freed

    def _goes_on(self) -> bool:
        """Whether more may happen where no job is resident; what is repeated ends with the last event."""
        if self.replay is not None:
            return self.window < self.replay.last_window
        return self.keep_alive or any(entry.waits or entry.held or entry.rests for entry in self.entries.values())

    # What happens -------------------------------------------------------------------------------------------------------------

    def _happened(self) -> list[Event]:
        """Return what happens now, written to events.jsonl: news of jobs, requests, jobs that park or join."""
        told = self._take_news() + self._take_read() + misfits(self.entries.values(), self.check_fits)
        events = self._write_news(told)
        self.run = replace(self.run, states={**self.run.states, **{name: what for what, name, _ in told}})
        self.run, requested, lines = take_requests(self.folder, self.log, self.run, window=self.window, slot=self.slot)
        self._say(lines)
        changed = {event.job for event in (*events, *requested)}  # who was resumed just now waits for the next window
        judged = self._write(self.sweeps.decide({name: e for name, e in self.entries.items() if name not in changed}))
        self._promote(judged)
        self.run = then(self.run, judged)
        entries = list(self.entries.values())
        joined = admission.join(entries, self.sweeps.rungs, changed, self.book, self.gap)
        parked = admission.make_room(entries, joined, self.max_wait_s, changed)
        started = [Change(event="started", job=name) for name in joined]
        return [*events, *requested, *judged, *self._write([*parked, *started])]

    def _write(self, changes: Sequence[Change], id: str | None = None) -> list[Event]:
        return self.log.append(changes, window=self.window, slot=self.slot, id=id) if changes else []

    def _write_news(self, told: Sequence[tuple[str, str, str]]) -> list[Event]:
        return self._write([Change(event=what, job=name, details={"reason": reason}) for what, name, reason in told])

    def _say(self, lines: Sequence[str]) -> None:
        for line in filter(None, lines):
            print(f"megatron-lora: {line}", file=sys.stderr, flush=True)

    def _repeated(self, replay: Replay) -> list[Event]:
        """Return what happened at this window in the run that is repeated, written to events.jsonl as there; requests are refused."""
        self._write_news(self._take_news())
        requests, lines = self.folder.take(self.log.ids)
        self._say(lines + [self.folder.refuse(request, "this run repeats another, so nothing else changes it") for request in requests])
        events = [event for each in replay.events(self.window) for event in self._write([each], each.id)]
        self.run = then(self.run, events)
        return events

    def _promote(self, events: Sequence[Event]) -> None:
        """Let the points that were promoted join again, or continue where they rest."""
        for name in self.sweeps.note(events):
            entry = self.entries[name]
            if entry.rests:
                rungs = self.sweeps.rungs[name]
                self.continued.append(Continuing(number=entry.number, step=entry.left_after, rungs=rungs))
                entry.departed = entry.drained = entry.exported = False
            entry.at_rung = False

    def _take_news(self) -> list[tuple[str, str, str]]:
        """Return who is over, with the reasons, and note whose checkpoint is written; of a run that is repeated, who is done."""
        told = []
        for what, name, reason in [self.news.get() for _ in range(self.news.qsize())]:
            if what == "paused":
                entry = self.entries.get(name)
                if self.replay is None and entry is not None and entry.resident and entry.leaving is None:
                    told.append((what, name, reason))
            elif what == "done" or (what not in ("saved", "exported") and self.replay is None):
                told.append((what, name, reason))
            elif what == "exported" and name in self.entries:
                self.entries[name].exported = True
            elif what == "saved" and name in self.entries:
                entry = self.entries[name]
                entry.saved = True
                state = entry.leaving or entry.state
                if state in ("queued", "paused") and state != reason:  # a user may have asked for something else in the meantime
                    words = (name, state, self.run.reasons.get(name, ""))
                    self.later.append((self.window, lambda files, words=words: files.set_state(*words)))
        return told

    def _take_read(self) -> list[tuple[str, str, str]]:
        """Note which jobs were read; return those that cannot be, with the reasons."""
        answers = {name: fault for name, fault in self.reader.answers().items() if name in self.entries}
        for name in answers:
            self.entries[name].is_read = True
        return [("failed", name, fault) for name, fault in answers.items() if fault is not None]

    # What follows from it -----------------------------------------------------------------------------------------------------

    def _add(self, names: Sequence[str]) -> None:
        """Queue jobs that were added."""
        self.run = self.run.with_jobs(lambda job: self.complete(job) if job.name in names else job)
        added = [job for job in self.run.config.jobs if job.name in names]
        for config in added:
            self.entries[config.name] = Entry(number=self.num_jobs, config=config)
            self.num_jobs += 1
        self.sweeps.add(added)
        if added:
            self.later.append((self.window, lambda files: files.add_jobs(added)))

    def _join(self, name: str) -> Joining:
        """Make a job resident; one that is repeated is waited for until it is read and its checkpoint written."""
        entry = self.entries[name]
        while not (entry.is_read and (entry.saved or resume_point_of(self.output_dir / "jobs" / name).step >= entry.left_after)):
            assert self.replay is not None
            self._read_ahead()
            time.sleep(IDLE_S / 10)
            self._take_news()
            self._take_read()
        places = self.book.residents[name].places if name in self.book.residents else self.book.take(name, entry.config)
        assert places is not None, f"{name} does not fit where it did in the run that is repeated"
        entry.resident, entry.state, entry.passed, entry.since_s = True, "running", 0, time.monotonic()
        self.run = replace(self.run, states={**self.run.states, name: "running"})
        point = resume_point_of(self.output_dir / "jobs" / name)
        rungs = self.sweeps.rungs.get(name, 0)
        return Joining(number=entry.number, config=entry.config, point=point, places=places, rungs=rungs)

    def _change(self, event: Event, state: str, leave: dict[int, bool]) -> None:
        """Have a job leave, wait again, or be over."""
        self.run = replace(self.run, states={**self.run.states, event.job: state})
        entry, reason = self.entries.get(event.job), event.details.get("reason", "")
        if entry is None:
            return
        if not entry.resident:
            entry.state, entry.since, entry.since_s = state, utc_now(), time.monotonic()
        elif entry.leaving is None and event.event != "resumed":
            if entry.rests:
                self.left[entry.number] = leaving = Leaving(step=entry.left_after, state=state)
                entry.saved = not leaving.saves
            entry.leaving = state
            noticed = self.deterministic and event.id is None and state in OVER  # when that is depends on time: it trains to its end
            if not entry.departed and state != "done" and not noticed:
                leave[entry.number] = state not in OVER
        elif entry.leaving in ("paused", "queued"):  # on its way out already
            entry.leaving = state
        elif event.id is not None and entry.leaving in ("done", "stopped"):
            print(f"megatron-lora: {entry.name}: all of its steps were planned when it was {event.event}, so it ends", flush=True)
            return
        if (state in OVER and (event.id is not None or "rung" in event.details)) or (not entry.resident and state != "done"):
            self.later.append((self.window, lambda files: files.set_state(entry.name, state, reason)))  # else the training thread does it
        if state in OVER and not entry.resident:
            del self.entries[entry.name]

    def _set(self, names: Collection[str]) -> dict[int, JobConfig]:
        """Take the keys that were set; return the configs of these jobs."""
        configs = {}
        for job in self.run.config.jobs:
            if job.name in names and job.name in self.entries:
                self.entries[job.name].config = configs[self.entries[job.name].number] = job
        return configs

    def _moves(self, stepping: dict[int, int]) -> dict[tuple[int, int], Places]:
        """Return (job, step) -> places of moves after the last `stepping` steps, job -> step, so that the first job that waits fits."""
        later = None if self.replay is None else self.replay.starts_after(self.window)  # for whom there was room
        named = [self.entries[name] for name in later or () if name in self.entries]
        coming = admission.in_order(self.entries.values(), self.sweeps.rungs) if later is None else named
        blocked = [entry for entry in coming if not entry.resident][:1]
        names = {entry.name: entry.number for entry in self.entries.values() if entry.number in stepping and entry.leaving is None}
        if not blocked or not names or self.book.left:
            return {}
        moves = self.book.compact(names.keys(), blocked[0].config) or {}
        for name, places in moves.items():
            self.book.move(name, places)
        return {(names[str(name)], stepping[names[str(name)]]): places for name, places in moves.items()}

    # The queue ----------------------------------------------------------------------------------------------------------------

    def _read_ahead(self) -> None:
        """Have the next jobs of the queue read."""
        for entry in admission.to_read(self.entries.values()):
            if entry.name not in self.reader.asked:
                self.reader.ask(entry.config)

    def _show(self) -> None:
        """Write queue.json where it has changed."""
        resident = [entry.name for entry in self.entries.values() if entry.resident]
        self.sweeps.write(self.run.states)
        waiting = sorted((e for e in self.entries.values() if e.waits or e.held), key=lambda e: (e.held, e.since))
        queued = [QueueEntry(e.name, e.since, e.waits_for) for e in waiting]
        if (resident, queued) != self.shown:
            self.shown = (resident, queued)
            write_queue(self.output_dir, *self.shown)
