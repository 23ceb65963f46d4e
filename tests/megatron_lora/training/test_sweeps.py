"""Sweeps in a whole run without a model (tests/living_plan.py): points leave at their rungs, and what is decided stays so."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
from living_plan import World, job_config

from megatron_lora.commands import sweep, watch
from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import JobConfig, load_jobs
from megatron_lora.config.sweep_keys import SweepConfig, with_points
from megatron_lora.errors import UserError
from megatron_lora.output.changes import Run, apply, job_mapping
from megatron_lora.output.events import read_events
from megatron_lora.output.leaderboard import read_leaderboard
from megatron_lora.output.report_page import report_page
from megatron_lora.output.requests import new_request, write_request
from megatron_lora.output.run_view import RunView
from megatron_lora.training.optuna_points import ask

STEPS = 9
JOB = {"name": "tune", "datasets": [{"path": "nowhere.jsonl", "type": "text"}], "val_set_size": 2, "target_modules": list(TARGET_MODULES)}


def points(strategy: str, num: int = 9, **keys) -> list[JobConfig]:
    config = SweepConfig(**{"job": "tune", "over": {"seed": {"choices": list(range(num))}}, "strategy": strategy, **keys})
    return list(load_jobs(None, with_points(config, [JOB]), 0))


def value_of(name: str, step: int) -> float:
    """The best is tune-004, then 005, 003, 006, 002, ..."""
    return abs(int(name[-3:]) - 4.1) + 1 / step if name.startswith("tune") else 1.0


def world(path, jobs, **keys) -> World:
    lengths = {job.name: [[3, 4]] * STEPS for job in jobs}
    return World(path, jobs, lengths, validation=dict.fromkeys(lengths, [2, 2]), **({"value_of": value_of} | keys))


def decisions(path) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for event in read_events(path):
        if "rung" in event.details:
            found.setdefault(event.job, []).append((event.event, event.details["rung"]))
    return found


@pytest.mark.parametrize(("strategy", "room"), [("successive_halving", 9), ("successive_halving", 2), ("asha", 9), ("asha", 2)])
def test_points_stop_at_their_rung_and_the_others_train_to_their_end(one_process, tmp_path, strategy, room):
    jobs = [*points(strategy), job_config("other")]
    run = world(tmp_path, jobs, room=jobs[:room])
    run.run()
    assert run.states["tune-004"] == run.states["other"] == "done"
    made = decisions(tmp_path)
    for job in jobs[:9]:
        passed = [event for event, _ in made[job.name]]
        steps = {("stopped",): 1, ("promoted", "stopped"): 3, ("promoted", "promoted"): STEPS}[tuple(passed)]
        assert sorted(run.trained[job.name]) == list(range(steps))
        assert run.states[job.name] == ("done" if steps == STEPS else "stopped")
        assert [rung for _, rung in made[job.name]] == list(range(len(passed)))
    run.check("tune-004")
    if strategy == "successive_halving":
        assert {name for name, events in made.items() if ("promoted", 0) in events} == {"tune-003", "tune-004", "tune-005"}
        assert [name for name, events in made.items() if ("promoted", 1) in events] == ["tune-004"]


@pytest.mark.parametrize("strategy", ["successive_halving", "asha"])
def test_where_no_job_waits_for_rows_points_keep_theirs_and_write_no_checkpoints(one_process, tmp_path, strategy):
    run = world(tmp_path, points(strategy), num_stages=2, delay=1)
    run.run()
    assert sorted(event.job for event in read_events(tmp_path) if event.event == "started") == sorted(run.states)
    assert not list(tmp_path.glob("jobs/*/checkpoint-*"))
    for name, steps in run.trained.items():
        assert all(sorted(samples) == [0, 1] for samples in steps.values()), name
    assert run.states["tune-004"] == "done"
    assert {name for name, state in run.states.items() if state == "stopped"} == {
        name for name, made in decisions(tmp_path).items() if made[-1][0] == "stopped"
    }


def test_points_at_a_rung_make_room_for_a_job_that_waits_and_come_back(one_process, tmp_path):
    """Halving waits for a point with many steps to its rung; a job that is added needs rows of the others, which are there."""
    jobs = points("successive_halving", num=6)
    run = world(tmp_path, jobs, room=jobs)
    run.lengths |= {"tune-000": [[3, 4]] * 270, "late": [[3, 4]] * 4}
    added: list[int] = []

    def between(window: int) -> None:
        if not added and sum(entry.rests for entry in run.control.entries.values()) == 5:
            added.append(window)
            write_request(tmp_path, new_request("add", jobs=[job_mapping(job_config("late", r=16))]))

    run.run(between)
    assert added and run.states["late"] == "done" and run.states["tune-004"] == "done"
    parked = [event for event in read_events(tmp_path) if event.event == "parked"]
    assert len(parked) == 5 and all(event.details["reason"] == "late waits for rows" for event in parked)
    for name in ("tune-004", "late"):
        run.check(name)


def test_the_leaderboard_has_the_best_first_and_a_link_to_it(one_process, tmp_path):
    world(tmp_path, points("successive_halving")).run()
    board = read_leaderboard(tmp_path)["tune"]
    rows = board["points"]
    assert (board["metric"], board["mode"], board["over"], board["strategy"]) == ("eval_loss", "min", ["seed"], "successive_halving")
    assert [row["job"] for row in rows][:3] == ["tune-004", "tune-005", "tune-003"]
    assert rows[0] == {"job": "tune-004", "values": {"seed": 4}, "state": "done", "value": value_of("tune-004", 9), "step": 9, "rung": 2}
    assert (rows[1]["state"], rows[1]["step"], rows[1]["rung"]) == ("stopped", 3, 1)
    assert os.readlink(tmp_path / "best") == "jobs/tune-004"


def test_a_sweep_is_shown_in_the_terminal_in_pictures_and_on_the_page(one_process, tmp_path, capsys):
    jobs = points("successive_halving", over={"r": {"choices": [4, 8, 16]}, "use_rslora": {"choices": [True, False]}})
    run = world(tmp_path / "run", jobs)
    run.run()
    best = read_leaderboard(tmp_path / "run")["tune"]["points"][0]
    (tmp_path / "run" / "status.json").write_text(json.dumps({"exit_status": 0, "jobs": {n: {"state": s} for n, s in run.states.items()}}))
    assert sweep.main(str(tmp_path / "run"), True, str(tmp_path / "sweep.png")) == 0
    assert json.loads(capsys.readouterr().out)["tune"]["points"][0] == best
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert sweep.main(str(tmp_path / "run"), False, None) == 0
    shown = capsys.readouterr().out
    assert "6 points, successive_halving, min eval_loss" in shown and shown.index(best["job"]) < shown.index("tune-000")
    view = RunView.read(tmp_path / "run")
    lines = [line.plain for line in watch.frame(view, watch.Rate(), 120, 60)]
    assert any(line.startswith("sweep tune: 6 of 6 points are over") for line in lines)
    assert any(line.startswith(best["job"]) and "r 16, use_rslora True" in line for line in lines)
    page = report_page(view)
    assert "<h2>Sweep tune</h2>" in page and page.count(f"<td>{best['value']:.4f}</td>") == 1
    with pytest.raises(UserError, match=r"has no leaderboard\.json"):
        sweep.main(str(tmp_path), False, None)


def test_a_point_that_is_paused_is_not_waited_for_and_is_judged_when_it_comes(one_process, tmp_path):
    jobs = points("successive_halving")
    run = world(tmp_path, jobs)
    run.control.run = dataclasses.replace(run.control.run, states={**run.control.run.states, "tune-004": "paused"})
    run.control.entries["tune-004"].state = "paused"
    run.run()
    assert decisions(tmp_path).keys() == {job.name for job in jobs} - {"tune-004"}
    assert run.states["tune-005"] == "done"


def test_what_was_decided_is_known_when_the_run_is_resumed(one_process, tmp_path):
    jobs = points("asha")
    run = world(tmp_path, jobs)
    run.run()
    events = read_events(tmp_path)
    again = apply(events, {job.name: "queued" for job in jobs}, run.control.run.config)
    stopped = {name for name, made in decisions(tmp_path).items() if made[-1][0] == "stopped"}
    assert isinstance(again, Run) and {name for name, state in again.states.items() if state == "stopped"} == stopped
    assert all("at its rung after" in again.reasons[name] for name in stopped)


@pytest.mark.parametrize("strategy", ["successive_halving", "asha"])
def test_a_sweep_is_repeated_from_its_events_alone(one_process, tmp_path, strategy):
    run = world(tmp_path / "first", points(strategy))
    run.run()
    again = world(tmp_path / "again", points(strategy), replay=tmp_path / "first", value_of=lambda name, step: 0.0)
    again.run()
    assert again.trained == run.trained and again.states == run.states
    assert decisions(tmp_path / "again") == decisions(tmp_path / "first")


def test_optuna_names_points_as_others_end_and_the_same_ones_for_the_same_results(one_process, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed; a sweep that names it is refused")
    over = {"learning_rate": {"min": 1e-5, "max": 1e-1, "log": True}, "r": {"choices": [4, 8]}}
    drawn = points("optuna", over=over)
    assert len(drawn) == 10
    rates = {job.name: job.learning_rate for job in drawn}

    def loss_of(name: str, step: int) -> float:
        known = {job.name: job.learning_rate for job in run.control.run.config.jobs}
        return abs(math.log10(known[name]) + 3.0)

    run = world(tmp_path, drawn, value_of=loss_of)
    run.lengths = dict.fromkeys([f"tune-{k:03d}" for k in range(16)], [[3, 4]] * 2)
    run.validation = dict.fromkeys(run.lengths, [2])
    run.run()
    rows = read_leaderboard(tmp_path)["tune"]["points"]
    assert len(rows) == 16 and {row["state"] for row in rows} == {"done"}
    asked = [abs(math.log10(row["values"]["learning_rate"]) + 3) for row in rows if row["job"] not in rates]
    assert sum(asked) / 6 < sum(abs(math.log10(rate) + 3) for rate in rates.values()) / 10
    told = {k: (job.point.values, True, (2, float(k))) for k, job in enumerate(drawn) if job.point}
    config = drawn[0].point.sweep
    assert ask(config, "min", told, 10) == ask(config, "min", told, 10) != ask(config, "max", told, 10)
