"""events.jsonl: what changed a run's set of jobs, a job's state or its settings, and from where in the plan it takes effect.

The file is a write-ahead log. The lines of a request are written and synced before anything else
changes, in one write; what follows from them (config.yaml, status.json, the plan) is derived from
them again after a crash (changes.py). A request whose id is in the file is never applied again.

    {"seq": 4, "time": "...", "start": 1, "window": 7, "slot": 224, "id": "9f..", "event": "paused", "job": "a", "reason": "on request"}

`seq` counts from 1. `start` counts the starts of the run, `window` the windows of that start, and
`slot` its slots; an event takes effect in front of them. `more` says how many lines of the same
write follow: a write that a crash cut off is dropped as a whole. Each line is sealed (files.py). A start is counted once a job has
`started` in it, so the trainer writes that event for every job that it plans, resumed ones too.

    log = EventLog(output_dir)
    log.append([Change(event="paused", job="a")], window=7, slot=224, id=request.id)
    Replay(output_dir).events(window=7)          # what took effect there
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import sealed, sync, unsealed

EVENTS_FILE = "events.jsonl"
REPLAYED = ("added", "started", "promoted", "paused", "resumed", "cancelled", "set", "parked", "stopped", "failed")
EVENTS = (*REPLAYED, "done")  # done follows from the plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to a job. `details`: `config` of an added job, `key` and `value` of set, `step`, `reason`."""

    event: str
    job: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event(Change):
    """A change, and from where it takes effect; `id` is that of the request, if there was one."""

    seq: int
    time: str
    start: int
    window: int
    slot: int
    id: str | None = None


PLACES = {"seq": int, "time": str, "start": int, "window": int, "slot": int, "id": (str, type(None)), "event": str, "job": str}


def utc_now() -> str:
    """Return the time in ISO 8601, in UTC and to the microsecond; later times are greater."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class EventLog:
    """The events of a run, by its one process that may write them."""

    def __init__(self, output_dir: Path):
        """Read the file, if there is one, and cut off a write that was not completed; UserError for any other damage."""
        self.path = output_dir / EVENTS_FILE
        self.events, self._size = _read(self.path)  # as they are now; those of a run of weeks are not kept
        self._num_events = len(self.events)
        self.start = 1 + max((event.start for event in self.events if event.event == "started"), default=0)
        self.ids = {event.id for event in self.events if event.id is not None}

    def append(self, changes: Sequence[Change], *, window: int, slot: int, id: str | None = None) -> list[Event]:
        """Write changes that take effect together, and return their events; when this returns they are on the disk."""
        place = {"time": utc_now(), "start": self.start, "window": window, "slot": slot, "id": id}
        first = 1 + self._num_events
        events = [
            Event(seq=first + i, event=change.event, job=change.job, details=change.details, **place) for i, change in enumerate(changes)
        ]
        text = "".join(_line(event, len(events) - 1 - i) for i, event in enumerate(events)).encode()
        is_new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self._size)
            written = file.write(text)
            if written != len(text):  # mostly a full disk
                file.truncate(self._size)
                raise OSError(f"{self.path}: {written} of {len(text)} bytes were written")
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        self._size += len(text)
        self._num_events += len(events)
        if id is not None:
            self.ids.add(id)
        return events


def read_events(output_dir: Path) -> list[Event]:
    """Return a run's events, without a last write that was cut off; UserError names the line of any other damage."""
    return _read(output_dir / EVENTS_FILE)[0]


class Replay:
    """What took effect at each window of one start of a run, from its events alone."""

    def __init__(self, output_dir: Path, start: int = 1):
        """Read the events of a start; UserError where the file is damaged, or has none."""
        self._events: dict[int, list[Event]] = {}
        for event in read_events(output_dir):
            if event.start == start and event.event in REPLAYED:
                self._events.setdefault(event.window, []).append(event)
        if not self._events:
            raise UserError(f"{output_dir / EVENTS_FILE}: has no events of start {start}; name the output_dir of a run that has trained")
        self.last_window = max(self._events)  # in front of which anything took effect

    def events(self, window: int) -> tuple[Event, ...]:
        """Return the events that took effect in front of a window, in their order."""
        return tuple(self._events.get(window, ()))

    def starts_after(self, window: int) -> list[str]:
        """Return the names of the jobs that started behind a window, in their order."""
        return [event.job for at in sorted(self._events) if at > window for event in self._events[at] if event.event == "started"]


def _line(event: Event, num_more: int) -> str:
    fields: dict[str, Any] = {name: getattr(event, name) for name in PLACES}
    return sealed(json.dumps(fields | ({"more": num_more} if num_more else {}) | dict(event.details)))


def _read(path: Path) -> tuple[list[Event], int]:
    """Return the events of a file's complete writes, and the bytes that these take; none for a file that is not there."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    events, size, num_complete, position, expected = [], 0, 0, 0, 0
    for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last line break was cut off
        try:
            event, num_more = _parse(line, number)
            if expected and num_more != expected - 1:
                raise ValueError("other lines of its write are missing")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is no event ({one_line(error, 120)}); restore the file") from None
        events.append(event)
        position, expected = position + len(line) + 1, num_more
        if not num_more:
            size, num_complete = position, number
    return events[:num_complete], size


def _parse(line: bytes, number: int) -> tuple[Event, int]:
    """Return the event of line `number`, and how many lines of its write follow; ValueError, TypeError or KeyError where it is none."""
    fields = unsealed(line.decode())
    place = {name: fields.pop(name) for name in PLACES}
    num_more = fields.pop("more", 0)
    for name, value in (*place.items(), ("more", num_more)):
        if not isinstance(value, PLACES.get(name, int)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")
    if place["seq"] != number or min(place["start"] - 1, place["window"], place["slot"], num_more) < 0:
        raise ValueError("its numbers are out of order")
    if place["event"] not in EVENTS:
        raise ValueError(f"{place['event']!r} is no event of this version")
    return Event(details=fields, **place), num_more
