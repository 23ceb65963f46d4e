"""The end-to-end benchmark on CPU: every policy and kind of adapters does the same training, in every layout, and says what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from megatron_lora.commands.finished_run import FinishedRun
from scripts.bench import compare_commits, end_to_end, workloads
from scripts.bench.cases import read_options

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD = {"tiny": {"stages": 2, "capacity": 64, "data": [[[10, 20, 30], [14, 25, 9]], [[8, 16], [22, 31]], [[50], [33]]]}}
JOBS = ["--shape", "tiny", "--workload", "tiny", "--budget", "64", "--jobs", "3", "--ranks", "4,8,16", "--steps", "3"]


def files(folder: Path) -> list[str]:
    """Write the workload; return the options that read it and keep results and runs beside it."""
    (folder / "lengths.json").write_text(json.dumps(WORKLOAD))
    names = {"--lengths": "lengths.json", "--output": "results.jsonl", "--runs": "runs"}
    return [word for option, name in names.items() for word in (option, str(folder / name))]


def launch(arguments: list[str]) -> None:
    """Run the cases in this process, whose groups exist; top level, so that pool ranks can be told to call it."""
    import torch.distributed as dist

    rank = {"RANK": str(dist.get_rank()), "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    with mock.patch.dict(os.environ, rank if dist.get_world_size() > 1 else {}):
        end_to_end.launch(*read_options(arguments))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[dict]:
    """Return {(job, step): loss} of every case's run, in the order of the lines."""
    found = []
    for line in lines(folder / "results.jsonl"):
        (run,) = [path for path in (folder / "runs").glob("*/run") if (path.parent / "name").read_text() == line["case"]]
        found.append({(row["job"], row["step"]): row["loss"] for row in FinishedRun.read(run).steps})
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_process) -> tuple[Path, list[dict]]:
    """One process: our plan, calibrated, three other policies, plain LoRA with recomputation, inputs on the host, no adapters."""
    folder = tmp_path_factory.mktemp("alone")
    cases = ["calibrate=yes", "policy=flush", "policy=round-robin", "policy=grouped", "adapters=unfused recompute=full"]
    cases += ["recompute=full activation-offloading=yes deterministic=yes", "adapters=none"]
    launch([*JOBS, *files(folder), *(word for case in cases for word in ("--case", case))])
    return folder, lines(folder / "results.jsonl")


def test_every_case_leaves_a_line_that_says_all(alone):
    _, rows = alone
    assert len(rows) == 7 and len({row["case"] for row in rows}) == 7
    tokens = sum(sum(steps[step % 2]) for steps in WORKLOAD["tiny"]["data"] for step in range(3))
    for row in rows:
        assert {"commit", "hardware", "date", "command", "versions", "settings"} <= row.keys()
        results = row["results"]
        assert results["tokens"] == tokens and results["tokens_per_s"] == pytest.approx(tokens / results["seconds"])
        assert results["finite"] and results["steps"] == 3 and 0 <= results["bubble"] < 1
        assert 0 < results["prediction"]["replayed_over_real"] < 1.05
        assert results["prediction"]["cost_from"] == "calibration", "later cases go by the first one's table"
    assert rows[1]["results"]["noops"] > 0 and rows[0]["results"]["noops"] == 0


def test_policies_and_plain_lora_train_the_same(alone):
    ours, *others, none = losses(alone[0])
    assert len(ours) == 9 and ours["job-0", 3] != ours["job-0", 1]
    for other in others:
        assert other == pytest.approx(ours, rel=1e-6)
    assert none["job-0", 1] == pytest.approx(ours["job-0", 1], rel=1e-6) and abs(none["job-0", 3] - ours["job-0", 3]) > 1e-5


@pytest.mark.parametrize("layout", ["pp", "tp", "dp"])
def test_two_ranks_train_as_one(alone, tmp_path, pool, layout):
    sequence = layout == "tp"
    options = {"pp": ["--pipeline", "2"], "tp": ["--tensor", "2", "--sequence"], "dp": ["--data", "2"]}[layout]
    arguments = [*JOBS, *files(tmp_path), *options, "--case", "", "--case", "policy=round-robin"]
    pool(**{layout: 2}, sequence=sequence).run(launch, arguments)
    ours, *_ = losses(alone[0])
    for other in losses(tmp_path):
        assert other == pytest.approx(ours, rel=1e-6)
    results = lines(tmp_path / "results.jsonl")[0]["results"]
    assert len(results["memory"]["peak_bytes"]) == 2
    if layout == "pp":
        assert results["exposed_hops"].keys() == {"0>1", "1>0"} and len(results["bubbles"]) == 2


