"""What is read of a run's directory: everything, what was added since, and what is left of a damaged or an older one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import example_runs
import pytest

from megatron_lora.errors import UserError
from megatron_lora.files import unsealed, write_atomically
from megatron_lora.output.run_view import RunView, read_config

STEP = {"epoch": 0.1, "loss": 2.0, "tokens": 10, "skipped": False}


def metrics(run: Path, name: str = "summaries") -> Path:
    return run / "jobs" / name / "metrics.jsonl"


def test_a_run_is_read_as_it_is_written(tmp_path):
    run = example_runs.make_run(tmp_path / "run", live=True)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    view = RunView.read(run)
    summaries, dates = view.jobs["summaries"], view.jobs["dates"]
    lines = [json.loads(line) for line in metrics(run).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert list(summaries.steps) == list(range(1, 49)) and list(summaries.losses) == [line["loss"] for line in steps]
    assert summaries.evaluations == [line for line in lines if "eval_loss" in line] and summaries.num_steps == 120
    assert summaries.tokens == 48 * 9000 and summaries.settings["learning_rate"] in (1e-4, 2e-4, 5e-4)
    assert dates.state == "failed" and dates.num_skipped == 3 and math.isnan(dates.losses[-1]) and math.isfinite(dates.loss)
    best = min(line["eval_loss"] for line in summaries.evaluations)
    assert summaries.best() == (view.jobs["summaries"].recorded["best"]["step"], best)
    assert [entry["job"] for entry in view.queue] == ["sql", "titles"] and view.layout == "pipeline 4" and view.num_stages == 4
    seconds = {name: used["device_seconds"] for name, used in view.accounting.items()}
    assert view.shares()["names"] == pytest.approx(seconds["names"] / sum(seconds.values())) and view.shares()["sql"] == 0
    assert view.window is not None and view.window.number == 2 and set(view.window.tokens(0)) <= set(example_runs.NAMES)
    assert view.windows()[1].joined == {"titles": 0} and view.windows()[1].evaluate == {9, 10, 21}
    assert view.seconds() == (31 * 60 + 57) and not view.unreadable
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before, "reading writes nothing"


def test_short_windows_in_a_row_are_one(tmp_path):
    run = example_runs.make_run(tmp_path / "run")
    usual = RunView.read(run).windows()[1]
    content = json.loads((run / "plan" / "window-0001.json").read_text())
    for slot, held in enumerate(content["microbatches"]):
        short = {"microbatches": [held], "evaluate": [0] * (slot in usual.evaluate), "joined": [], "left": []}
        short |= {key: content[key] for key, at in (("joined", 5), ("left", 30)) if at == slot}
        (run / "plan" / f"window-{1 + slot:04d}.json").write_text(json.dumps(content | short))
    view = RunView.read(run)
    assert len(view.windows()) == 2 and view.window == view.windows()[1] == dataclasses.replace(
        usual, joined={"titles": 5}, left={next(iter(usual.left)): 31}, num_windows=32
    )
    assert usual.title == "window 1" and view.window.title == "windows 1 to 32"


def test_a_line_that_is_being_written_waits_until_it_is_complete(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=2, steps=10, live=True)
    view = RunView.read(run)
    taken = view.jobs["summaries"].step
    whole = json.dumps(STEP | {"step": taken + 1})
    with metrics(run).open("a") as file, (run / "events.jsonl").open("a") as events:
        for part in (whole[:9], whole[9:]):
            file.write(part)
            events.write('{"event": "par' if part == whole[:9] else 'ked"}')
            file.flush(), events.flush()
            num_events = len(view.events)
            view.refresh()
            assert view.jobs["summaries"].step == taken and len(view.events) == num_events
        file.write("\n"), events.write("\n")
    view.refresh()
    job = view.jobs["summaries"]
    assert job.step == taken + 1 and job.losses[-1] == 2.0 and job.num_unreadable == 0 and view.events[-1] == {"event": "parked"}


def test_metrics_that_a_resume_has_cut_back_are_read_anew(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=2, steps=10, live=True)
    view = RunView.read(run)
    kept = metrics(run).read_text().splitlines(keepends=True)[:2]
    again = [json.dumps(STEP | {"step": step}) + "\n" for step in range(2, 30)]  # longer than before, so its size says nothing
    write_atomically(metrics(run), "".join(kept[:1] + again))
    view.refresh()
    assert list(view.jobs["summaries"].steps) == list(range(1, 30)) and not view.jobs["summaries"].evaluations


def test_jobs_windows_and_states_that_come_later_are_seen_and_ended_jobs_are_read_no_more(tmp_path, monkeypatch):
    run = example_runs.make_run(tmp_path / "run", num_jobs=6, live=True)
    view = RunView.read(run)
    status = unsealed((run / "status.json").read_text())
    status["jobs"]["late"] = {"state": "running", "reason": ""}
    status["jobs"]["summaries"] = {"state": "stopped", "reason": "enough"}
    metrics(run, "late").parent.mkdir()
    metrics(run, "late").write_text(json.dumps(STEP | {"step": 1}) + "\n")
    with metrics(run).open("a") as file:  # the last lines of a job, written before its state
        file.write(json.dumps(STEP | {"step": 49}) + "\n")
    write_atomically(run / "status.json", json.dumps(status))
    (run / "plan" / "window-0003.json").write_text(json.dumps({"microbatches": [[[0, 1, 0, 7]]], "left": [1]}))
    view.refresh()
    assert view.jobs["late"].step == 1 and view.jobs["summaries"].step == 49 and view.jobs["summaries"].state == "stopped"
    assert view.window.number == 3 and view.window.tokens(0) == {"summaries": 7} and view.window.left == {"names": 1}, (
        "by cost.json's order"
    )
    read = []
    for job in view.jobs.values():
        monkeypatch.setattr(job, "read", lambda name=job.name: read.append(name))
    view.refresh()
    assert sorted(read) == ["late", "names", "support-de"], "those that train"


def test_a_run_of_an_earlier_version_needs_only_its_status(tmp_path):
    (tmp_path / "status.json").write_text('{"exit_status": 0, "reason": "", "jobs": {"a": {"state": "done", "reason": ""}}}')
    metrics(tmp_path, "a").parent.mkdir(parents=True)
    metrics(tmp_path, "a").write_text("".join(json.dumps(STEP | {"step": step}) + "\n" for step in (1, 2)))
    view = RunView.read(tmp_path)
    assert view.jobs["a"].step == 2 and view.shares() == {"a": 1.0} and view.layout == "one rank" and view.seconds() is None
    assert view.window is None and not view.windows() and not view.spans() and not view.unreadable and not view.is_live()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("queue.json", "{"),
        ("queue.json", '{"queue": [3]}'),
        ("accounting.json", '{"jobs": []}'),
        ("config.yaml", "jobs: ["),
        ("config.yaml", "3"),
        ("plan/window-0002.json", '{"microbatches": [[[0]], 3]}'),
        ("timeline.json", "[]"),
        ("events.jsonl", "nonsense\n"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(file, content, tmp_path):
    run = example_runs.make_run(tmp_path / "run")
    (run / file).write_text(content)
    view = RunView.read(run)
    view.windows(), view.spans()
    assert list(view.unreadable) == [file]
    assert view.jobs["summaries"].step == 120


def test_damaged_lines_of_metrics_are_counted(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=1, steps=10)
    lines = metrics(run).read_bytes().splitlines(keepends=True)
    metrics(run).write_bytes(
        b"".join([*lines[:3], b'{"step": 4, "lo\n', b"\xff\xfe\n", b"[1]\n", b'{"step": "x", "loss": 1}\n', *lines[3:]])
    )
    job = RunView.read(run).jobs["summaries"]
    assert job.num_unreadable == 4 and job.step == 10 and len(job.steps) == 10


@pytest.mark.parametrize("damage", ["nothing", "file", "empty", "no jobs", "not JSON", "binary"])
def test_what_is_no_run_is_one_clear_line(damage, tmp_path):
    run = tmp_path / "run"
    if damage == "file":
        run.write_text("x")
    elif damage != "nothing":
        run.mkdir()
        (run / "status.json").write_bytes({"no jobs": b"{}", "not JSON": b"{", "binary": b"\xff\x00"}.get(damage, b""))
    with pytest.raises(UserError) as error:
        RunView.read(run)
    assert "\n" not in str(error.value) and str(run) in str(error.value) and "name a" in str(error.value)


def test_a_config_is_read_the_same_line_by_line_and_whole():
    text = example_runs.CONFIG + "".join(
        example_runs.JOB.format(name=name, r=8, rate="1.0e-05", steps=9) for name in ("a", "'12'", "null-x")
    )
    top, jobs = read_config(text, "config.yaml")
    whole_top, whole = read_config(text.replace("jobs:\n", "jobs: # as a person writes it\n"), "config.yaml")
    assert top == whole_top and top["parallel"]["pipeline"] == 4 and list(jobs) == list(whole) == ["a", "12", "null-x"]
    for name, settings in jobs.items():
        assert settings == {key: whole[name][key] for key in settings} and settings["learning_rate"] == 1e-5 and settings["mode"] is None


def test_steps_of_a_job_without_max_steps_follow_from_its_first_step(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=1, steps=10, live=True)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_steps: 10", "max_steps: null"))
    metrics(run).write_text(json.dumps(STEP | {"step": 1, "epoch": 8 / 27}) + "\n")  # 27 records, 8 at a time: 4 steps an epoch
    assert RunView.read(run).jobs["summaries"].num_steps == 12


def test_a_recorded_best_wins_over_the_one_that_is_found(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=1)
    job = RunView.read(run).jobs["summaries"]
    job.recorded["best"] = {"step": 20}
    assert job.best() == (20, dict(job.evaluated())[20])
    job.recorded.clear()
    job.settings["metric"] = "eval_accuracy"
    assert job.best() == max(job.evaluated("eval_accuracy"), key=lambda each: each[1])
