"""The end-to-end benchmark on CPU: every policy and kind of adapters does the same training, in every layout, and says what it found."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
WORKLOAD = {"tiny": {"stages": 2, "capacity": 64, "data": [[[10, 20, 30], [14, 25, 9]], [[8, 16], [22, 31]], [[50], [33]]]}}
JOBS = ["--shape", "tiny", "--workload", "tiny", "--budget", "64", "--jobs", "3", "--ranks", "4,8,16", "--steps", "3"]


def files(folder: Path) -> list[str]:
    """Write the workload; return the options that read it and keep results and losses beside it."""
    (folder / "lengths.json").write_text(json.dumps(WORKLOAD))
    names = {"--lengths": "lengths.json", "--output": "results.jsonl", "--losses": "losses.jsonl"}
    return [word for option, name in names.items() for word in (option, str(folder / name))]


def launch(arguments: list[str]) -> None:
    """Run the cases in this process, whose groups exist; top level, so that pool ranks can be told to call it."""
    sys.path[:0] = [str(BENCH)] if str(BENCH) not in sys.path else []
    import end_to_end
    from e2e_options import parallel_of, read_options

    options, cases = read_options(arguments)
    end_to_end.launch(options, cases, parallel_of(options))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[dict]:
    """Return {(job, step): loss} of every case."""
    return [{(job, step): loss for job, step, loss in line["losses"]} for line in lines(folder / "losses.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_process) -> tuple[Path, list[dict]]:
    """One process: our plan, calibrated and traced, three other policies, plain LoRA with recomputation, no adapters."""
    folder = tmp_path_factory.mktemp("alone")
    cases = ["calibrate=yes", "policy=flush", "policy=round-robin", "policy=grouped", "adapters=unfused recompute=full", "adapters=none"]
    kept = ["--timeline", str(folder / "traces"), "--save-cost", str(folder / "cost.json")]
    launch([*JOBS, *files(folder), *kept, *(word for case in cases for word in ("--case", case))])
    return folder, lines(folder / "results.jsonl")


def test_every_case_leaves_a_line_that_says_all(alone):
    folder, rows = alone
    assert len(rows) == 6 and len({row["case"] for row in rows}) == 6
    tokens = sum(sum(steps[step % 2]) for steps in WORKLOAD["tiny"]["data"] for step in range(3))
    for row in rows:
        assert {"commit", "hardware", "date", "command", "versions", "settings"} <= row.keys()
        results = row["results"]
        assert results["tokens"] == tokens and results["tokens_per_s"] == pytest.approx(tokens / results["seconds"])
        assert results["finite"] and results["steps"] == 3 and 0 <= results["bubble"] < 1
        assert 0 < results["prediction"]["replayed_over_real"] < 1.05
    assert rows[0]["results"]["prediction"]["cost_from"] == "calibration"
    assert len(json.loads((folder / "cost.json").read_text())) == 1
    assert rows[1]["results"]["noops"] > 0
    traces = sorted((folder / "traces").iterdir())
    assert len(traces) == 6 and any(event.get("cat") == "STEP" for event in json.loads(traces[0].read_text())["traceEvents"])


def test_policies_and_plain_lora_train_the_same(alone):
    ours, *others, none = losses(alone[0])
    assert len(ours) == 9 and ours[0, 2] != ours[0, 0]
    for other in others:
        assert other == pytest.approx(ours, rel=1e-6)
    assert none[0, 0] == pytest.approx(ours[0, 0], rel=1e-6) and abs(none[0, 2] - ours[0, 2]) > 1e-5


def test_calibration_takes_microbatches_as_the_policy_makes_them(tmp_path, one_process, monkeypatch):
    sys.path[:0] = [str(BENCH)] if str(BENCH) not in sys.path else []
    import e2e_case

    probed, measure = [], e2e_case.measure_stage
    monkeypatch.setattr(e2e_case, "measure_stage", lambda *args: probed.append(args[2]) or measure(*args))
    launch([*JOBS, *files(tmp_path), "--calibrate", "--case", "", "--case", "policy=flush"])
    ours, again, flush, _ = probed
    assert max(len(slot.segments) for slot in ours) > 1 and {len(slot.segments) for slot in flush} == {1}
    assert again == [], "our planner does not go by the fitted model"
    assert all({segment.step for slot in slots for segment in slot.segments} > {0} for slots in (ours, flush)), "more than first steps"


def test_calibration_times_what_a_baseline_makes_of_the_fitted_model_too(tmp_path, one_process, monkeypatch):
    sys.path[:0] = [str(BENCH)] if str(BENCH) not in sys.path else []
    import e2e_case

    probed, weighed, measure, joined = [], [], e2e_case.measure_stage, e2e_case.joined

    def wider_by_the_fitted(policy, lengths, settings, real):
        weighed.append(real)
        room = 50 if real == weighed[0] else settings.capacity
        return joined(policy, lengths, dataclasses.replace(settings, capacity=room), real)

    monkeypatch.setattr(e2e_case, "measure_stage", lambda *args: probed.append(args[2]) or measure(*args))
    monkeypatch.setattr(e2e_case, "joined", wider_by_the_fitted)
    launch([*JOBS, *files(tmp_path), "--case", "calibrate=yes policy=flush"])
    first, second = ([slot.num_tokens for slot in slots] for slots in probed)
    assert max(first) <= 50 < max(second)


def test_spread_keeps_both_ends():
    sys.path[:0] = [str(BENCH)] if str(BENCH) not in sys.path else []
    from e2e_case import spread

    assert spread(range(5), 8) == [0, 1, 2, 3, 4] and spread(range(9), 3) == [0, 4, 8] and spread(range(10), 4) == [0, 3, 6, 9]


@pytest.mark.parametrize("layout", ["pp", "tp", "dp"])
def test_two_ranks_train_as_one(alone, tmp_path, pool, layout):
    sequence = layout == "tp"
    options = {"pp": ["--pipeline", "2"], "tp": ["--tensor", "2", "--sequence"], "dp": ["--data", "2"]}[layout]
    arguments = [*JOBS, *files(tmp_path), *options, "--case", "calibrate=yes", "--case", "policy=round-robin"]
    pool(**{layout: 2}, sequence=sequence).run(launch, arguments)
    ours, *_ = losses(alone[0])
    for other in losses(tmp_path):
        assert other == pytest.approx(ours, rel=1e-6)
    results = lines(tmp_path / "results.jsonl")[0]["results"]
    assert len(results["memory"]["tokens_in_flight"]) == 2
    if layout == "pp":
        assert results["exposed_hops"].keys() == {"0>1", "1>0"} and len(results["bubbles"]) == 2


def test_hf_and_peft_run_the_same_rows(tmp_path, one_process):
    pytest.importorskip("peft")
    launch([*JOBS, *files(tmp_path), "--policy", "hf-peft", "--recompute", "none"])
    results = lines(tmp_path / "results.jsonl")[0]["results"]
    assert [job["steps"] for job in results["jobs"]] == [3, 3, 3] and results["batching"] in ("padded", "single")
    assert 0 <= results["padding"] < 0.5 and results["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "40"], "has 50"),
        (["--workload", "nothing"], "choose among tiny"),
        (["--pipeline", "2"], "needs 2 ranks, 1 were started"),
        (["--case", "policy"], "key=value"),
        (["--case", "tensor=2"], "same for all cases"),
        (["--policy", "best"], "invalid choice"),
        (["--recompute", "some"], "'some'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.syspath_prepend(str(BENCH))
    import end_to_end

    with pytest.raises(SystemExit) as left:
        sys.exit(end_to_end.main([*JOBS, *files(tmp_path), *options]))
    told = capsys.readouterr().err
    assert left.value.code == 2 and says in told and len(told.strip().splitlines()) == 1


def test_it_is_a_script(tmp_path):
    command = [sys.executable, BENCH / "end_to_end.py", *JOBS, *files(tmp_path), "--data", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "end_to_end.py: the layout DP2 needs 2 ranks, 1 were started; use torchrun\n"
