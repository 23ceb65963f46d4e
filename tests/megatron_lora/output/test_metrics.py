"""What a run reports: lines, events, tables and curves hold the reported numbers, and a closed terminal does no harm."""

import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import types

import pytest
from rich.console import Console

from megatron_lora.errors import UserError
from megatron_lora.output.display import STYLES, LiveTable, PlainLines, duration, make_display
from megatron_lora.output.job_states import FOLLOWERS
from megatron_lora.output.metrics import (
    EvalReport,
    JobSummary,
    JsonlMetrics,
    LoggedDigest,
    StepReport,
    metrics_file,
    read_evaluations,
    read_lines,
    read_metrics,
)
from megatron_lora.output.observers import make_observers
from megatron_lora.output.standing import Best
from megatron_lora.output.trackers import TensorBoardMetrics, WandbMetrics
from scripts.loss_picture import plot_losses, smooth

REPORT = StepReport(
    job="a",
    step=1,
    total_steps=4,
    epoch=0.25,
    loss=2.5,
    learning_rate=1e-4,
    grad_norm=0.75,
    tokens=100,
    target_tokens=40,
    samples=8,
    seconds=1.5,
    skipped=False,
)
EVALUATION = EvalReport(
    job="a", step=1, eval_loss=2.0, eval_accuracy=0.625, eval_tokens=16, eval_samples=3, seconds=0.5, best=Best(1, 2.0)
)  # fmt: skip
JOBS = [JobSummary("a", 4), JobSummary("b", 40)]


def report(**changes):
    return dataclasses.replace(REPORT, **changes)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ---- metrics.jsonl ----


def test_a_line_per_step_with_the_contracts_fields(tmp_path):
    observer = JsonlMetrics(tmp_path)
    observer.on_start(JOBS)
    observer.on_step(report())
    path = tmp_path / "jobs" / "a" / "metrics.jsonl"
    assert json.loads(path.read_text()) == {  # before close: lines are flushed
        "step": 1,
        "epoch": 0.25,
        "loss": 2.5,
        "learning_rate": 1e-4,
        "grad_norm": 0.75,
        "tokens": 100,
        "target_tokens": 40,
        "samples": 8,
        "seconds": 1.5,
        "skipped": False,
    }
    observer.on_step(report(step=2, loss=math.nan, grad_norm=math.inf, skipped=True))
    observer.close()
    second = read_metrics(path)[1]
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, True)
    assert "NaN" not in path.read_text()


def test_a_run_appends_behind_a_line_that_was_cut_off(tmp_path):
    path = metrics_file(tmp_path, "a")
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
    observer = JsonlMetrics(tmp_path)
    observer.on_start(JOBS)
    observer.on_step(report(step=2))
    observer.close()
    assert [step["step"] for step in read_metrics(path)] == [1, 2]
    path.write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: is no step or evaluation of the job \(Unterminated string"):
        read_metrics(path)


def test_an_evaluation_is_a_line_of_its_own_behind_its_step(tmp_path):
    observer = JsonlMetrics(tmp_path)
    observer.on_start(JOBS)
    observer.on_step(report())
    observer.on_evaluation(EVALUATION)
    observer.on_step(report(step=2))
    observer.on_evaluation(dataclasses.replace(EVALUATION, step=2, eval_loss=math.nan, eval_accuracy=0.0))
    observer.on_step(report(step=3))
    observer.on_evaluation(dataclasses.replace(EVALUATION, step=3, eval_loss=1000.0))
    observer.close()
    path = metrics_file(tmp_path, "a")
    assert [step["step"] for step in read_metrics(path)] == [1, 2, 3]
    first, second, third = read_evaluations(path)
    expected = {"step": 1, "eval_loss": 2.0, "eval_perplexity": math.exp(2), "eval_accuracy": 0.625, "eval_tokens": 16, "eval_samples": 3}
    assert first == expected | {"seconds": 0.5} and "eval_loss" in path.read_text().splitlines()[1]
    assert (second["eval_loss"], second["eval_perplexity"], third["eval_loss"], third["eval_perplexity"]) == (None, None, 1000.0, None)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("s1 s3", ":2: .*step 3 behind step 1"),
        ("s1 s1", ":2: .*step 1 behind step 1"),
        ("s2", ":1: .*step 2 behind step 0"),
        ("s1 e1 e1", ":3: .*an evaluation at step 1 behind an evaluation at step 1"),
        ("s1 s2 e1", ":3: .*an evaluation at step 1 behind step 2"),
        ("s1 e2", ":2: .*an evaluation at step 2 behind step 1"),
        ("e0 s1 s2 e2 s3", ""),
    ],
)
def test_the_order_of_lines_is_that_of_the_steps(tmp_path, lines, words):
    said = [{"step": int(line[1:])} | ({"eval_loss": 1.0} if line[0] == "e" else {}) for line in lines.split()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    if not words:
        assert read_lines(tmp_path / "metrics.jsonl") == said
        return
    with pytest.raises(UserError, match=f"metrics.jsonl{words}"):
        read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("separator", ["\f", "\v", "\x1c", "\x85", "\u2028", "\r\f"])
def test_lines_end_with_a_line_feed_alone(tmp_path, separator):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}{separator}{{"step": 2}}\n')
    with pytest.raises(UserError, match="metrics.jsonl:1: is no step"):
        read_lines(tmp_path / "metrics.jsonl")


