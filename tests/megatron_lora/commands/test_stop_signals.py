"""A request to stop at each moment of a run's start ends it with 75, every job as it was; a run outlives those who read its words."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lora.__main__ import main
from megatron_lora.commands import launch, output_streams
from megatron_lora.output.display import LiveTable, PlainLines, make_display
from megatron_lora.output.metrics import JobSummary
from megatron_lora.training.stop_request import STOP_SIGNALS


def status_file() -> dict:
    return json.loads(Path("out/status.json").read_text())


@pytest.fixture
def ask(monkeypatch):
    """Return a function that has this process get a signal when `launch` calls a function of its own, before that does its work."""

    def when(name: str, number: int = signal.SIGTERM) -> None:
        function = getattr(launch, name)

        def asked(*arguments, **keys):
            os.kill(os.getpid(), number)
            return function(*arguments, **keys)

        monkeypatch.setattr(launch, name, asked)

    return when


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_while_it_is_checked_writes_nothing_and_gives_75(number, scene, ask, capfd):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ask("check_run", number)
    assert main(["train", "config.yaml"]) == 75
    assert capfd.readouterr().err == f"megatron-lora: stopped by {number.name} before it took a step\n" and not Path("out").exists()
    assert before == {number: signal.getsignal(number) for number in STOP_SIGNALS}


def test_a_run_that_is_asked_to_stop_while_its_directory_is_made_completes_it_and_starts_no_rank(scene, ask, monkeypatch, capfd):
    monkeypatch.setattr(launch, "rank_environment", lambda *words: pytest.fail("torchrun was started"))
    ask("start_ranks")
    assert main(["train", "config.yaml"]) == 75
    assert status_file()["exit_status"] == 75 and {job["state"] for job in status_file()["jobs"].values()} == {"paused"}
    assert "before it took a step" in capfd.readouterr().err


def test_nohup_keeps_a_run_from_the_end_of_its_terminal(scene, ask, monkeypatch):
    monkeypatch.setattr(launch, "start_ranks", lambda *words: launch._Ending(status=1))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ask("check_run", signal.SIGHUP)
        assert main(["train", "config.yaml"]) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_ascii_stream_is_enough(monkeypatch):
    reader, ours = os.pipe()
    stream = os.fdopen(ours, "w", encoding="ascii", buffering=1)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "__stdout__", stream)
    output_streams.keep_running_unread()
    observer = make_display()
    observer.on_start([JobSummary("a", 4)])
    observer.on_status("a", "failed", "naïve")
    monkeypatch.undo()
    stream.close()
    with os.fdopen(reader, "rb") as written:
        assert written.read() == b"a: failed: na?ve\n"


@pytest.mark.parametrize("gone", ["a pipe without a reader", "a closed terminal"])
def test_a_run_outlives_those_who_read_its_words(gone, monkeypatch):
    import pty

    theirs, ours = os.pipe() if gone.startswith("a pipe") else pty.openpty()
    stream = os.fdopen(ours, "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "__stdout__", stream)
    os.close(theirs)
    with pytest.raises(OSError, match="Broken pipe|Input/output error"):
        print("nobody reads this", flush=True)
    output_streams.keep_running_unread()
    print("nobody reads this", flush=True)
    for observer in (PlainLines(sys.stdout), LiveTable(Console(force_terminal=True))):
        observer.on_start([JobSummary("a", 4)])
        observer.on_status("a", "done", "")
        observer.close()
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        stream.close()  # what it could not write
