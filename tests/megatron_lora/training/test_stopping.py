"""Where a run stops on request, and whose signals are requests."""

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


def chunks_of(requested_at: int | None, num_stages: int = 2, gap: int = 3) -> tuple[list[Window], StopRequest, list[Window]]:
    """Return the chunks when a rank has a stop request before chunk `requested_at`, the request, and the windows not read."""
    import torch.distributed as dist

    stop, found, unread = StopRequest(), [], list(WINDOWS)
    chunks = until_stopped((unread.pop(0) for _ in WINDOWS), stop, dist.group.WORLD, num_stages, gap)
    while True:
        stop.requested = requested_at is not None and len(found) >= requested_at
        chunk = next(chunks, None)
        if chunk is None:
            return found, stop, unread
        found.append(chunk)


def joined(chunks: list[Window]) -> Window:
    return Window(tuple(slot for chunk in chunks for slot in chunk.stream), tuple(ends for chunk in chunks for ends in chunk.ended))


def test_a_run_without_a_stop_request_gets_all_of_its_windows_in_chunks(one_process):
    found, stop, unread = chunks_of(None)
    assert joined(found) == joined(WINDOWS) and not stop.stopped and not unread
    assert max(len(chunk.stream) for chunk in found) == FEWEST_SLOTS


def test_chunks_are_longer_than_the_first_stage_can_be_ahead(one_process):
    found, _, _ = chunks_of(None, num_stages=5)
    assert [len(chunk.stream) for chunk in found] == [7, 10, 2, 3]


@pytest.mark.parametrize(("requested_at", "taken"), [(0, 4), (1, 7), (2, 11), (5, 22)])
def test_a_stop_request_takes_one_chunk_more_and_drains(requested_at, taken, one_process):
    found, stop, _ = chunks_of(requested_at)
    given, all_slots = joined(found), joined(WINDOWS)
    if taken < sum(SLOTS):
        assert stop.stopped and given.stream == all_slots.stream[:taken] + (NOOP,) * 3
        assert given.ended == all_slots.ended[:taken] + ((),) * 3
    else:  # too late: the last chunk was yielded
        assert not stop.stopped and given == all_slots


def test_a_signal_that_is_not_torchruns_is_a_request_once_there_is_something_to_save(monkeypatch):
    ended = []
    monkeypatch.setattr(stop_request, "_end", lambda: ended.append(True))
    parent, other = os.getppid(), os.getppid() + 1  # a process whose parent has ended has 1 for one
    for sender, can_save, dies in ((parent, True, True), (other, False, True), (parent, False, True), (other, True, False)):
        stop = StopRequest()
        stop.can_save = can_save
        ended.clear()
        stop._handle(sender)
        assert bool(ended) == dies, (sender, can_save)
    assert stop.requested
    ended.clear()
    stop.fails = True  # it records why, and then ends without a signal
    stop._handle(parent)
    assert not ended
