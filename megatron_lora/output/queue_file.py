"""queue.json: which jobs have an adapter row, and which wait for one, in which order and for what. Rewritten at each window's border.

{"resident": ["a"], "queue": [{"job": "b", "since": "2026-11-29T16:00:00.000000Z", "place": 1, "reason": "waits for rows"}]}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lora.errors import UserError
from megatron_lora.files import write_atomically

QUEUE_FILE = "queue.json"


class Waiting(NamedTuple):
    """A job in the queue: since when (ISO 8601, UTC), and what it waits for."""

    job: str
    since: str
    reason: str


def write_queue(output_dir: Path, resident: Sequence[str], queue: Sequence[Waiting]) -> None:
    """Replace the file; `queue` is in the order in which jobs will start."""
    entries = [waiting._asdict() | {"place": place} for place, waiting in enumerate(queue, 1)]
    write_atomically(output_dir / QUEUE_FILE, json.dumps({"resident": list(resident), "queue": entries}, indent=1) + "\n")


def read_queue(output_dir: Path) -> dict[str, Any]:
    """Return what the file says, nothing for one that is not there; UserError for one that a run did not write."""
    path = output_dir / QUEUE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [*found["resident"], *(entry[key] for entry in found["queue"] for key in ("job", "since", "reason"))]
        if not all(isinstance(name, str) for name in names) or not all(isinstance(entry["place"], int) for entry in found["queue"]):
            raise TypeError
    except FileNotFoundError:
        return {"resident": [], "queue": []}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is not the queue of a run; remove it, a run writes it anew") from None
    return found
