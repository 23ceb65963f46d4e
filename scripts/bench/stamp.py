"""What stands beside every figure of a benchmark: commit, hardware, date, command and versions; and how a line of results is kept."""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

from megatron_lora.environment import commit, devices, versions
from scripts.one_line import output_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"


def result_options(parser: argparse._ActionsContainer, output: str) -> None:
    """Add the options that say where a line goes, and what the checkout and the devices cannot tell."""
    parser.add_argument("--output", type=output_file, default=RESULTS / output)
    parser.add_argument("--hardware", help="as tables shall say it; default: the devices' names")
    parser.add_argument("--commit", help="where the checkout cannot tell it")


def stamp(hardware: str | None = None, code: str | None = None) -> dict:
    """Describe this run; `code` is the commit where the checkout cannot tell it."""
    found = devices()
    return {
        "commit": code or commit() or "unknown",
        "hardware": hardware or (f"{len(found)} x {found[0]}" if found else platform.machine()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv).removeprefix(f"{ROOT}/"),
        "versions": {"python": platform.python_version()} | versions(),
    }


def append_line(path: Path, line: dict) -> None:
    """Add one JSON line to a file of results, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
