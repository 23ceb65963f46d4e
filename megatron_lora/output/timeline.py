"""What ran when on each stage, in Chrome trace format (opens in Perfetto).

On a GPU spans are measured with CUDA events, and nothing is synchronised until the end; on CPU with
the host clock. Of a long run the last MAX_SPANS spans of each rank are kept, and ALL_SPANS in all. CUDA gives the time
between two events in float32 milliseconds, which is inexact over hours, so each span is measured
from the one before it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_lora.files import sealed, write_atomically

MAX_SPANS, ALL_SPANS = 100_000, 800_000  # of 125 bytes in the file


class Timeline:
    """One rank's spans, one after another; they do not nest."""

    def __init__(self, device: torch.device, max_spans: int = MAX_SPANS, on_begin: Callable[[str, int], None] = lambda name, index: None):
        """Record the spans of a rank's device; `on_begin(name, index)` is called where one begins."""
        self.on_begin = on_begin
        self.cuda = device.type == "cuda"
        self.spans: deque[tuple[str, int, Any, Any]] = deque(maxlen=max_spans)
        self.origin_s = time.time()  # ranks of one host share this clock
        self.origin = self._now()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str, index: int = 0) -> Iterator[None]:
        """Record the time that the block takes on the device, without waiting for it."""
        self.on_begin(name, index)
        start = self._now()
        yield
        self.spans.append((name, index, start, self._now()))

    def events(self, rank: int, stage: int) -> list[dict]:
        """Return the spans as complete events of the Chrome trace format, times in microseconds; waits for the device."""
        self.wait()
        now_us, before = self.origin_s * 1e6, self.origin
        events = []
        for name, index, start, end in self.spans:
            now_us, before = now_us + self._microseconds(before, start), start
            duration = self._microseconds(start, end)
            events.append({"name": f"{name} {index}", "cat": name, "ph": "X", "ts": now_us, "dur": duration, "pid": stage, "tid": rank})
        return events

    def seconds(self) -> dict[str, list[float]]:
        """Return the seconds of all spans by their names, in order; waits for the device."""
        self.wait()
        found: dict[str, list[float]] = {}
        for name, _, start, end in self.spans:
            found.setdefault(name, []).append(self._microseconds(start, end) / 1e6)
        return found

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def _microseconds(self, start: Any, end: Any) -> float:
        if self.cuda:
            return start.elapsed_time(end) * 1e3
        return (end - start) * 1e6


def spans_of_a_rank(num_ranks: int) -> int:
    """Return how many spans each of a run's ranks keeps."""
    return min(MAX_SPANS, ALL_SPANS // num_ranks)


def write_timeline(path: Path, events_of_ranks: list[list[dict]]) -> None:
    """Write the spans of all ranks as one trace, beginning at zero."""
    events = [event for events in events_of_ranks for event in events]
    first = min((event["ts"] for event in events), default=0.0)
    for event in events:
        event["ts"] -= first
    names = {(event["pid"]): f"stage {event['pid']}" for event in events}
    meta = [{"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}} for pid, name in sorted(names.items())]
    write_atomically(path, sealed(json.dumps({"traceEvents": meta + events, "displayTimeUnit": "ms"})))
