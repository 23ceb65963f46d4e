"""Timing of passes in a row: what is counted, and what is not."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import pass_times  # noqa: E402


def test_the_first_two_turns_are_not_counted(monkeypatch):
    clock = iter([100.0, 190.0, 200.0, 250.0, *(value for turn, took in enumerate((3.0, 1.0, 2.0)) for value in (turn, turn + took))])
    monkeypatch.setattr(pass_times.time, "perf_counter", lambda: next(clock))
    results = []
    found = pass_times.repeated(torch.device("cpu"), lambda watch: results.append(watch.time("work", lambda: "done")), 3)
    assert found == {"work": 2.0} and results == ["done"] * 5 and next(clock, None) is None


def test_everything_timed_has_its_own_name():
    watch = pass_times.Stopwatch(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        watch.time(name, lambda: None)
    assert {name: len(times) for name, times in watch.seconds().items()} == {"forward": 2, "backward": 1}
    assert all(seconds == pytest.approx(0.0, abs=1.0) and seconds >= 0 for times in watch.seconds().values() for seconds in times)
