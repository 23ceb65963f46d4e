"""events.jsonl: a write is there as a whole or not at all, wherever a kill cuts it; other damage is named by its line."""

import os

import pytest

from megatron_lora.errors import UserError
from megatron_lora.files import unsealed
from megatron_lora.output.accounting_file import AccountingFile, read_accounting
from megatron_lora.output.events import Change, EventLog, Replay, read_events
from megatron_lora.output.queue_file import Waiting, read_queue, write_queue


def paused(*names: str) -> list[Change]:
    return [Change(event="paused", job=name, details={"reason": "on request"}) for name in names]


def filled(path) -> EventLog:
    log = EventLog(path)
    log.append([Change(event="started", job=name) for name in "ab"], window=0, slot=0)
    log.append(paused("a"), window=3, slot=96, id="1" * 16)
    log.append([Change(event="set", job="b", details={"key": "save_steps", "value": 5})], window=3, slot=96, id="2" * 16)
    return log


def test_events_are_read_back_as_they_were_written(tmp_path):
    log = filled(tmp_path)
    again = EventLog(tmp_path)
    assert again.events == read_events(tmp_path) and [event.seq for event in again.events] == [1, 2, 3, 4]
    assert again.ids == log.ids == {"1" * 16, "2" * 16} and (log.start, again.start) == (1, 2)
    line = unsealed((tmp_path / "events.jsonl").read_text().splitlines()[2])
    where = {"seq": 3, "start": 1, "window": 3, "slot": 96, "id": "1" * 16}
    assert line == where | {"event": "paused", "job": "a", "reason": "on request", "time": line["time"]} and line["time"].endswith("Z")


def test_a_write_that_is_cut_anywhere_is_dropped_as_a_whole_and_the_next_follows_what_was_complete(tmp_path):
    file = tmp_path / "events.jsonl"
    filled(tmp_path)
    before = read_events(tmp_path)
    size = file.stat().st_size
    EventLog(tmp_path).append(paused("a", "b", "c"), window=5, slot=160, id="3" * 16)
    whole = file.read_bytes()
    for cut in range(size, len(whole)):
        file.write_bytes(whole[:cut])
        assert read_events(tmp_path) == before, cut
    for cut in (size, size + 1, len(whole) - 1, whole.index(b"\n", size) + 1):
        file.write_bytes(whole[:cut])
        log = EventLog(tmp_path)
        assert "3" * 16 not in log.ids
        log.append(paused("b"), window=0, slot=0)
        assert [event.job for event in read_events(tmp_path)] == ["a", "b", "a", "b", "b"]


def test_a_write_for_which_there_is_no_space_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    log = filled(tmp_path)
    before = (tmp_path / "events.jsonl").read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        log.append(paused("b"), window=4, slot=128, id="3" * 16)
    monkeypatch.undo()
    log.append(paused("b"), window=4, slot=128, id="4" * 16)
    assert (tmp_path / "events.jsonl").read_bytes().startswith(before)
    assert [event.id for event in read_events(tmp_path)][3:] == ["2" * 16, "4" * 16]


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (2, b"{"),
        (1, b"null"),
        (3, b'{"seq": 3}'),
        (2, b"\xff\xfe"),
        (2, b"[" * 5000),
        (3, b'{"seq": 9, "time": "", "start": 1, "window": 0, "slot": 0, "id": null, "event": "done", "job": "a"}'),
        (3, b'{"seq": 3, "time": "", "start": 0, "window": 0, "slot": 0, "id": null, "event": "done", "job": "a"}'),
        (3, b'{"seq": 3, "time": "", "start": 1, "window": true, "slot": 0, "id": null, "event": "done", "job": "a"}'),
        (4, b'{"seq": 4, "time": "", "start": 1, "window": 0, "slot": 0, "id": null, "event": "married", "job": "a"}'),
        (2, b""),
    ],
)
def test_a_damaged_line_is_named(number, line, tmp_path):
    filled(tmp_path)
    file = tmp_path / "events.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[number - 1] = line
    file.write_bytes(b"\n".join(lines))
    for read in (read_events, EventLog):
        with pytest.raises(UserError, match=rf"events.jsonl:{number}: is no event \(.*\); restore the file"):
            read(tmp_path)


def test_a_replay_has_what_took_effect_at_each_window_of_a_start(tmp_path):
    log = filled(tmp_path)
    log.append([Change(event="done", job="b")], window=9, slot=300)
    second = EventLog(tmp_path)
    second.append([Change(event="started", job="a")], window=0, slot=0)
    first, then = Replay(tmp_path), Replay(tmp_path, start=2)
    assert [(event.event, event.job) for event in first.events(0)] == [("started", "a"), ("started", "b")]
    assert [(event.event, event.job) for event in first.events(3)] == [("paused", "a"), ("set", "b")] and not first.events(9)
    assert [event.job for event in then.events(0)] == ["a"] and not then.events(3)
    with pytest.raises(UserError, match="has no events of start 3"):
        Replay(tmp_path, start=3)


def test_the_accounting_counts_a_window_once_over_all_starts(tmp_path):
    used = {"a": {"tokens": 90, "slots": 2, "device_seconds": 0.5, "padding": 6}}
    first = AccountingFile(tmp_path)
    first.add(start=1, window=0, used=used)
    first.add(start=1, window=1, used=used | {"b": used["a"]})
    first.add(start=1, window=1, used=used)
    again = AccountingFile(tmp_path)
    again.add(start=1, window=1, used=used)  # killed behind its write, before what follows it
    again.add(start=2, window=0, used=used)
    found = read_accounting(tmp_path)
    assert found["windows"] == 3 and found["jobs"]["a"] == {"tokens": 270, "slots": 6, "device_seconds": 1.5, "padding": 18}
    assert found["jobs"]["b"] == used["a"]


@pytest.mark.parametrize("text", ["", "[]", '{"jobs": {"a": {}}}', '{"jobs": [], "windows": 1}', "\udcff", "[" * 5000])
def test_files_that_no_run_wrote_are_refused_in_a_line(text, tmp_path):
    for name, read in (("accounting.json", read_accounting), ("queue.json", read_queue)):
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=f"{name}: is not the .* of a run"):
            read(tmp_path)


def test_the_queue_is_read_as_it_was_written(tmp_path):
    assert read_queue(tmp_path) == {"resident": [], "queue": []}
    write_queue(tmp_path, ["a"], [Waiting("b", "2026-11-29T16:00:00Z", "waits for rows"), Waiting("c", "2026-11-29T16:00:01Z", "is read")])
    found = read_queue(tmp_path)
    assert found["resident"] == ["a"] and [(entry["job"], entry["place"]) for entry in found["queue"]] == [("b", 1), ("c", 2)]
