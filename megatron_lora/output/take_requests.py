"""Takes the requests that wait: writes their events, then removes them; a kill in between loses none and applies none twice.

Per request, in this order: it is decided (changes.py), its events are written and synced, its file is
removed. A kill before the events leaves the request; one after them leaves a request whose id is in
events.jsonl, which is removed when requests are taken again. What follows from the events
(config.yaml, status.json, the plan) is up to the caller, and is derived from them at the next start.

    taken = take_requests(RequestFolder(output_dir), log, run, window=7, slot=224)
    for line in taken.lines: print(line, file=sys.stderr)
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_lora.errors import UserError
from megatron_lora.output.changes import Run, decide, then
from megatron_lora.output.events import Event, EventLog
from megatron_lora.output.requests import RequestFolder


class Taken(NamedTuple):
    """The run after the requests, their events, and lines for the user on what was refused or removed."""

    run: Run
    events: list[Event]
    lines: list[str]


def take_requests(folder: RequestFolder, log: EventLog, run: Run, *, window: int, slot: int) -> Taken:
    """Take all requests that wait, in their order; they take effect in front of a slot, which begins a window."""
    requests, lines = folder.take(log.ids)
    taken: list[Event] = []
    for request in requests:
        try:
            changes = decide(request, run)
        except UserError as error:
            lines.append(folder.refuse(request, str(error)))
            continue
        taken += log.append(changes, window=window, slot=slot, id=request.id)
        run = then(run, changes)
        folder.remove(request)
    return Taken(run, taken, lines)
