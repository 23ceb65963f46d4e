"""The check for what runs leave behind sees a file that no document names, a doubled step, a held lock and a process that has stayed."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import leftovers
import pytest

from megatron_lora.output.lock_file import lock_directory

DOCUMENT = Path(__file__).parents[3] / "docs" / "running.md"


@pytest.fixture
def run(tmp_path):
    """A directory as a run leaves it."""
    left = ["status.json", "plan/window-0000.json", "plan/start-1/timeline.json", "jobs/a/events.out.tfevents.1.host.2.3"]
    left += ["jobs/a/checkpoint-3/state.json", "jobs/a/README.md", "requests/refused/20261130T002351.927702Z-fdfee3bd552e5bf5.json"]
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "jobs/a/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    os.close(lock_directory(tmp_path, fcntl.LOCK_EX))
    return tmp_path


def test_a_run_that_has_ended_leaves_nothing_that_is_found(run):
    leftovers.check(run, has_ended=True)


@pytest.mark.parametrize("name", [".status.json.77", "plan/.window-0001.json.7", "jobs/a/.checkpoint-4.new/state.json"])
def test_files_that_were_being_written_lie_there_after_a_kill_alone(name, run):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).touch()
    leftovers.check(run, was_killed=True)
    with pytest.raises(AssertionError, match=re.escape(name)):
        leftovers.check(run)


def test_a_file_that_no_document_names_is_found_after_a_kill_too(run):
    (run / "jobs/a/adapter.tmp").touch()
    with pytest.raises(AssertionError, match=r"jobs/a/adapter\.tmp"):
        leftovers.check(run, was_killed=True)


def test_a_step_that_is_taken_twice_is_found(run):
    (run / "jobs/a/metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(ValueError, match="step 1 behind step 1"):
        leftovers.check(run)


def test_a_lock_that_is_held_is_found(run):
    lock = lock_directory(run, fcntl.LOCK_SH)
    with pytest.raises(AssertionError, match="lock is held"):
        leftovers.check(run, has_ended=True)
    os.close(lock)


def test_a_process_that_has_stayed_is_found(run, monkeypatch):
    monkeypatch.setattr(leftovers, "PATIENCE_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={leftovers.MARK: str(run)}) as process:
        with pytest.raises(AssertionError, match=f"{process.pid}: .*input"):
            leftovers.check(run, has_ended=True)
        process.kill()
    leftovers.check(run, has_ended=True)


def test_what_may_lie_in_a_runs_directory_is_what_the_document_names():
    block = DOCUMENT.read_text().partition("## What a run writes")[2].split("```")[1]
    assert not [name for name in leftovers.OF_THE_RUN if name not in block]
