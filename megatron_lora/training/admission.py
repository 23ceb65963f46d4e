"""Which jobs of the queue join next, and who makes room for them (control.py)."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from megatron_lora.output.events import Change
from megatron_lora.planning.adapter_rows import Book, Waiting, admit
from megatron_lora.training.run_job import Entry

MOST_USEFUL = 64  # residents, where fewer keep all stages busy
READ_AHEAD = 16  # jobs that are read and wait for rows


def in_order(entries: Iterable[Entry], rungs: Mapping[str, int]) -> list[Entry]:
    """Return the jobs that could join if there were rows; a point that has passed more `rungs` comes first."""
    return sorted((entry for entry in entries if entry.can_join), key=lambda e: (-rungs.get(e.name, 0), e.since))


def join(entries: Collection[Entry], rungs: Mapping[str, int], changed: Collection[str], book: Book, gap: int) -> list[str]:
    """Return the names of those of the queue, in its order, that join now, none who has just `changed`; their rows are taken."""
    num_residents = sum(entry.resident and not entry.rests for entry in entries)
    ready = [entry for entry in in_order(entries, rungs) if entry.name not in changed]
    named = {entry.name: entry for entry in ready}
    waiting = [Waiting(entry.name, entry.config, entry.passed) for entry in ready]
    joined = admit(book, waiting[: max(0, max(MOST_USEFUL, 4 * gap) - num_residents)])
    for each in waiting:
        named[str(each.job)].passed = each.passed
    return [str(name) for name, _ in joined]


def make_room(entries: Collection[Entry], joined: Collection[str], limit_s: float | None, changed: Collection[str]) -> list[Change]:
    """Return who is parked for jobs that wait: all that rest at a rung, and for one that has waited for `limit_s` one that trains."""
    late = next((entry for entry in entries if entry.can_join and entry.name not in joined and entry.name not in changed), None)
    if late is None:
        return []
    resting = [entry.name for entry in entries if entry.rests and entry.drained and entry.name not in changed]
    if resting:
        return [Change(event="parked", job=name, details={"reason": f"{late.name} waits for rows"}) for name in resting]
    found = furthest_past_its_share(entries, limit_s, changed)
    why = found and f"{found[1].name} has waited for more than {limit_s:g} s"
    return [Change(event="parked", job=found[0].name, details={"reason": why})] if found else []


def to_read(entries: Collection[Entry]) -> list[Entry]:
    """Return the next jobs of the queue to be read: with those that are ready, READ_AHEAD of them."""
    num_ready = sum(entry.waits and entry.is_read for entry in entries)
    unread = [entry for entry in entries if entry.waits and not entry.is_read]
    return sorted(unread, key=lambda entry: entry.since)[: max(0, READ_AHEAD - num_ready)]


def may_rest(entry: Entry, entries: Iterable[Entry]) -> bool:
    """Whether a job that is at a rung keeps its rows: no job waits for some, and no references of its later steps are wanted."""
    return entry.config.reference is None and not any(other.waits for other in entries)


def furthest_past_its_share(entries: Iterable[Entry], limit_s: float | None, changed: Collection[str]) -> tuple[Entry, Entry] | None:
    """Return who makes room for a job that has waited for `limit_s`, and that job: the resident that has used most for its priority."""
    entries, now = list(entries), time.monotonic()
    if limit_s is None or any(entry.leaving == "queued" for entry in entries):
        return None
    late = [entry for entry in entries if entry.can_join and now - entry.since_s > limit_s]
    residents = [entry for entry in entries if entry.resident and entry.leaving is None and entry.name not in changed]
    rested = [entry for entry in residents if late and now - entry.since_s > limit_s]
    if not rested:
        return None
    furthest = max(rested, key=lambda entry: (entry.used / entry.config.priority, -entry.number))
    return furthest, min(late, key=lambda entry: entry.since)