def test_hf_and_peft_run_the_same_rows(tmp_path, one_process):
    pytest.importorskip("peft")
    launch([*JOBS, *files(tmp_path), "--policy", "hf-peft", "--recompute", "none"])
    results = lines(tmp_path / "results.jsonl")[0]["results"]
    assert [job["steps"] for job in results["jobs"]] == [3, 3, 3] and results["batching"] in ("padded", "single")
    assert 0 <= results["padding"] < 0.5 and results["tokens_per_s"] > 0


def test_workloads_go_around_and_heads_take_something_of_every_job(tmp_path):
    first, second, third, again = workloads.take(WORKLOAD["tiny"]["data"], 4)
    assert again == [first[1], first[0]] and third == [[50], [33]]
    assert workloads.read_workload(tmp_path / "none", "3x40") == [[[40, 40, 40]]]
    assert workloads.head([first, second, third], 60) == [[[10]], [[8]], [[50]]]
    assert workloads.head([first, second, third], 1000) == [[first[0]], [second[0]], [third[0]]]
    workloads.write_lengths(tmp_path / "rows.jsonl", [40, 2], 0.25)
    assert lines(tmp_path / "rows.jsonl") == [{"tokens": 40, "targets": 10}, {"tokens": 2, "targets": 1}]
    workloads.write_lengths(tmp_path / "rows.jsonl", [41], 0.25, pairs=True)
    assert lines(tmp_path / "rows.jsonl") == [{"chosen": 21, "rejected": 20, "targets": 5}]


def test_a_run_is_as_long_as_was_asked_for_by_the_cost_model(tmp_path):
    steps = {}
    for seconds in ("0.01", "0.02"):
        options, (case,) = read_options([*JOBS[:-2], *files(tmp_path), "--seconds", seconds])
        steps[seconds] = end_to_end.config_of(options, case, WORKLOAD["tiny"]["data"]).jobs[0].max_steps
    assert steps["0.01"] > 1 and abs(steps["0.02"] - 2 * steps["0.01"]) <= 1


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
def test_wrong_options_are_one_line(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as left:
        sys.exit(end_to_end.main([*JOBS, *files(tmp_path), *options]))
    told = capsys.readouterr().err
    assert left.value.code == 2 and says in told and len(told.strip().splitlines()) == 1


def test_checkouts_are_compared_by_medians_and_spreads():
    rounds = [({"a": old, "b": 1.0}, {"a": new, "b": second}) for old, new, second in ((100, 103, 1.0), (102, 104, 1.1), (98, 102, 1.2))]
    found = compare_commits.compared(rounds)
    assert found["a"]["difference"] == pytest.approx(0.03) and found["a"]["within"], "3% within the old one's spread of 4%"
    assert found["b"]["difference"] == pytest.approx(0.1) and found["b"]["within"]
    assert not compare_commits.compared([({"a": 100.0}, {"a": 102.0})] * 3)["a"]["within"]


def test_an_old_checkout_is_run_by_its_files_and_a_new_one_as_a_package(tmp_path):
    old, new = (compare_commits.command(place, "runs", 2, [], Path("out")) for place in (tmp_path, ROOT))
    assert old[1:4] == ["scripts/bench/end_to_end.py", "--steps", "2"] and new[1:3] == ["-m", "scripts.bench.end_to_end"]
    _, cases = read_options(new[3:])
    assert [case.ranks for case in cases] == [(8, 16, 32, 64)] * 2 + [(16,)] and cases[1].dropouts == (0.0, 0.0, 0.05, 0.05)


def test_it_is_a_module(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.end_to_end", *JOBS, *files(tmp_path), "--data", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "end_to_end.py: the layout DP2 needs 2 ranks, 1 were started; use torchrun\n"
