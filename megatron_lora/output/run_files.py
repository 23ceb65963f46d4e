"""The plan windows and the timeline of a run, as its directory has them.

window_files(run)[-1]       # the newest window; one that is planned may not have run yet
read_spans(run)[0]          # what the first rank did: events with ts and dur in microseconds, cat ("F") and index (a slot)
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from megatron_lora.files import unsealed


def window_files(run: Path) -> list[Path]:
    """Return the files of the windows of the run's last start, in order."""
    return sorted((run / "plan").glob("window-*.json"), key=lambda file: (len(file.name), file.name))


def read_spans(run: Path) -> dict[int, list[dict]]:
    """Return rank -> its spans; OSError, ValueError, KeyError, TypeError or IndexError where timeline.json cannot be read."""
    spans: dict[int, list[dict]] = defaultdict(list)
    for event in unsealed((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] == "X":
            spans[event["tid"]].append(event | {"index": int(event["name"].split()[-1])})
    return dict(sorted(spans.items()))