def test_the_digest_of_what_was_logged_goes_on_as_steps_are(tmp_path):
    observer, path = JsonlMetrics(tmp_path), metrics_file(tmp_path, "a")
    running = LoggedDigest(path)
    observer.on_start(JOBS)
    digests = {}
    for step in (1, 2, 3):
        observer.on_step(report(step=step))
        digests[step, True] = running.until(step, True)
        observer.on_evaluation(dataclasses.replace(EVALUATION, step=step))
        digests[step, False] = running.until(step, False)
    observer.close()
    assert len(set(digests.values())) == 6
    for (step, due), digest in digests.items():
        lines = path.read_bytes().split(b"\n")[: 2 * step - due]
        assert LoggedDigest(path).until(step, due) == digest == hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()


# ---- trackers ----


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = TensorBoardMetrics(tmp_path)
    observer.on_start(JOBS)
    observer.on_step(report())
    observer.on_step(report(step=2, loss=2.0, grad_norm=math.nan))
    observer.on_step(report(job="b", loss=9.0))
    observer.on_evaluation(EVALUATION)
    observer.on_status("b", "failed", "why")
    observer.close()
    events = EventAccumulator(str(tmp_path / "jobs" / "a")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.0)]
    assert [event.step for event in events.Scalars("train/grad_norm")] == [1]
    found = {name: events.Scalars(f"eval/{name}")[0] for name in ("loss", "perplexity", "accuracy")}
    assert {name: (event.step, event.value) for name, event in found.items()} == {
        "loss": (1, 2.0),
        "perplexity": (1, pytest.approx(math.exp(2))),
        "accuracy": (1, 0.625),
    }
    assert [event.value for event in EventAccumulator(str(tmp_path / "jobs" / "b")).Reload().Scalars("train/loss")] == [9.0]


def fake_wandb(log, fail=False):
    """Stand in for the package: its runs write down what is logged."""
    module = types.ModuleType("wandb")

    class Error(Exception):
        pass

    class Run:
        def __init__(self, name):
            self.name, self.summary = name, {}

        def log(self, values, step):
            log.append((self.name, step, *(values[tag] for tag in ("train/loss", "eval/loss") if tag in values)))

        def finish(self):
            log.append((self.name, "finished", self.summary))

    def init(*, name, **options):
        if fail and name == "b":
            raise Error("no API key\nlong story")
        log.append((name, options["project"], options["group"]))
        return Run(name)

    module.Error, module.init = Error, init
    return module


def test_wandb_has_a_run_per_job(tmp_path, monkeypatch):
    log = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log))
    observer = WandbMetrics(tmp_path / "out", "project")
    observer.on_start(JOBS)
    observer.on_step(report(job="b"))
    observer.on_evaluation(EVALUATION)
    observer.on_status("b", "failed", "why")
    observer.close()
    assert log[:4] == [("a", "project", "out"), ("b", "project", "out"), ("b", 1, 2.5), ("a", 1, 2.0)]
    # A job's run ends with the job.
    assert log[4:] == [("b", "finished", {"state": "failed: why"}), ("a", "finished", {"best": {"step": 1, "value": 2.0}})]


