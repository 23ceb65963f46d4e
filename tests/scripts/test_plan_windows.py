"""The benchmark of the planner's windows, in small: its figures are those of a run in which jobs come and go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import plan_windows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_small_run_is_measured(monkeypatch):
    for name, value in {"JOBS": 30, "STEPS": 20, "SAMPLES": 4, "RESIDENT": 6}.items():
        monkeypatch.setattr(plan_windows, name, value)
    command = [sys.executable, "-m", "scheduling.serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as planner:
        figures = plan_windows.measure(planner, 6)
        planner.kill()
    assert 12 < figures["jobs"] <= 30 and figures["slots"] <= 6 * 32 and figures["memory_mib"]["window 6"] > 1
    assert figures["wall_ms_per_slot"]["first"] > 0 and json.dumps(figures)
