"""Where a run stops that was asked to, and who may ask."""

from __future__ import annotations

import os

import pytest

from megatron_lora.training import stop_request
from megatron_lora.training.agree_to_stop import FEWEST_SLOTS, until_stopped
from megatron_lora.training.stop_request import StopRequest
from scheduling.follow import Window
from scheduling.types import NOOP, Microbatch, Segment

SLOTS = [7, 12, 3]  # of three windows


def window(first: int, count: int) -> Window:
    slots = range(first, first + count)
    return Window(tuple(Microbatch((Segment(0, slot, (0,), 5),)) for slot in slots), tuple(((0, slot),) for slot in slots))


WINDOWS = [window(sum(SLOTS[:number]), count) for number, count in enumerate(SLOTS)]


def given_out(asked_at: int | None, num_stages: int = 2, lag: int = 3) -> tuple[list[Window], StopRequest, list[Window]]:
    """Return what is given out when a rank is asked before so many parts, the request, and the windows that nobody took."""
    import torch.distributed as dist

    stop, found, left = StopRequest(), [], list(WINDOWS)
    parts = until_stopped((left.pop(0) for _ in WINDOWS), stop, dist.group.WORLD, num_stages, lag)
    while True:
        stop.asked = asked_at is not None and len(found) >= asked_at
        part = next(parts, None)
        if part is None:
            return found, stop, left
        found.append(part)


def joined(parts: list[Window]) -> Window:
    return Window(tuple(slot for part in parts for slot in part.stream), tuple(ends for part in parts for ends in part.ended))


def test_a_run_that_nobody_asks_gets_all_of_its_windows_in_parts(one_process):
    found, stop, left = given_out(None)
    assert joined(found) == joined(WINDOWS) and not stop.stopped and not left
    assert max(len(part.stream) for part in found) == FEWEST_SLOTS


def test_parts_are_longer_than_the_first_stage_can_be_ahead(one_process):
    found, _, _ = given_out(None, num_stages=5)
    assert [len(part.stream) for part in found] == [7, 10, 2, 3]


@pytest.mark.parametrize(("asked_at", "taken"), [(0, 4), (1, 7), (2, 11), (5, 22)])
def test_a_run_that_is_asked_takes_one_part_more_and_drains(asked_at, taken, one_process):
    found, stop, _ = given_out(asked_at)
    whole, all_slots = joined(found), joined(WINDOWS)
    if taken < sum(SLOTS):
        assert stop.stopped and whole.stream == all_slots.stream[:taken] + (NOOP,) * 3
        assert whole.ended == all_slots.ended[:taken] + ((),) * 3
    else:  # too late: the last part was given out
        assert not stop.stopped and whole == all_slots


def test_one_who_is_not_torchrun_may_ask_once_there_is_something_to_save(monkeypatch):
    ended = []
    monkeypatch.setattr(stop_request, "_end", lambda: ended.append(True))
    for sender, can_save, dies in ((os.getppid(), True, True), (1, False, True), (os.getppid(), False, True), (1, True, False)):
        stop = StopRequest()
        stop.can_save = can_save
        ended.clear()
        stop._take(sender)
        assert bool(ended) == dies, (sender, can_save)
    assert stop.asked
