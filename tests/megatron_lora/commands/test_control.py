"""The commands that control a run, from their arguments to what they print: without a process, and with one that takes requests."""

import json
import threading
from pathlib import Path

import example_runs
import oracle
import pytest
import yaml

from megatron_lora.__main__ import main
from megatron_lora.commands import control, launch, rank
from megatron_lora.config.schema import load_config
from megatron_lora.environment import environment
from megatron_lora.files import unsealed
from megatron_lora.output.changes import Run
from megatron_lora.output.events import Change, EventLog, read_events
from megatron_lora.output.requests import RequestFolder
from megatron_lora.output.run_directory import RunDirectory, job_states
from megatron_lora.output.take_requests import take_requests

TOKENS = 64


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("materials")
    oracle.make_model(root / "model")
    for seed, (name, longest) in enumerate({"a": 20, "long": 120}.items()):
        oracle.make_rows(root / f"{name}.jsonl", num_rows=12, seed=seed, longest=longest)
    return root


@pytest.fixture
def run(materials, tmp_path, monkeypatch) -> Path:
    """A run of jobs a and b that was started in `materials` and stopped; the working directory is another."""
    config = {
        "base_model": "model",
        "output_dir": str(tmp_path / "run"),
        "microbatch_tokens": TOKENS,
        "jobs": [{"name": name, "datasets": [{"path": "a.jsonl", "type": "prompt_completion"}]} for name in "ab"],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(materials)
    with RunDirectory.create(load_config(tmp_path / "config.yaml"), environment()) as directory:
        directory.set_job("a", "running")
        directory.finish(75, "stopped")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def job_file(materials: Path, **keys) -> str:
    """Write job.yaml into the working directory; its data lie beside it, by a relative path."""
    Path("more.jsonl").write_bytes((materials / "a.jsonl").read_bytes())
    job = {"name": "c", "datasets": [{"path": "more.jsonl", "type": "prompt_completion"}]} | keys
    Path("job.yaml").write_text(yaml.safe_dump(job))
    return "job.yaml"


def waiting(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((run / "requests").glob("*.json"))]


def said(capsys, status: int, *arguments) -> str:
    """Run a command; return the one stream on which it prints, errors being one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    out = capsys.readouterr()
    if status:
        assert out.err.count("\n") == 1 and out.err.startswith("megatron-lora: ")
    return out.err if status else out.out


def test_requests_to_a_run_without_a_process_are_kept_and_foreseen_by_those_that_follow(run, capsys):
    assert "no process holds" in said(capsys, 0, "pause", run, "a", "b")
    assert "b: is paused already" in said(capsys, 2, "pause", run, "b")
    assert "takes effect when the run is started again" in said(capsys, 0, "resume", run, "b")
    said(capsys, 0, "set", run, "a", "priority=2", "b")
    assert [(each["verb"], each["names"], each["values"]) for each in waiting(run)] == [
        ("pause", ["a", "b"], {}),
        ("resume", ["b"], {}),
        ("set", ["a", "b"], {"priority": 2}),
    ]
    with RunDirectory.create(load_config(run.parent / "config.yaml")):
        assert waiting(run) == [] and job_states(run) == {"a": "paused", "b": "queued"}
        assert [job.priority for job in load_config(run / "config.yaml").jobs] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pause", "RUN", "A"], "'A': is no job of this run (did you mean a?); its jobs are a, b"),
        (["resume", "RUN", "a"], "a: is queued, not paused"),
        (["cancel", "RUN", "a", "x"], "'x': is no job of this run"),
        (["set", "RUN", "a"], "needs at least one job and one key=value"),
        (["set", "RUN", "priority=2"], "needs at least one job and one key=value"),
        (["set", "RUN", "a", "priority="], "'priority=': has no value"),
        (["set", "RUN", "a", "priority=1", "priority=2"], "'priority=2': is given twice"),
        (["set", "RUN", "a", "priority=[1"], "not valid YAML"),
        (["set", "RUN", "a", "priority=high"], "jobs.a.priority: 'high' is not"),
        (
            ["set", "RUN", "a", "r=32"],
            "r=32: cannot be set while a job trains, because its result must not depend on when; set takes priority",
        ),
        (["pause", "RUN/jobs", "a"], "run/jobs: is not the directory of a run of this version (it has no status.json)"),
        (["pause", "config.yaml", "a"], "config.yaml: is not the directory of a run"),
        (["pause", ".", "a"], ".: is not the directory of a run"),
        (
            ["add", "nowhere", "job.yaml"],
            "nowhere: is not the directory of a run of this version (it has no status.json); name a run's output_dir",
        ),
        (["jobs", "nowhere"], "nowhere: is not the directory of a run"),
        (["add", "RUN", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_request(arguments, words, run, capsys):
    assert words in said(capsys, 2, *(argument.replace("RUN", str(run)) for argument in arguments))
    assert not (run / "requests").exists()


def test_jobs_that_are_over_and_runs_of_another_version_are_refused(run, capsys):
    status = unsealed((run / "status.json").read_text())
    status["jobs"]["b"] = {"state": "done", "reason": ""}
    (run / "status.json").write_text(json.dumps(status))
    assert "b: is done, so that nothing changes it any more" in said(capsys, 2, "pause", run, "a", "b")
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "hologram: true\n")
    assert "is not the directory of a run of this version (hologram: unknown key" in said(capsys, 2, "pause", run, "a")
    (run / "config.yaml").unlink()
    assert "no such file" in said(capsys, 2, "cancel", run, "a")
    (run / "status.json").write_text("{")
    assert main(["jobs", str(run)]) == 2 and main(["pause", str(run), "a"]) == 2


# ---- add ----


def test_an_added_job_is_complete_has_absolute_paths_and_trains_with_the_others(run, materials, capsys, monkeypatch):
    text = said(capsys, 0, "add", run, job_file(materials, lora_alpha=8), "r=4", "--no-wait", "learning_rate=1e-3")
    assert text.startswith("c: checked against ") and "takes effect when the run is started again" in text
    (request,) = waiting(run)
    (job,) = request["jobs"]
    assert job["datasets"][0]["path"] == str(run.parent / "more.jsonl")
    assert (job["r"], job["lora_alpha"], job["learning_rate"], job["seed"]) == (4, 8.0, 1e-3, 0)
    monkeypatch.chdir(materials)  # where the run is started again, with the config of its first start
    config = load_config(run.parent / "config.yaml")
    from megatron_lora.commands.checks import check_run

    assert len(check_run(config).data) == 3  # those that were there, and c
    with RunDirectory.create(config) as directory:
        assert [each.name for each in load_config(run / "config.yaml").jobs] == ["a", "b", "c"]
        assert directory.status()["jobs"]["c"]["state"] == "queued"


def test_jobs_with_defaults_are_added_together(run, materials, capsys):
    job_file(materials)
    datasets = [{"path": "more.jsonl", "type": "prompt_completion"}]
    Path("jobs.yaml").write_text(
        yaml.safe_dump({"defaults": {"r": 8, "datasets": datasets}, "jobs": [{"name": "c"}, {"name": "d", "r": 2}]})
    )
    assert said(capsys, 0, "add", run, "jobs.yaml", "jobs.d.lora_dropout=0.5").startswith("c, d: checked")
    assert [(job["name"], job["r"], job["lora_dropout"]) for job in waiting(run)[0]["jobs"]] == [("c", 8, 0.0), ("d", 2, 0.5)]
    assert "jobs.C.name: the run has a job of this name" in said(capsys, 2, "add", run, "job.yaml", "name=C")  # c waits, and counts


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "A"}, "jobs.A.name: the run has a job of this name (upper and lower case"),
        ({"sweep": {}}, "beside jobs give defaults and sweep alone"),
        ({"jobs": [], "base_model": "x"}, "base_model: belongs to the run"),
        ({"flavour": 1}, "jobs.c.flavour: unknown key"),
        ({"r": "16"}, "jobs.c.r: '16' is not a LoRA rank"),
        ({"datasets": [{"path": "nowhere.jsonl", "type": "text"}]}, "nowhere.jsonl"),
        ({"datasets": [{"path": "LONG", "type": "prompt_completion"}]}, f"microbatch_tokens: {TOKENS} is less than the "),
        ({"init_adapter": "nowhere"}, "nowhere': no such directory"),
        ({"target_modules": ["x_proj"]}, "'x_proj' is unknown"),
        ({"global_batch_size": 0}, "jobs.c.global_batch_size"),
    ],
)
def test_jobs_that_a_config_may_not_have_are_refused_before_they_are_queued(keys, words, run, materials, capsys):
    file = job_file(materials, **keys)
    Path(file).write_text(Path(file).read_text().replace("LONG", str(materials / "long.jsonl")))
    assert words in said(capsys, 2, "add", run, file)
    assert not (run / "requests").exists()


# ---- a live run ----


class Living:
    """A process that holds a run's lock and takes requests like a trainer, in a thread."""

    def __init__(self, run: Path):
        self.directory = RunDirectory.create(load_config(run.parent / "config.yaml"))
        self.run = Run(config=load_config(run / "config.yaml"), states=dict.fromkeys(job_states(run), "running"))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        folder, log, window = RequestFolder(self.directory.path), EventLog(self.directory.path), 0
        while not self.ended.wait(0.05):
            window += 1
            self.run = take_requests(folder, log, self.run, window=window, slot=32 * window).run

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        self.thread.join()
        self.directory.close()


def test_a_live_run_answers_with_the_window_from_which_a_request_takes_effect(run, capsys):
    with Living(run) as living:
        text = said(capsys, 0, "set", run, "b", "save_steps=3", "priority=0.5")
        events = read_events(run)
        assert text == "".join(
            f"b: {key} is {value}, from window {event.window} on (slot {event.slot})\n"
            for event, key, value in zip(events, ("save_steps", "priority"), (3, 0.5), strict=True)
        )
        assert said(capsys, 0, "pause", run, "a").startswith("a: paused, from window ")
        living.run.states["b"] = "done"  # what status.json does not say yet
        assert "b: is done" in said(capsys, 2, "cancel", run, "b")
    assert (run / "requests" / "refused").is_dir()


def test_a_live_run_that_does_not_take_a_request_in_time_has_it(run, capsys, monkeypatch):
    monkeypatch.setattr(control, "WAIT_S", 0.2)
    with RunDirectory.create(load_config(run.parent / "config.yaml")):
        assert "the run takes it when it plans its next window" in said(capsys, 0, "pause", run, "a")
        assert "the run takes it" in said(capsys, 0, "pause", run, "b", "--no-wait") and len(waiting(run)) == 2


def test_a_request_that_someone_removes_is_not_taken_for_applied(run, capsys, monkeypatch):
    def remove_all(seconds: float) -> None:
        for file in (run / "requests").glob("*.json"):
            file.unlink()

    monkeypatch.setattr(control.time, "sleep", remove_all)
    with RunDirectory.create(load_config(run.parent / "config.yaml")):
        assert "was removed from" in said(capsys, 0, "pause", run, "a")


def test_a_run_whose_directory_cannot_be_written_is_not_controlled(run, capsys):
    (run / "requests").write_text("in the way")
    assert "requests: cannot be written (File exists); a run is controlled by those who may write" in said(capsys, 2, "pause", run, "a")


def test_keep_alive_reaches_the_ranks(run, monkeypatch):
    commands, kept = [], []

    def start_ranks(command, *rest):
        commands.append(command)
        return launch._Ending(status=1)

    monkeypatch.setattr(launch, "start_ranks", start_ranks)
    monkeypatch.setattr(launch, "check_run", lambda *arguments, **keys: type("Inputs", (), {"failed": {}, "rests_on": {}}))
    monkeypatch.setattr(rank, "_as_rank", lambda work, stop: work())
    monkeypatch.setattr(rank, "_load", lambda path, overrides: None)
    monkeypatch.setattr(rank, "_train", lambda config, stop, live: kept.append(live.keep_alive) or 0)
    for flags in ([], ["--keep-alive"]):
        main(["train", str(run.parent / "config.yaml"), *flags, "seed=0"])
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        arguments = commands[-1][commands[-1].index("megatron_lora") + 1 :]
        assert main(arguments) == 0
        monkeypatch.delenv("RANK")
    assert kept == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output_dir=again", "--keep-alive"], "--replay: repeats a run to its end and waits for no other jobs; leave --keep-alive out"),
        (["output_dir=again", "parallel.pipeline=2"], "--replay: parallel.pipeline: 2 differs from 1 in"),
        (["output_dir=again", "jobs.a.r=4"], "--replay: jobs.a.r: 4 differs from 16 in"),
        ([], "holds a run; choose a new directory, or leave --replay out to resume that run"),
    ],
)
def test_a_run_is_repeated_with_its_own_jobs_and_ranks_in_a_new_directory(words, message, run, materials, capsys, monkeypatch):
    assert "has no events of start 1" in said(capsys, 2, "train", "config.yaml", "output_dir=again", "--replay", run)
    EventLog(run).append([Change(event="started", job="a")], window=0, slot=0)
    RequestFolder(run).path.mkdir()
    (RequestFolder(run).path / "something").touch()
    assert message in said(capsys, 2, "train", "config.yaml", "--replay", run, *words)
    begun = yaml.safe_load((run / "config.yaml").read_text())
    begun["parallel"]["tensor"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(begun))
    asked = said(capsys, 2, "train", "config.yaml", "output_dir=again", "--replay", run, "parallel.tensor=2", "parallel.expert=2")
    assert "--replay: parallel.expert: 2 differs from 1 in" in asked


# ---- jobs ----


def test_the_jobs_of_a_run_as_json_and_as_a_table(tmp_path, capsys):
    run = example_runs.make_run(tmp_path / "example", num_jobs=6, live=True)
    found = json.loads(said(capsys, 0, "jobs", run, "--json"))
    jobs = {row["job"]: row for row in found["jobs"]}
    assert found["live"] and list(jobs) == list(example_runs.NAMES) and found["requests"] == 0
    queued = [row for row in jobs.values() if row["state"] == "queued"]
    assert [row["place"] for row in queued] == list(range(1, len(queued) + 1)) and all(row["reason"] for row in queued)
    running = [row for row in jobs.values() if row["state"] == "running"]
    assert running and all(row["eta_s"] > 0 and 0 < row["step"] < row["steps"] and row["eval_loss"] > 0 for row in running)
    assert sum(row["share"] for row in jobs.values()) == pytest.approx(1) and all(row["device_seconds"] for row in running)
    text = said(capsys, 0, "jobs", run)
    for row in jobs.values():
        line = next(line for line in text.splitlines() if f" {row['job']} " in line)
        assert row["state"] in line and f"{row['step']}/{row['steps']}" in line
    assert "live" in text.splitlines()[-1]
