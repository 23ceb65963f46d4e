"""`megatron-lora watch`: frames that fit any terminal and say what the run's directory says; leaving it changes nothing of the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import example_runs
import pytest
from rich.cells import cell_len
from waiting import wait_for

from megatron_lora.__main__ import main
from megatron_lora.commands.watch import Rate, frame, sparkline
from megatron_lora.files import unsealed
from megatron_lora.output.run_view import RunView

ROOT = Path(__file__).resolve().parents[3]


def text_of(view: RunView, width: int, height: int, names=(), ascii_only: bool = False) -> list[str]:
    return [line.plain for line in frame(view, Rate(), width, height, names, ascii_only)]


def test_a_frame_says_what_the_directory_says(tmp_path):
    view = RunView.read(example_runs.make_run(tmp_path / "run", live=True))
    lines = text_of(view, 140, 50)
    first = view.jobs["names"].evaluations
    row = next(line for line in lines if line.startswith("names "))
    assert f"{view.jobs['names'].loss:.4f}" in row and " 72/120 " in row and f"{view.shares()['names']:.1%}" in row
    assert f"{first[-1]['eval_loss']:.4f}*" in row and f"{first[-1]['eval_loss'] - first[-2]['eval_loss']:+.3f}" in row and "█" in row
    assert any("the gradient norm was not finite" in line for line in lines if line.startswith("dates"))
    assert any("place 2, waits for rows" in line for line in lines if line.startswith("titles"))
    assert lines[0].startswith("run  running  models/SmolLM2-135M-Instruct  pipeline 4, 4096 tokens a microbatch")
    assert "6 jobs: 3 running, 1 failed, 2 queued" in lines[1] and "ETA" in lines[1] and "queue 2 (waits for rows): sql, titles" in lines
    assert any(line.startswith("10:32:02  dates") and "failed at step 30" in line for line in lines)


def test_a_window_has_a_line_per_stage_with_evaluations_no_ops_joins_and_leaves(tmp_path):
    run = example_runs.make_run(tmp_path / "run", live=True)
    (run / "plan" / "window-0002.json").unlink()
    view = RunView.read(run)
    assert view.window is not None
    for width in (60, 80, 200):
        lines = text_of(view, width, 40)
        at = next(number for number, line in enumerate(lines) if line.startswith("window 1: 32 slots"))
        assert "+ titles" in lines[at] and "- dates" in lines[at]
        stages = [line.removeprefix(f"stage {stage} ") for stage, line in enumerate(lines[at + 1 : at + 5])]
        cell = stages[1].index(stages[0][:4])
        assert cell == {60: 1, 80: 2, 200: 4}[width] and all(stages[s][s * cell :] == stages[0] for s in range(4)), "one slot later a stage"
        slots = [stages[0][slot * cell : (slot + 1) * cell].strip() for slot in range(32)]
        assert {slot for slot, letters in enumerate(slots) if letters.islower()} == view.window.evaluate
        assert {slot for slot, letters in enumerate(slots) if set(letters) == {"."}} == {
            s for s, held in enumerate(view.window.slots) if not held
        }
        names = dict(part.split(" ")[:2][::-1] for part in "  ".join(lines[at + 5 :]).split("  ") if part[:1].isupper())
        for slot, letters in enumerate(slots):
            held = view.window.tokens(slot)
            assert not held or names[max(held, key=held.__getitem__)] == letters[0].upper()


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("num_jobs", [1, 6, 300])
def test_a_frame_fits_any_terminal(num_jobs, live, tmp_path):
    view = RunView.read(example_runs.make_run(tmp_path / "run", num_jobs=num_jobs, steps=20, live=live))
    for width, height in [(80, 24), (40, 10), (60, 16), (100, 30), (200, 60), (400, 120)]:
        lines = text_of(view, width, height)
        assert len(lines) <= height and all(cell_len(line) <= width for line in lines)
        assert sum(line.startswith("summaries") for line in lines) == 1


def test_of_many_jobs_those_that_run_come_first_and_the_rest_is_counted(tmp_path):
    view = RunView.read(example_runs.make_run(tmp_path / "run", num_jobs=300, steps=20, live=True))
    lines = text_of(view, 80, 24)
    rows = [line for line in lines if " running " in line and not line.startswith("run ")]
    more = next(line for line in lines if line.startswith("and "))
    assert rows and f"and {300 - len(rows)} more: {199 - len(rows)} running, 1 failed, 100 queued" == more
    chosen = text_of(view, 80, 24, ["job-250", "dates"])
    assert [line.split()[0] for line in chosen if "/20 " in line] == ["job-250", "dates"]


def test_a_frame_of_a_thousand_jobs_takes_little_time(tmp_path):
    view = RunView.read(example_runs.make_run(tmp_path / "run", num_jobs=1000, steps=40, live=True))
    times = []
    for _ in range(3):
        began = time.process_time()
        view.refresh()
        text_of(view, 160, 50)
        times.append(time.process_time() - began)
    assert min(times) < 0.3, times


def test_rates_are_of_the_last_minute(tmp_path):
    rate = Rate()
    view = RunView.read(example_runs.make_run(tmp_path / "run", num_jobs=1, steps=20))
    assert rate.of(view) == pytest.approx(20 * 9000 / view.seconds()), "before anything was watched: over the whole run"
    for second in range(0, 200, 10):
        rate.add(second * 50 if second < 100 else 5000 + (second - 100) * 7, float(second))
    assert rate.of(view) == pytest.approx(7)


def test_sparklines():
    assert sparkline([1, 2, 3, 4], 9) == "▁▃▆█" and sparkline([1, 1, 3, 3], 2) == "▁█" and sparkline([], 5) == ""
    assert sparkline([1.0, float("nan"), 2.0], 3, ascii_only=True) == ". #" and sparkline([2.0, 2.0], 4) == "▁▁"


def test_damage_is_said(tmp_path):
    run = example_runs.make_run(tmp_path / "run")
    (run / "queue.json").write_text("{")
    with (run / "jobs" / "names" / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    said = "\n".join(text_of(RunView.read(run), 120, 40))
    assert "cannot be read: queue.json" in said and "1 lines of metrics.jsonl files are damaged and left out" in said


def test_one_frame_is_printed_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    run = example_runs.make_run(tmp_path / "run", live=True)
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["watch", str(run), "--job", "names", "sql"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") < 30 and "names  " in printed and "summaries  running" not in printed and "\x1b" not in printed
    assert main(["watch", str(run), "--job", "nmaes"]) == 2 and "--job: 'nmaes' is no job" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2 and "is not the directory of a run" in capsys.readouterr().err


@pytest.fixture
def watched(tmp_path):
    """Return a run whose lock this process holds, and a function that watches it in a terminal of its own."""
    run = example_runs.make_run(tmp_path / "run", live=True)
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)
    started = []

    def watch() -> tuple[subprocess.Popen, bytearray]:
        master, terminal = pty.openpty()
        here = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        command = [sys.executable, "-m", "megatron_lora", "watch", str(run)]
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=here, start_new_session=True)
        os.close(terminal)
        os.set_blocking(master, False)
        started.append((process, master))
        return process, bytearray()

    def screen(seen: bytearray) -> bytes:
        with contextlib.suppress(OSError):  # nothing new, or the process has ended
            seen += os.read(started[-1][1], 1 << 20)
        return bytes(seen)

    yield run, watch, screen
    for process, master in started:
        process.kill()
        process.wait()
        os.close(master)
    lock.close()


def test_a_live_view_follows_the_run_and_leaves_when_it_ends(watched):
    run, watch, screen = watched
    process, seen = watch()
    wait_for(lambda: b"48/120" in screen(seen), 120)
    metrics = run / "jobs" / "summaries" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 49, "loss": 1.0, "tokens": 5}) + "\n")
    wait_for(lambda: b"49/120" in screen(seen), 60)
    status = unsealed((run / "status.json").read_text()) | {"exit_status": 75}
    (run / "status.json").write_text(json.dumps(status))
    wait_for(lambda: screen(seen) and process.poll() is not None, 60)
    assert process.returncode == 0 and b"ended with 75" in screen(seen)


def test_ctrl_c_leaves_the_view_and_not_the_run(watched):
    run, watch, screen = watched
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    process, seen = watch()
    wait_for(lambda: b"48/120" in screen(seen), 120)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: screen(seen) and process.poll() is not None, 60)
    assert process.returncode == 0 and b"Traceback" not in screen(seen)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
