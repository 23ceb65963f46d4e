"""The plan windows and the timeline of a run, as its directory has them.

    window_files(run)[-1]                 # the newest window; one that is planned may not have run yet
    read_windows(run, since=70_000)       # windows that reach beyond that slot, as texts with their names: unsealed(text)["microbatches"]
    read_spans(run)[0]                    # what the first rank did: events with ts and dur in microseconds, cat ("F") and index (a slot)

`plan/` has the newest windows in files of their own, and earlier ones in packed files, which hold the same
texts line by line (planning/plan_feed.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from megatron_lora.files import unpack, unsealed

FIRST_SLOT = re.compile(r'"slot": (\d+)')


def window_files(run: Path) -> list[Path]:
    """Return the files with the windows of the run's last start, in order; one that was packed and not removed yet is left out."""
    packed = sorted((run / "plan").glob("windows-*.jsonl.gz"), key=_last_window)
    after = _last_window(packed[-1]) if packed else -1
    single = sorted((run / "plan").glob("window-*.json"), key=lambda file: (len(file.name), file.name))
    return [*packed, *(file for file in single if not packed or _last_window(file) > after)]


def read_windows(run: Path, since: int = 0) -> list[tuple[str, str]]:
    """Return name and text of the windows of the last start in order, from one that begins at slot `since` or earlier.

    Raises OSError or ValueError where a file cannot be read.
    """
    found: list[tuple[str, str]] = []
    for file in reversed(window_files(run)):
        try:
            texts = _texts(file)
        except FileNotFoundError:  # it was packed meanwhile
            return read_windows(run, since)
        found = texts + found
        begin = FIRST_SLOT.search(texts[0][1]) if texts else None
        if begin and int(begin[1]) <= since:
            break
    return found


def read_spans(run: Path) -> dict[int, list[dict]]:
    """Return rank -> its spans; OSError, ValueError, KeyError, TypeError or IndexError where timeline.json cannot be read."""
    spans: dict[int, list[dict]] = defaultdict(list)
    for event in unsealed((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] == "X":
            spans[event["tid"]].append(event | {"index": int(event["name"].split()[-1])})
    return dict(sorted(spans.items()))


def _last_window(file: Path) -> int:
    return int(file.name.partition(".")[0].rpartition("-")[2])


def _texts(file: Path) -> list[tuple[str, str]]:
    if file.suffix != ".gz":
        return [(file.name, file.read_text(encoding="utf-8", errors="replace").rstrip("\n"))]
    lines = unpack(file)
    first = _last_window(file) + 1 - len(lines)
    return [(f"window-{number:04d}.json", line.decode(errors="replace")) for number, line in enumerate(lines, first) if line]
