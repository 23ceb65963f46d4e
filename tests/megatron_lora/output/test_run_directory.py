"""The output directory: one run at a time, nothing of another run touched, status.json always complete."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lora.config.schema import DatasetConfig, JobConfig, RunConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.output import run_directory
from megatron_lora.output.run_directory import RunDirectory


def config(path) -> RunConfig:
    chosen = {"seed": 0, "mode": "min", "keep": "last"}  # where a file leaves them open
    jobs = tuple(JobConfig(name=name, datasets=(DatasetConfig(path="a.jsonl", type="text"),), **chosen) for name in ("a", "b"))
    return RunConfig(base_model="m", output_dir=str(path), jobs=jobs)


def states(run: RunDirectory) -> dict[str, str]:
    return {name: job["state"] for name, job in run.status()["jobs"].items()}


def job_dir(run: RunDirectory) -> Path:
    """Make the directory of job a."""
    (run.path / "jobs" / "a").mkdir(parents=True)
    return run.path / "jobs" / "a"


def snapshot(path) -> dict:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_records_config_environment_and_states(tmp_path):
    with RunDirectory.create(config(tmp_path / "run"), {"python": "3"}) as run:
        assert load_config(run.path / "config.yaml") == config(tmp_path / "run")
        assert json.loads((run.path / "env.json").read_text()) == {"python": "3"}
        assert (run.path / "plan").is_dir() and states(run) == {"a": "queued", "b": "queued"}
        with RunDirectory.join(config(tmp_path / "run")) as worker:
            worker.set_job("a", "running")
            worker.set_job("b", "failed", "loss is not finite")
            worker.set_job("a", "done")
            worker.finish(3)
        status = run.status()
        assert set(status.pop("files")) == {"config.yaml"} and status == {
            "exit_status": 3,
            "reason": "",
            "rests_on": {},
            "jobs": {"a": {"state": "done", "reason": ""}, "b": {"state": "failed", "reason": "loss is not finite"}},
        }


@pytest.mark.parametrize("exit_status", [1, 75])
def test_what_had_not_ended_is_paused(tmp_path, exit_status):
    with RunDirectory.create(config(tmp_path / "run")) as run:
        run.set_job("a", "running")
        run.finish(exit_status, "a reason")
        assert states(run) == {"a": "paused", "b": "paused"} and run.status()["reason"] == "a reason"


def test_a_live_owner_or_worker_keeps_others_out_and_death_lets_go(tmp_path):
    path = tmp_path / "run"
    owner = RunDirectory.create(config(path))
    worker = RunDirectory.join(config(path))
    for process in (owner, worker):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            RunDirectory.check(config(path))
        with pytest.raises(UserError, match="in use by process"):
            RunDirectory.create(config(path))
        process.close()
    RunDirectory.check(config(path))


@pytest.mark.parametrize("replace", [False, True])
def test_a_writer_whose_lock_file_is_gone_stops(tmp_path, replace):
    with RunDirectory.create(config(tmp_path / "run")) as run:
        (run.path / ".lock").unlink()
        if replace:
            (run.path / ".lock").write_text("")
        before = snapshot(run.path)
        for write in (run.check_lock, lambda: run.set_job("a", "running"), lambda: run.finish(0)):
            with pytest.raises(UserError, match=r"\.lock' was removed or replaced while this run held it"):
                write()
        assert snapshot(run.path) == before


def test_a_lock_file_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    for attempt in (RunDirectory.check, RunDirectory.create):
        with pytest.raises(UserError, match="run' cannot be used"):
            attempt(config(tmp_path / "run"))
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "run" / ".lock").unlink()
    os.mkfifo(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match=r"run' cannot be used \(.lock is no file"):
        RunDirectory.create(config(tmp_path / "run"))


def test_what_killed_processes_were_writing_is_removed_at_the_next_start(tmp_path):
    with RunDirectory.create(config(tmp_path / "run")) as run:
        (job_dir(run) / "metrics.jsonl").write_text('{"step": 1}\n')
        left = [".status.json.123", "plan/.window-0001.json.9", "jobs/a/.metrics.jsonl.77", "requests/.20261130T034838.json.26251"]
        (run.path / "requests").mkdir()
        for name in left:
            (run.path / name).write_text("")
        for name in ("jobs/a/.checkpoint-4.new", "jobs/a/.best-4.old", "jobs/a/.adapter-x1"):
            (run.path / name).mkdir()
            left.append(name)
        (run.path / ".mine").write_text("")
    with RunDirectory.create(config(tmp_path / "run")) as run:
        assert not [name for name in left if (run.path / name).exists()] and (run.path / ".mine").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "run"
    code = (
        "import os, sys; from test_run_directory import config; from megatron_lora.output.run_directory import RunDirectory\n"
        f"run = RunDirectory.create(config({str(path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    here = os.path.dirname(__file__)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        RunDirectory.check(config(path))
    holder.kill()
    holder.wait()
    RunDirectory.check(config(path))


def test_a_run_that_never_took_a_step_may_be_taken_over_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "run"
    with RunDirectory.create(config(path)) as run:
        (run.path / "plan" / "window-0000.json").write_text("{}")
        (job_dir(run) / "metrics.jsonl").write_text("")
        run.finish(1, "crashed")
    with RunDirectory.create(config(path)) as run:
        assert not list((run.path / "plan").iterdir()) and run.status()["exit_status"] is None and not (path / "jobs").exists()


@pytest.mark.parametrize(
    ("end", "words"),
    [({"a": "done", "b": "done"}, r"a finished run \(jobs: 2 done\)"), ({"a": "done", "b": "failed"}, r"\(jobs: 1 done, 1 failed\)")],
)
def test_a_finished_run_is_refused_by_what_it_is_and_not_touched(tmp_path, end, words):
    path = tmp_path / "run"
    with RunDirectory.create(config(path)) as run:
        (job_dir(run) / "metrics.jsonl").write_text('{"step": 1}\n')
        for name, state in end.items():
            run.set_job(name, state)
        run.discard()  # takes nothing away from a run that has trained
    before = snapshot(path)
    assert "jobs/a/metrics.jsonl" in before
    for attempt in (lambda: RunDirectory.check(config(path)), lambda: RunDirectory.create(config(path))):
        with pytest.raises(UserError, match=words):
            attempt()
    assert snapshot(path) == before


def test_discard_takes_a_directory_away_that_it_made_and_empties_one_that_was_there(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("made", "there"):
        with RunDirectory.create(config(tmp_path / name)) as run:
            job_dir(run)
            run.discard()
    assert not (tmp_path / "made").exists()
    assert list((tmp_path / "there").iterdir()) == []


def test_files_of_other_origin_are_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="holds 'thesis.tex', which no run wrote"):
        RunDirectory.create(config(tmp_path))
    assert snapshot(tmp_path) == {"thesis.tex": b"all of it"}


def test_who_slips_in_while_the_lock_changes_hands_keeps_the_directory(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(lock, kind):
        if kind & fcntl.LOCK_SH:  # the kernel lets go of the exclusive lock first, and another process is quicker
            real(lock, fcntl.LOCK_UN)
            (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere")
        real(lock, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
        RunDirectory.create(config(tmp_path / "run"))


def full_disk(monkeypatch, call="replace"):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_directory.os, call, refuse)


@pytest.mark.parametrize("call", ["pwrite", "replace"])
def test_a_full_disk_at_the_start_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    full_disk(monkeypatch, call)
    with pytest.raises(UserError, match=r"run' cannot be used \(No space left on device\)"):
        RunDirectory.create(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_end_does_not_leave_jobs_running(tmp_path, monkeypatch):
    with RunDirectory.create(config(tmp_path / "run")) as run:
        run.set_job("a", "running")
        full_disk(monkeypatch)
        run.finish(1, "rank 0: no space left")
        assert states(run) == {"a": "paused", "b": "paused"} and run.status()["exit_status"] == 1
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [".lock", "config.yaml", "env.json", "plan", "status.json"]


@pytest.mark.parametrize("entry", ["plan", "jobs", "timeline.json"])
def test_what_an_earlier_run_left_is_replaced_whatever_it_is(tmp_path, entry):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    other = tmp_path / "run" / entry
    other.mkdir() if entry == "timeline.json" else other.write_text("x")
    with RunDirectory.create(config(tmp_path / "run")) as run:
        assert (run.path / "plan").is_dir() and job_dir(run).is_dir()
