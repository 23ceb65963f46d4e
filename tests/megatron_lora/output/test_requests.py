"""Requests to a run: each is applied once or refused with its reason, whatever lies in the folder and wherever a kill comes."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from killed import killed_at_every_change

from megatron_lora.config.schema import JobConfig, RunConfig, load_config, load_jobs
from megatron_lora.errors import UserError
from megatron_lora.output import take_requests
from megatron_lora.output.changes import Run, apply, decide, job_mapping, states_to_start_from
from megatron_lora.output.events import Change, EventLog, read_events
from megatron_lora.output.requests import Request, RequestFolder, new_request, write_request
from megatron_lora.output.run_directory import RunDirectory, job_states, with_changes


def job(name: str, **keys) -> JobConfig:
    return load_jobs(None, [{"name": name, "datasets": [{"path": "a.jsonl", "type": "text"}], **keys}], 0)[0]


def config(path) -> RunConfig:
    return RunConfig(base_model="m", output_dir=str(path), jobs=(job("a"), job("Bee")))


def run_of(path, **states: str) -> Run:
    return Run(config=config(path), states={"a": "running", "Bee": "queued"} | states)


def ask(path, verb: str, *names: str, jobs=(), **values) -> Request:
    request = new_request(verb, names=names, jobs=[job_mapping(each) for each in jobs], values=values)
    write_request(path, request)
    return request


def test_a_request_is_left_although_a_start_has_removed_its_unfinished_file(tmp_path, monkeypatch):
    replace = os.replace

    def removed(source, target):
        monkeypatch.setattr(os, "replace", replace)
        os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", removed)
    request = ask(tmp_path, "pause", "a")
    assert [path.name for path in (tmp_path / "requests").iterdir()] == [request.file_name]


def take(path, run: Run):
    return take_requests.take_requests(RequestFolder(path), EventLog(path), run, window=2, slot=64)


def refused(path) -> dict[str, str]:
    """Return file -> reason of what was refused: in the request, or beside what was none."""
    found = {}
    for file in (path / "requests" / "refused").iterdir():
        if file.is_file() and (file.name.endswith(".reason.json") or '"reason":' in file.read_text(errors="replace")):
            content = json.loads(file.read_text())
            found[content.get("file", file.name)] = content["reason"]
    return found


def left(path) -> list[str]:
    return sorted(name for name in os.listdir(path / "requests") if name != "refused")


def test_requests_are_taken_in_their_order_and_each_once(tmp_path):
    ids = [ask(tmp_path, verb, "a").id for verb in ("pause", "resume", "pause")]
    ids.append(ask(tmp_path, "set", "a", "Bee", save_steps=7, priority=2).id)
    ids.append(ask(tmp_path, "add", jobs=[job("c", r=4), job("d")]).id)
    ids.append(ask(tmp_path, "cancel", "c").id)
    run, taken, lines = take(tmp_path, run_of(tmp_path))
    assert not lines and left(tmp_path) == []
    assert [event.id for event in taken] == [*ids[:3], *ids[3:4] * 4, ids[4], ids[4], ids[5]]
    assert {(event.window, event.slot, event.start) for event in taken} == {(2, 64, 1)}
    assert run.states == {"a": "paused", "Bee": "queued", "c": "cancelled", "d": "queued"}
    assert [(each.save_steps, each.priority) for each in run.config.jobs] == [(7, 2.0), (7, 2.0), (0, 1.0), (0, 1.0)]
    assert run.config.jobs[2] == job("c", r=4)
    assert take(tmp_path, run) == (run, [], [])


@pytest.mark.parametrize(
    ("verb", "names", "values", "states", "words"),
    [
        ("pause", ["A"], {}, {}, r"'A': is no job of this run \(did you mean a\?\); its jobs are a, Bee"),
        ("pause", ["bee"], {}, {}, r"did you mean Bee"),
        ("cancel", ["a", "Bees"], {}, {}, r"'Bees': is no job of this run \(did you mean Bee\?\)"),
        ("pause", ["a"], {}, {"a": "done"}, "a: is done, so that nothing changes it any more"),
        ("cancel", ["Bee", "a"], {}, {"a": "failed"}, "a: is failed"),
        ("pause", ["a"], {}, {"a": "paused"}, "a: is paused already"),
        ("resume", ["a"], {}, {}, "a: is running, not paused"),
        ("set", ["a"], {"learning_rate": 1e-3}, {}, "learning_rate=0.001: cannot be set while a job trains, because its result must not"),
        ("set", ["a"], {"save_step": 3}, {}, r"save_step=3: cannot be set .*did you mean save_steps"),
        ("set", ["a"], {"save_steps": -1}, {}, "jobs.a.save_steps: -1 is not a number of steps"),
        ("set", ["a", "Bee"], {"save_steps": 1, "name": "c"}, {}, "name='c': cannot be set"),
        ("set", ["a"], {"priority": 0}, {}, "jobs.a.priority: 0 is not"),
        ("set", ["a"], {"early_stopping_patience": 2}, {}, "jobs.a.early_stopping_patience: 2 needs validation data"),
    ],
)
def test_what_cannot_be_applied_is_refused_as_a_whole_with_its_reason(verb, names, values, states, words, tmp_path):
    run = run_of(tmp_path, **states)
    request = ask(tmp_path, verb, *names, **values)
    with pytest.raises(UserError, match=words) as error:
        decide(request, run)
    after, taken, lines = take(tmp_path, run)
    assert after == run and not taken and left(tmp_path) == [] and not read_events(tmp_path)
    assert lines == [f"requests/{request.file_name}: refused: {error.value}"] and "\n" not in lines[0]
    assert refused(tmp_path) == {request.file_name: str(error.value)} == {request.file_name: RequestFolder(tmp_path).reason_of(request)}


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([job("A")], "jobs.A.name: the run has a job of this name"),
        ([job("c"), job("C")], "jobs.C.name: two jobs have this name"),
        ([{"name": "c"}], "jobs.c.datasets: is missing"),
        ([job_mapping(job("c")) | {"flavour": 1}], "jobs.c.flavour: unknown key"),
        ([job_mapping(job("c")) | {"r": "16"}], "jobs.c.r: '16' is not a LoRA rank"),
        ([job_mapping(job("c")) | {"name": "../c"}], "'../c' cannot name a job"),
    ],
)
def test_jobs_that_no_config_may_have_are_refused(jobs, words, tmp_path):
    mappings = [each if isinstance(each, dict) else job_mapping(each) for each in jobs]
    write_request(tmp_path, new_request("add", jobs=mappings))
    run, taken, lines = take(tmp_path, run_of(tmp_path))
    assert not taken and words in lines[0] and run == run_of(tmp_path)


def damage(folder: Path) -> set[str]:
    """Put files into a folder that are no requests; returns their names."""
    good = json.loads((folder / os.listdir(folder)[0]).read_text())
    name = "20260101T000000.000000Z-{}.json"
    named = {"id": "0" * 15, "time": "2026-01-01T00:00:00.000000Z"}
    texts = {
        "notes.txt": b"remember the milk",
        "zeros.json": b"\0" * 50,
        "latin.json": b"\xff\xfe",
        "deep.json": b"[" * 100_000,
        "empty.json": b"",
        "list.json": b"[]",
        "new\nline.json": b"{}",
        "renamed.json": json.dumps(good).encode(),
        name.format("../../x".replace("/", "_")): json.dumps(good | {"id": "../../x"}).encode(),
    }
    wrong = [
        {"verb": "explode"},
        {"names": "ab"},
        {"names": [1]},
        {"names": []},
        {"values": {"save_steps": 1}},
        {"jobs": [{}]},
        {"extra": 1},
        {"verb": None},
    ]
    for number, keys in enumerate(wrong):
        fields = good | named | {"id": named["id"] + f"{number:x}"} | keys
        texts[name.format(fields["id"])] = json.dumps(fields).encode()
    for file, text in texts.items():
        (folder / file).write_bytes(text)
    (folder / "folder").mkdir()
    (folder / "folder" / "in.json").write_text("{}")
    (folder / "link.json").symlink_to("/etc/hostname")
    (folder / "nowhere.json").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.json")
    return {*texts, "folder", "link.json", "nowhere.json", "pipe.json"}


def test_foreign_and_damaged_files_are_refused_each_in_a_line_and_the_others_taken(tmp_path):
    ask(tmp_path, "pause", "a")
    names = damage(tmp_path / "requests")
    run, taken, lines = take(tmp_path, run_of(tmp_path))
    assert run.states["a"] == "paused" and len(taken) == 1 and left(tmp_path) == []
    assert len(lines) == len(names) and all(": refused: " in line and "\n" not in line for line in lines)
    assert refused(tmp_path).keys() == names and names < set(os.listdir(tmp_path / "requests" / "refused"))
    assert Path("/etc/hostname").exists() and take(tmp_path, run).lines == []


def test_two_requests_with_one_id_are_applied_once(tmp_path):
    first = ask(tmp_path, "pause", "a")
    twin = Request(
        id=first.id, time=first.time[:-2] + "9Z" if first.time[-2] != "9" else first.time[:-3] + "99Z", verb="cancel", names=("a",)
    )
    write_request(tmp_path, twin)
    run, taken, lines = take(tmp_path, run_of(tmp_path))
    assert [event.event for event in taken] == ["paused"] and f"{twin.file_name}: refused: has the id of {first.file_name}" in lines[0]
    write_request(tmp_path, twin)  # now the id is in events.jsonl
    assert take(tmp_path, run) == (run, [], [f"requests/{twin.file_name}: was applied before; removed"]) and left(tmp_path) == []


def test_a_folder_that_cannot_be_tidied_is_said_once_and_stops_nothing(tmp_path):
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "refused").write_text("in the way")
    (tmp_path / "requests" / "notes.txt").write_text("")
    ask(tmp_path, "pause", "a")
    folder, log = RequestFolder(tmp_path), EventLog(tmp_path)
    run, taken, lines = take_requests.take_requests(folder, log, run_of(tmp_path), window=0, slot=0)
    assert len(taken) == 1 and "it cannot be moved away" in lines[0]
    assert take_requests.take_requests(folder, log, run, window=1, slot=32).lines == []


def test_applying_the_same_events_again_changes_nothing(tmp_path):
    for verb, names in (("pause", "a"), ("resume", "a"), ("pause", "Bee"), ("cancel", "a")):
        ask(tmp_path, verb, names)
    ask(tmp_path, "add", jobs=[job("c")])
    ask(tmp_path, "set", "c", save_steps=3)
    taken = take(tmp_path, run_of(tmp_path)).events
    states = states_to_start_from({"a": "running", "Bee": "paused"})
    once = apply(taken, states, config(tmp_path))
    assert apply(taken, once.states, once.config) == once
    assert once.states == {"a": "cancelled", "Bee": "paused", "c": "queued"} and once.reasons["Bee"] == "on request"
    assert apply(taken, states | {"a": "done"}, config(tmp_path)).states["a"] == "done"  # it was over first


# ---- kills ----


def test_a_run_killed_at_any_change_between_requests_loses_none_and_applies_none_twice(tmp_path):
    path, kept = tmp_path / "run", tmp_path / "kept"
    asked = (
        [ask(kept, "pause", "a", "Bee"), ask(kept, "resume", "Bee"), ask(kept, "set", "nobody", save_steps=1)]
        if kept.mkdir() is None
        else []
    )
    (kept / "requests" / "damaged.json").write_text("{")
    expected = Counter({asked[0].id: 2, asked[1].id: 1})

    def set_up():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, path)

    kills = 0
    for number in killed_at_every_change(lambda: take(path, run_of(path)), path, set_up):
        log = EventLog(path)
        run = apply(log.events, {"a": "running", "Bee": "queued"}, config(path))
        run = take_requests.take_requests(RequestFolder(path), log, run, window=2, slot=64).run
        assert Counter(event.id for event in read_events(path)) == expected, number
        assert run.states == {"a": "paused", "Bee": "queued"}
        assert [name for name in left(path) if not name.startswith(".")] == [] and asked[2].file_name in refused(path)
        assert "damaged.json" in refused(path), number
        kills += 1
    assert kills > 10


def test_a_start_killed_at_any_change_takes_the_requests_that_waited_once(tmp_path):
    path, kept = tmp_path / "run", tmp_path / "kept"
    with RunDirectory.create(config(path)) as directory:
        directory.finish(75)
    ask(path, "add", jobs=[job("c")])
    ask(path, "pause", "a")
    ask(path, "cancel", "Bee")
    path.rename(kept)

    def set_up():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, path)

    def start():
        RunDirectory.create(config(path)).close()

    kills = 0
    for number in killed_at_every_change(start, path, set_up):
        start()
        assert [event.event for event in read_events(path)] == ["added", "paused", "cancelled"], number
        recorded = load_config(path / "config.yaml")
        assert recorded.jobs == (*config(path).jobs, job("c"))
        states = {name: (entry["state"], entry["reason"]) for name, entry in json.loads((path / "status.json").read_text())["jobs"].items()}
        assert states == {"a": ("paused", "on request"), "Bee": ("cancelled", "on request"), "c": ("queued", "")}
        kills += 1
    assert kills > 10


# ---- resuming ----


def test_resuming_with_the_first_config_keeps_what_was_added_set_paused_and_cancelled(tmp_path, capsys):
    path = tmp_path / "run"
    with RunDirectory.create(config(path)) as directory:
        log = EventLog(path)
        request = ask(path, "add", jobs=[job("c", r=8)])
        ask(path, "set", "a", save_steps=5)
        ask(path, "pause", "a")
        run, _, _ = take_requests.take_requests(RequestFolder(path), log, run_of(path), window=1, slot=32)
        directory.add_jobs([each for each in run.config.jobs if each.name == "c"])
        assert load_config(path / "config.yaml").jobs == (*config(path).jobs, job("c", r=8))
        assert directory.status()["jobs"]["c"] == {"state": "queued", "reason": ""}
        directory.set_job("c", "running")
        directory.finish(75)
    assert with_changes(config(path)).jobs == (job("a", save_steps=5), job("Bee"), job("c", r=8))
    assert RunDirectory.check(config(path)).keys() == {"a", "Bee", "c"}
    capsys.readouterr()
    with RunDirectory.create(config(path)) as directory:
        assert load_config(path / "config.yaml") == with_changes(config(path))
        states = {name: entry["state"] for name, entry in directory.status()["jobs"].items()}
        assert states == {"a": "paused", "Bee": "queued", "c": "queued"}
    said = capsys.readouterr().err
    assert "1 jobs were added (c); values of a were set" in said and "paused on request: a" in said
    (path / "requests" / "refused").mkdir(exist_ok=True)
    assert request.id in EventLog(path).ids


def leave(path, Bee: str, status: int) -> None:
    """Have a run end that has trained `a` to its end."""
    with RunDirectory.create(config(path)) as directory:
        (path / "jobs" / "a").mkdir(parents=True)
        (path / "jobs" / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
        directory.set_job("a", "done")
        directory.set_job("Bee", Bee)
        directory.finish(status)


def test_a_finished_run_to_which_a_job_was_added_is_resumed_and_one_that_lost_a_job_is_not(tmp_path):
    path = tmp_path / "run"
    leave(path, Bee="done", status=0)
    with pytest.raises(UserError, match="a finished run"):
        RunDirectory.check(config(path))
    assert RunDirectory.check(config(path), keep_alive=True) == {}  # it waits for others
    RunDirectory.create(config(path), keep_alive=True).close()
    ask(path, "add", jobs=[job("c")])
    assert RunDirectory.check(config(path)).keys() == {"c"}
    RunDirectory.create(config(path)).close()
    assert job_states(path) == {"a": "done", "Bee": "done", "c": "queued"}
    shorter = RunConfig(base_model="m", output_dir=str(path), jobs=(job("a"),))
    with pytest.raises(UserError, match="'Bee', which the run has, is not among them"):
        RunDirectory.check(shorter)
    other = RunConfig(base_model="m", output_dir=str(path), jobs=(job("a"), job("Bee"), job("c", r=2)))
    with pytest.raises(UserError, match=r"jobs.c.r: 2 differs from 16"):
        RunDirectory.check(other)


def test_a_start_records_that_requests_have_ended_what_was_left(tmp_path):
    path = tmp_path / "run"
    leave(path, Bee="paused", status=75)
    ask(path, "cancel", "Bee")
    assert RunDirectory.check(config(path)) == {}
    RunDirectory.create(config(path)).close()
    assert job_states(path) == {"a": "done", "Bee": "cancelled"}
    with pytest.raises(UserError, match="a finished run"):
        RunDirectory.check(config(path))


def test_requests_are_kept_by_a_run_that_never_took_a_step(tmp_path):
    path = tmp_path / "run"
    with RunDirectory.create(config(path)) as directory:
        ask(path, "add", jobs=[job("c")])
        directory.discard()
        assert left(path) != [] and (path / "config.yaml").exists()
        directory.finish(1, "crashed")
    with RunDirectory.create(config(path)) as directory:
        assert left(path) == [] and [each.name for each in load_config(path / "config.yaml").jobs] == ["a", "Bee", "c"]
        directory.discard()
        assert (path / "events.jsonl").exists()


def test_events_of_a_run_that_nobody_asked_for_anything_end_with_it(tmp_path):
    path = tmp_path / "run"
    with RunDirectory.create(config(path)) as directory:
        EventLog(path).append([Change(event="started", job="a")], window=0, slot=0)
        directory.finish(1, "crashed")
    RunDirectory.create(config(path)).close()
    assert not (path / "events.jsonl").exists()
