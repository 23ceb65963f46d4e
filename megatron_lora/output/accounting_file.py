"""accounting.json: what each job of a run has used, over all of the run's starts.

    {"jobs": {name: {"tokens", "slots", "device_seconds", "padding"}}, "windows": 12, "start": 2, "last_window": 3}

A window's figures are added exactly once: the file names the last window that it holds, of which
start, and is replaced as a whole. Windows are added in their order. The figures themselves are
made by scheduling/accounting.py; `padding` is in rows.

    accounting = AccountingFile(output_dir)
    accounting.add(start=1, window=0, used={"a": {"tokens": 96, "slots": 3, "device_seconds": 0.2, "padding": 0}})
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError
from megatron_lora.files import sealed, unsealed, write_atomically

ACCOUNTING_FILE = "accounting.json"
FIGURES = ("tokens", "slots", "device_seconds", "padding")


class AccountingFile:
    """The accounting of a run, by its one process that writes it."""

    def __init__(self, output_dir: Path):
        """Read what earlier starts have used; UserError for a file that a run did not write."""
        self.path = output_dir / ACCOUNTING_FILE
        self.content = read_accounting(output_dir)

    def add(self, *, start: int, window: int, used: Mapping[str, Mapping[str, float]]) -> None:
        """Add the figures of a window, by job; nothing happens for one that the file holds already."""
        old = self.content
        if (start, window) <= (old["start"], old["last_window"]):
            return
        jobs = dict(old["jobs"])
        for name, figures in used.items():
            before = jobs.get(name, dict.fromkeys(FIGURES, 0))
            jobs[name] = {key: before[key] + figures[key] for key in FIGURES}
        self.content = {"jobs": jobs, "windows": old["windows"] + 1, "start": start, "last_window": window}
        write_atomically(self.path, sealed(json.dumps(self.content, indent=1)))


def read_accounting(output_dir: Path) -> dict[str, Any]:
    """Return what the file says, nothing used where there is none; UserError for a file that a run did not write."""
    path = output_dir / ACCOUNTING_FILE
    try:
        found = unsealed(path.read_text(encoding="utf-8"))
        numbers = [jobs[key] for jobs in found["jobs"].values() for key in FIGURES]
        numbers += [found[key] for key in ("windows", "start", "last_window")]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise TypeError
    except FileNotFoundError:
        return {"jobs": {}, "windows": 0, "start": 0, "last_window": -1}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: is not the accounting of a run; restore it, or remove it to count from 0") from None
    return found