def test_wandb_that_cannot_be_used(tmp_path, monkeypatch):
    log = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log, fail=True))
    with pytest.raises(UserError, match=r"MEGATRON_LORA_WANDB: 'project' cannot be reported to \(no API key\); run wandb login"):
        WandbMetrics(tmp_path, "project").on_start(JOBS)
    assert log[-1] == ("a", "finished", {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb; pip install wandb"):
        WandbMetrics(tmp_path, "project")


# ---- display ----


def test_plain_lines_are_few_and_tell_every_end(tmp_path):
    out, clock = io.StringIO(), Clock()
    observer = make_display(out, clock)
    assert isinstance(observer, PlainLines)
    observer.on_start(JOBS)
    for step in range(1, 5):
        clock.now += 2
        observer.on_status("a", "running", "")
        observer.on_step(report(step=step))
        observer.on_step(report(job="b", step=step, total_steps=40, tokens=300, loss=1.0))
    observer.on_step(report(job="b", step=5, total_steps=40, grad_norm=math.nan, skipped=True))
    observer.on_status("a", "done", "")
    observer.on_status("b", "failed", "the norm")
    observer.close()
    assert out.getvalue().splitlines() == [
        "a: step 1/4, loss 2.5000, lr 1.00e-04, grad norm 0.75, 50 tokens/s (100%), ETA 6s",
        "b: step 1/40, loss 1.0000, lr 1.00e-04, grad norm 0.75, 150 tokens/s (75%), ETA 1m18s",
        "a: step 4/4, loss 2.5000, lr 1.00e-04, grad norm 0.75",
        "b: step 5/40, loss 2.5000, lr 1.00e-04, grad norm nan skipped, 162 tokens/s (100%), ETA 56s",
        "a: done",
        "b: failed: the norm",
    ]


def test_every_evaluation_is_a_plain_line():
    out = io.StringIO()
    observer = PlainLines(out, Clock())
    observer.on_start(JOBS)
    observer.on_evaluation(EVALUATION)
    observer.on_evaluation(dataclasses.replace(EVALUATION, step=4, eval_loss=2.5, eval_accuracy=0.5))
    assert out.getvalue().splitlines() == [
        "a: after step 1: eval loss 2.0000, perplexity 7.389, accuracy 62.5%, the best so far",
        "a: after step 4: eval loss 2.5000, perplexity 12.18, accuracy 50.0%",
    ]


def test_the_table_has_columns_of_evaluations_where_there_are_any():
    (out, console), clock = terminal(), Clock()
    observer = LiveTable(console, clock)
    observer.on_start(JOBS)
    observer.on_step(report())
    assert "eval loss" not in out.getvalue()
    observer.on_evaluation(dataclasses.replace(EVALUATION, step=3, eval_loss=2.25))
    observer.on_status("b", "stopped", "why")
    observer.close()
    last = out.getvalue().rpartition("job")[2]
    assert "eval loss" in last and "2.2500" in last and "2.0000 at 1" in last and "stopped: why" in last
    out, console = terminal()
    observer = LiveTable(console, clock)
    observer.on_start([JobSummary("a", 4, 2, Best(2, 1.75))])
    observer.close()
    assert "1.7500 at 2" in out.getvalue(), "of an earlier start"


def test_plain_lines_come_at_their_interval():
    out, clock = io.StringIO(), Clock()
    observer = PlainLines(out, clock)
    observer.on_start([JobSummary("a", 100)])
    for step in range(1, 32):
        observer.on_step(report(step=step, total_steps=100))
        clock.now += 1
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [f"a: step {step}/100" for step in (1, 11, 21, 31)]


def test_the_rate_is_that_of_the_last_steps():
    out, clock = io.StringIO(), Clock()
    observer = PlainLines(out, clock)
    observer.on_start([JobSummary("a", 1000)])
    for step in range(1, 61):
        clock.now += 10 if step <= 30 else 1
        observer.on_step(report(step=step, total_steps=1000, skipped=step == 60))
    assert out.getvalue().splitlines()[-1].endswith("100 tokens/s (100%), ETA 15m40s")


def terminal(height=30):
    out = io.StringIO()
    return out, Console(file=out, force_terminal=True, width=140, height=height, color_system=None)


def test_the_table_shows_every_job():
    (out, console), clock = terminal(), Clock()
    observer = LiveTable(console, clock)
    observer.on_start(JOBS)
    clock.now += 2
    observer.on_step(report())
    observer.on_status("b", "failed", "[red] norm")
    observer.close()
    last = out.getvalue().rpartition("job")[2]
    for shown in ("1/4", "2.5000", "1.00e-04", "0.75", "50", "100%", "6s", "running", "0/40", "failed: [red] norm"):
        assert shown in last
    assert out.getvalue().count("\x1b[?25l") <= out.getvalue().count("\x1b[?25h")


def test_the_table_is_redrawn_a_few_times_a_second_at_most():
    (out, console), clock = terminal(), Clock()
    observer = LiveTable(console, clock)
    observer.on_start(JOBS)
    for step in range(1, 101):
        clock.now += 0.01
        observer.on_step(report(step=step, total_steps=100))
    assert 4 <= out.getvalue().count("tokens/s") <= 6


def test_a_table_that_is_too_long_shows_the_jobs_that_matter():
    (out, console), clock = terminal(height=10), Clock()
    observer = LiveTable(console, clock)
    observer.on_start([JobSummary(f"job{index}", 4) for index in range(40)])
    observer.on_status("job39", "failed", "why")
    for index in range(30, 34):
        observer.on_status(f"job{index}", "done", "")
    observer.close()
    last = out.getvalue().rpartition("tokens/s")[2]
    assert "job39" in last and "and 36 more" in last and "32 queued, 4 done" in last


def test_durations():
    assert [duration(seconds) for seconds in (0.2, 59, 60, 3599, 3600, 90000)] == ["0s", "59s", "1m00s", "59m59s", "1h00m", "25h00m"]


# ---- all of them, and the picture ----


def test_a_run_gets_its_observers_started(tmp_path, monkeypatch, capsys):
    log = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log))
    for environment, trackers in (({}, []), ({"MEGATRON_LORA_WANDB": "p"}, [("a", "p", tmp_path.name)])):
        observers = make_observers(tmp_path, environment)
        for observer in observers:
            observer.on_start([JobSummary("a", 4)])
            observer.on_step(report(step=1 + len(trackers)))
            observer.close()
        assert log[:1] == trackers
    assert len(read_metrics(metrics_file(tmp_path, "a"))) == 2
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path / "jobs" / "a"))
    assert capsys.readouterr().out.count("/4, loss 2.5000") == 2


