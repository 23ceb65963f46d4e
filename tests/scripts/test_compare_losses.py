"""Losses of runs beside each other: over the steps that both took."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench/compare_losses.py"


def test_common_steps_are_compared(tmp_path):
    first = {"case": "one", "losses": [[0, 0, 2.0], [0, 1, 1.5], [1, 0, 3.0]]}
    other = {"case": "two", "losses": [[1, 0, 3.25], [0, 0, 2.0], [1, 1, 9.0]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(first) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(other) + "\n")
    command = [sys.executable, SCRIPT, tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert told == "beside one:\n  two: 2 steps, largest difference 2.50e-01, mean 1.25e-01\n"
