"""What a run may leave behind: the files that docs/running.md names, steps in order, no lock that is held, no process.

leftovers.check(run)                                        # AssertionError that names what is there and should not be
leftovers.check(run, was_killed=True, has_ended=True)       # files that were being written may lie there until the next start
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from megatron_lora.output.lock_file import is_in_use
from megatron_lora.output.metrics import read_lines
from megatron_lora.output.run_directory import LEFTOVERS

MARK = "RUN_OF_A_TEST"  # environment variable: the directory of the run whose ranks started a process
PATIENCE_S = 120.0  # a process whose rank was killed ends once it has imported what it needs, and read its job
PEFT = r"adapter_config\.json|adapter_model\.safetensors|README\.md"
PLAN = r"window-\d{4,}\.json|windows-\d{4,}-\d{4,}\.jsonl\.gz"
REQUEST = r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{16}\.json"
OF_THE_RUN = ("config.yaml", "env.json", "status.json", "timeline.json", "report.html", "cost.json", "calibration.json", "queue.json")
OF_THE_RUN += ("accounting.json", "events.jsonl", "leaderboard.json")
FILES = re.compile(
    "|".join(
        (
            r"\.lock",
            *map(re.escape, OF_THE_RUN),
            rf"plan/({PLAN})",
            rf"plan/start-\d+/({PLAN}|timeline\.json(\.gz)?)",
            rf"requests/({REQUEST}|refused/({REQUEST}|[0-9a-f]{{16}}\.reason\.json))",
            rf"jobs/[^/]+/({PEFT}|metrics\.jsonl|events\.out\.tfevents\.[^/]+)",
            rf"jobs/[^/]+/(damaged-)?checkpoint-\d+(-\d+)?/({PEFT}|optimizer\.safetensors|state\.json)",
            rf"jobs/[^/]+/best-\d+/({PEFT}|state\.json)",
        )
    )
)


def check(run: Path, *, was_killed: bool = False, has_ended: bool = False) -> None:
    """Raise AssertionError for a file that no document names, a step that is missing or doubled, a lock or a process that has stayed."""
    passing = {path for pattern in LEFTOVERS for path in run.glob(pattern)} if was_killed else set()
    found = [path for path in run.rglob("*") if not path.is_dir() and passing.isdisjoint((path, *path.parents))]
    unknown = sorted(name for name in (path.relative_to(run).as_posix() for path in found) if not FILES.fullmatch(name))
    assert not unknown, f"{run}: no document names {unknown}"
    for metrics in run.glob("jobs/*/metrics.jsonl"):
        read_lines(metrics)  # steps 1 to n, once each; UserError otherwise
    if has_ended:
        assert not is_in_use(run), f"{run}: its lock is held"
        deadline = time.monotonic() + PATIENCE_S
        while (processes := _processes_of(run)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes, f"{run}: processes are left: {processes}"


def _processes_of(run: Path) -> dict[int, str]:
    """Return the processes that ranks of a run have started, by their ids, with their command lines."""
    found, mark = {}, f"{MARK}={run}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes() + b"\0":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # else it has ended, and nobody has asked how
                    found[int(folder.name)] = command
        except OSError:
            continue  # it has ended, or is another user's
    return found
