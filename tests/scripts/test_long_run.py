"""The long run in small: its jobs come and go, each step is taken once, and the memory of both processes is noted."""

import json
from pathlib import Path

import pytest

from scripts.bench import long_run


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_small_run_is_measured(one_process):
    figures = long_run.measure(12, 240)
    assert figures["steps"] == 240 and {len(found) for found in figures["memory_mib"].values()} == {11}
    assert all(mib > 1 for found in figures["memory_mib"].values() for mib in found) and json.dumps(figures)