def test_loss_curves_become_a_picture(tmp_path):
    observer = JsonlMetrics(tmp_path)
    observer.on_start(JOBS)
    for step in range(1, 5):
        observer.on_step(report(step=step, loss=math.nan if step == 2 else 4 / step))
        if step == 3:
            observer.on_evaluation(dataclasses.replace(EVALUATION, step=step))
    observer.close()
    files = {name: metrics_file(tmp_path, name) for name in ("a", "b")}
    plot_losses(files, tmp_path / "deep" / "losses.png")
    assert (tmp_path / "deep" / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn = (tmp_path / "deep" / "losses.png").read_bytes()
    lines = files["a"].read_text().splitlines(keepends=True)
    files["a"].write_text("".join(line for line in lines if "eval_loss" not in line))
    plot_losses(files, tmp_path / "without.png")
    assert len(lines) == 5 and (tmp_path / "without.png").read_bytes() != drawn
    with pytest.raises(UserError, match="does not exist"):
        plot_losses({"c": tmp_path / "none"}, tmp_path / "losses.png")


def test_smoothing_starts_at_the_first_loss_and_follows_a_constant():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([4.0, 1.0])[1] == pytest.approx((0.8 * 4 + 1) / 1.8)


def test_every_state_of_a_job_can_be_shown():
    assert STYLES.keys() == FOLLOWERS.keys()
