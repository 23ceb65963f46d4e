"""The threads that write snapshots: of one job in its order, of others meanwhile, and a failure is raised where it is waited for."""

import threading

import pytest

from megatron_lora.training.snapshots import _Writers


def test_jobs_are_written_side_by_side_and_each_in_its_order():
    written, may_go_on = [], threading.Event()

    def write(snapshot):
        if snapshot == ("a", 0):
            assert may_go_on.wait(20)
        written.append(snapshot)
        if snapshot == ("b", 2):
            may_go_on.set()

    before = set(threading.enumerate())
    writers = _Writers(write, 2)
    threads = set(threading.enumerate()) - before
    for step in range(3):
        for job in "ab":
            writers.put(job, (job, step))
    writers.close()
    writers.wait()
    assert written[:3] == [("b", 0), ("b", 1), ("b", 2)], "the other job waits for the first one's slow disk"
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "it would hold the run's memory"
    assert written[3:] == [("a", 0), ("a", 1), ("a", 2)]


def test_the_first_failure_of_a_writer_is_raised_and_nothing_more_is_written():
    all_there, asked = threading.Event(), []

    def write(snapshot):
        asked.append(snapshot)
        assert all_there.wait(20)
        raise OSError(snapshot)

    before = set(threading.enumerate())
    writers = _Writers(write, 1)
    for snapshot in ("no space is left", "what the first should have written is not there"):
        writers.put("a", snapshot)
    all_there.set()
    with pytest.raises(OSError, match="no space is left"):
        writers.wait()
    writers.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert asked == ["no space is left"] and str(writers.failure) == "no space is left"
