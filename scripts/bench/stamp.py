"""What stands beside every figure of a benchmark: commit, hardware, date, command and versions; and how a line of results is kept."""

import datetime
import json
import platform
import sys
from pathlib import Path

from megatron_lora.environment import commit, devices, versions

RESULTS = Path(__file__).resolve().parent / "results"


def stamp(hardware: str | None = None, code: str | None = None) -> dict:
    """Describe this run; `code` is the commit where the checkout cannot tell it."""
    found = devices()
    return {
        "commit": code or commit() or "unknown",
        "hardware": hardware or (f"{len(found)} x {found[0]}" if found else platform.machine()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version()} | versions(),
    }


def append_line(path: Path, line: dict) -> None:
    """Add one JSON line to a file of results, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
