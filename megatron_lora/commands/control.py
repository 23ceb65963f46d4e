"""`pause`, `resume`, `cancel` and `set`: requests to a run, checked at once, and what the run says to them.

A request is a file (output/requests.py). A live run takes it when it plans its next window; a run
without a process takes it when it is started again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lora.config.rules import show
from megatron_lora.config.schema import load_config
from megatron_lora.config.yaml_file import parse_yaml
from megatron_lora.errors import UserError, one_line
from megatron_lora.output.changes import Run, decide
from megatron_lora.output.events import Event, read_events
from megatron_lora.output.final_files import STATUS
from megatron_lora.output.lock_file import is_in_use
from megatron_lora.output.requests import Request, RequestFolder, new_request, write_request
from megatron_lora.output.run_directory import as_left, job_states

WAIT_S = 10.0  # windows of the plan are about half as long, and one is planned ahead
LOOK_S = 0.1


class OpenRun(NamedTuple):
    """A run's directory, and the run as its events and the requests that wait leave it."""

    path: Path
    run: Run


def open_run(run_path: str) -> OpenRun:
    """Read a run's directory; UserError where it is not that of a run of this version."""
    path = Path(run_path)
    try:
        if not (path / STATUS).is_file():
            raise UserError(f"it has no {STATUS}")
        config = dataclasses.replace(load_config(path / "config.yaml"), output_dir=run_path)
        recorded = job_states(path)
    except UserError as error:
        raise UserError(f"{run_path}: is not the directory of a run of this version ({error}); name a run's output_dir") from None
    # Paused on request is what events say. status.json has the same word for a job of a run that was stopped.
    states = {name: "queued" if state == "paused" else state for name, state in recorded.items()}
    return OpenRun(path, as_left(path, config, states))


def control(run_path: str, verb: str, words: Sequence[str], wait: bool) -> int:
    """Ask a run to pause, resume, cancel or set jobs; `words` are names, and key=value for set. Returns 0."""
    names, values = _split(words) if verb == "set" else (list(words), {})
    opened = open_run(run_path)
    return send(opened, new_request(verb, names=names, values=values), wait)


def send(opened: OpenRun, request: Request, wait: bool) -> int:
    """Leave a request to a run, once it is checked against its jobs; with `wait` see what the run says. Returns 0."""
    decide(request, opened.run)
    write_request(opened.path, request)
    print(follow(opened.path, request, WAIT_S if wait else 0.0))
    return 0


def follow(path: Path, request: Request, seconds: float) -> str:
    """Return what became of a request within some seconds, in a line for each job; UserError where the run refused it."""
    folder, end = RequestFolder(path), time.monotonic() + seconds
    is_live = _is_live(path)
    while is_live and folder.waits(request) and time.monotonic() < end:
        time.sleep(LOOK_S)
    if not folder.waits(request):
        if (reason := folder.reason_of(request)) is not None:
            raise UserError(reason)
        events = [event for event in read_events(path) if event.id == request.id]
        return "\n".join(map(_in_words, events)) or f"{request.file_name}: was removed from {folder.path} before the run took it"
    if not _is_live(path):
        return f"no process holds {path}: the request is kept, and takes effect when the run is started again"
    return f"requested: the run takes it when it plans its next window ({folder.path / request.file_name})"


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split what stands after `set RUN` into names and values; UserError where one of the two is missing."""
    names = [word for word in words if "=" not in word]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if equals and (not text.strip() or key in values):
            raise UserError(f"{show(word)}: {'has no value' if not text.strip() else 'is given twice'}; write key=value once, or key=null")
        if equals:
            values[key] = parse_yaml(text, f"value {one_line(repr(word), 120)}")
    if not names or not values:
        raise UserError("set: needs at least one job and one key=value, as in: megatron-lora set RUN NAME priority=2")
    return names, values


def _is_live(path: Path) -> bool:
    try:
        return is_in_use(path)
    except OSError:  # not ours to lock
        return True


def _in_words(event: Event) -> str:
    done = f"{event.details['key']} is {show(event.details['value'])}" if event.event == "set" else event.event
    return f"{event.job}: {done}, from window {event.window} on (slot {event.slot})"
