"""The runs that need several GPUs: end_to_end.py takes their commands, budgets are tried and the fastest kept, ends are seen."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import endings  # noqa: E402
import several_gpus  # noqa: E402
from e2e_options import check, parallel_of, read_options  # noqa: E402
from several_runs import COMPARISONS, RUNS, Run, chosen, ratios  # noqa: E402
from synthetic_jobs import read_workload  # noqa: E402

WORKLOAD = {"tiny": {"stages": 2, "capacity": 64, "data": [[[10, 20, 30], [14, 25, 9]], [[8, 16], [22, 31]], [[50], [33]]]}}
TINY = Run(name="tiny-ours", machine=1, shape="tiny", workload="tiny", budgets=(50, 64))


def settings(folder: Path, *words: str):
    """Return the options of a driver that keeps all in a folder."""
    (folder / "lengths.json").write_text(json.dumps(WORKLOAD))
    passed = ["--", "--lengths", str(folder / "lengths.json"), "--commit", "c0"]
    return several_gpus.parser().parse_args(["--results", str(folder), "--traces", str(folder / "traces"), *words, *passed])


def test_every_command_is_one_that_the_benchmark_takes(tmp_path):
    options = several_gpus.parser().parse_args([])
    assert len({run.name for run in RUNS}) == len(RUNS) and options.only == RUNS
    for run in RUNS:
        for command in (several_gpus.trial(run, options, tmp_path / "t"), several_gpus.measurement(run, options, max(run.budgets))):
            at = command.index(str(ROOT / "scripts/bench/end_to_end.py"))
            launched, cases = read_options(command[at + 1 :])
            check(launched, cases, [read_workload(launched.lengths, case.workload) for case in cases])
            assert command[at - 1] == str(parallel_of(launched).world_size) and run.gpus <= run.machine
        assert cases[0].calibrate and cases[0].warm_seconds == 60 and cases[0].jobs.ranks == (16,)


def test_every_comparison_is_between_runs_of_one_model_on_one_machine():
    runs = {run.name: run for run in RUNS}
    for comparison in COMPARISONS:
        fast, slow = runs[comparison.fast], runs[comparison.slow]
        assert (fast.machine, fast.shape, fast.workload) == (slow.machine, slow.shape, slow.workload)
    assert [each["ratio"] for each in ratios({"32b-ours": 3.0, "32b-flush": 2.0, "8b-one": 1.0})] == [1.5]


def test_budgets_are_tried_and_the_fastest_is_measured(tmp_path, monkeypatch, capfd):
    options = settings(tmp_path, "--seconds", "0.1")
    monkeypatch.setattr(several_gpus, "RUNS", (TINY,))
    assert several_gpus.measure(TINY, options)
    tried = several_gpus.lines(tmp_path / "budgets.jsonl")
    speeds = {line["settings"]["budget"]: line["results"]["tokens_per_s"] for line in tried}
    assert list(speeds) == [50, 64] and all(line["run"] == "tiny-ours" and line["settings"]["steps"] == 4 for line in tried)
    (line,) = several_gpus.lines(tmp_path / "end_to_end.jsonl")
    assert line["settings"]["budget"] == max(speeds, key=speeds.get)
    assert line["results"]["prediction"]["cost_from"] == "calibration" and len(list((tmp_path / "traces").glob("*.json"))) == 1
    other_jobs = line | {"settings": line["settings"] | {"jobs": line["settings"]["jobs"] | {"count": 2}}, "results": {"tokens_per_s": 1.0}}
    other_gpu = line | {"hardware": "2 x another", "results": {"tokens_per_s": 2.0}}
    mine, number = line["hardware"], line["results"]["tokens_per_s"]
    assert several_gpus.rates([line, other_jobs, other_gpu], "c0", mine) == {"tiny-ours": number}
    assert several_gpus.rates([line, other_gpu], "c0", "1 x another") == {"tiny-ours": 2.0}
    assert several_gpus.rates([line], "c1", mine) == {}


def test_a_run_that_cannot_start_is_said_and_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(several_gpus, "machine", lambda runs, gpus: [TINY])
    monkeypatch.setattr(several_gpus, "launch", lambda *_: [sys.executable, "-c", "raise SystemExit(1)"])
    (tmp_path / "lengths.json").write_text(json.dumps(WORKLOAD))
    lengths = ["--", "--lengths", str(tmp_path / "lengths.json")]
    assert several_gpus.main(["--results", str(tmp_path), "--traces", str(tmp_path), *lengths]) == 1
    assert "tiny-ours: no budget could be run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "39b"], "'39b' begins no run's name; choose among 32b-ours, "),
        (["--gpus", "3"], "none of the runs that are asked for is of a machine of so many GPUs"),
    ],
)
def test_wrong_options_are_one_line(words, says, capsys):
    for script in (several_gpus, endings):
        with pytest.raises(SystemExit) as left:
            script.main(words)
        told = capsys.readouterr().err
        assert left.value.code == 2 and says in told and told.count("\n") == 1
    assert [run.name for run in chosen("8b-dp2,32b-today")] == ["32b-today", "8b-dp2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--layers 1,2", "--layers: 32b-ours has 64 layers on 2 stages"),
        ("--recompute full,full", "--recompute: 32b-ours has 64 layers, not 2"),
        ("--budget 100", "--budget: 100 tokens do not hold the longest sample"),
        ("--case jobs=1 --case jobs=2", "32b-ours has one case, a shape and a layout of its own"),
        ("--pipeline 4", "32b-ours has one case, a shape and a layout of its own"),
        ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
    ],
)
def test_options_that_do_not_go_with_a_run_are_refused_before_anything_starts(words, says, capsys):
    with pytest.raises(SystemExit) as left:
        several_gpus.main(["--gpus", "2", "--dry-run", "--only", "32b-ours", "--", *words.split()])
    told = capsys.readouterr()
    assert left.value.code == 2 and says in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("shape", sorted({run.shape for run in RUNS}))
def test_rows_of_every_shape_fit_the_runs_that_are_ended(shape, tmp_path):
    """The architecture decides which tokenizer class reads the files."""
    from megatron_lora.data.tokenizer import load_tokenizer

    config = endings.config_of(Run(name="run", machine=2, shape=shape, workload="tiny", pipeline=2), tmp_path, 40)
    tokenizer = load_tokenizer(config["base_model"])
    for row in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()):
        parts = [tokenizer(row[part])["input_ids"] for part in ("prompt", "completion")]
        assert min(map(len, parts)) > 4 and tokenizer.unk_token_id not in sum(parts, [])
        assert sum(map(len, parts)) < config["defaults"]["sequence_len"]


def test_a_killed_rank_is_seen_to_end_the_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    two = Run(name="tiny-two", machine=2, shape="tiny", workload="tiny", pipeline=2)
    found = endings.ended(two, "killed", 30)
    assert found["good"] and found["status"] == 1 and found["seconds"] < 20 and found["says"] == endings.LINES["killed"].strip()
    assert not endings.verdict("killed", 0, found["error"])["good"]
    assert not endings.verdict("killed", 1, found["error"] + "and more\n")["good"] and not endings.verdict("still", 1, "")["good"]
