"""When a job's watchdog pauses it, and that a paused one is saved, says why, and may be resumed."""

from __future__ import annotations

import math

import pytest
from living_plan import World, job_config

from megatron_lora.output.events import read_events
from megatron_lora.output.requests import new_request, write_request
from megatron_lora.training.watchdog import Watchdog


def after_steps(losses, **keys) -> list[bool]:
    watchdog = Watchdog(job_config("a", **keys), None)
    return [watchdog.after_step(loss) is not None for loss in losses]


def after_evaluations(losses, patience: int | None, first: float | None = None) -> list[bool]:
    config = job_config("a", val_set_size=2, eval_watchdog_patience=patience)
    watchdog = Watchdog(config, first)
    return [watchdog.after_evaluation(loss) is not None for loss in losses]


@pytest.mark.parametrize(
    ("losses", "patience", "alarms"),
    [
        ([9, 3, 9, 9, 9], 3, [4]),  # in a row
        ([4, 4, 4], 3, []),  # at the bound
        ([9, math.nan, 9], 3, [2]),
        ([1, math.inf], 1, [1]),
    ],
)
def test_losses_above_the_bound_in_a_row_are_an_alarm(losses, patience, alarms):
    found = after_steps(losses, loss_watchdog_threshold=4.0, loss_watchdog_patience=patience)
    assert [number for number, alarm in enumerate(found) if alarm] == alarms


def test_a_job_without_a_bound_is_not_watched():
    assert not any(after_steps([math.nan] * 9)) and not any(after_evaluations([1.0, 2.0, 3.0, 4.0], None))


@pytest.mark.parametrize(
    ("losses", "first", "alarms"),
    [([2.0, 2.5, 2.0, 1.0], None, [2]), ([2.0, 2.5, 1.9, 2.1, 2.2], None, [4]), ([2.5, 2.5], 2.0, [1]), ([math.nan, 1.0, 1.0], None, [2])],
)
def test_evaluations_that_are_never_below_the_first_are_an_alarm(losses, first, alarms):
    assert [number for number, alarm in enumerate(after_evaluations(losses, 2, first)) if alarm] == alarms


def test_an_alarm_pauses_a_job_with_its_reason_until_it_is_resumed(one_process, tmp_path):
    jobs = [job_config("a", r=8), job_config("b", r=8)]
    lengths = {name: [[5, 7]] * 30 for name in ("a", "b")}
    world = World(tmp_path, jobs, lengths, num_stages=2)
    seen = []

    def between(window: int) -> None:
        if window == 3:  # they have joined
            for name in ("a", "nobody"):
                world.control.tell("paused", name, "the loss was above 4")
        if world.states["a"] == "paused" and not seen:
            seen.append(window)
            world.control.tell("paused", "a", "too late")  # it has left
            write_request(tmp_path, new_request("resume", names=["a"]))

    world.run(between)
    assert seen and world.states == {"a": "done", "b": "done"}
    world.check("a")
    paused = [event for event in read_events(tmp_path) if event.event == "paused"]
    assert [(event.job, event.id, event.details) for event in paused] == [("a", None, {"reason": "the loss was above 4"})]
