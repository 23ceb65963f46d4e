"""Timing of passes in a row: what is counted, and what is not."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import pass_times  # noqa: E402


def test_works_take_turns_and_the_first_two_turns_are_not_counted(monkeypatch):
    seconds = {"a": iter([90.0, 50.0, 3.0, 1.0, 2.0]), "b": iter([80.0, 70.0, 6.0, 4.0, 9.0])}
    clock, order = [0.0], []

    def work(name: str, watch: pass_times.Stopwatch) -> None:
        order.append(name)
        watch.time(name, lambda: clock.append(clock[-1] + next(seconds[name])))

    monkeypatch.setattr(pass_times.time, "perf_counter", lambda: clock[-1])
    found = pass_times.in_turns(torch.device("cpu"), [partial(work, "a"), partial(work, "b")], 3)
    assert found == [{"a": 2.0}, {"b": 6.0}] and order == ["a", "b"] * 5


def test_everything_timed_has_its_own_name():
    watch = pass_times.Stopwatch(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        watch.time(name, lambda: None)
    assert {name: len(times) for name, times in watch.seconds().items()} == {"forward": 2, "backward": 1}
    assert all(seconds == pytest.approx(0.0, abs=1.0) and seconds >= 0 for times in watch.seconds().values() for seconds in times)
