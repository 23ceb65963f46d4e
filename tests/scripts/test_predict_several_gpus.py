"""Predictions from a table of layer costs: exact where they can be reckoned by hand, and beside a run that was measured."""

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import end_to_end  # noqa: E402
import predict_several_gpus  # noqa: E402
import profile_layers  # noqa: E402
from e2e_options import parallel_of, read_options  # noqa: E402
from layer_table import at_pace, fit_error  # noqa: E402
from predicted_run import STEP_S, Link, predict  # noqa: E402
from several_runs import Run  # noqa: E402

from scheduling.cost import PassCost, StageCost  # noqa: E402
from scheduling.memory import RESERVED  # noqa: E402

ONE_JOB = {"one": {"data": [[[10, 20, 30], [40]]]}, "single": {"data": [[[60], [40]]]}}
THREE_JOBS = {"three": {"data": [[[10, 20, 30], [14, 25, 9]], [[8, 16], [22, 31]], [[50], [33]]]}}
LAYERS, HIDDEN = 4, 64
LINK = Link(bytes_per_s=1e6, latency_s=1e-3)
QUICK = Link(bytes_per_s=1e30, latency_s=0.0)


def table(per_token: float = 0.0, fixed: float = 0.0) -> dict:
    """Return a table in which every layer, and the head, costs the same each way."""
    one = PassCost(per_token=per_token, per_square=0.0, per_rank_token=0.0, fixed=fixed)
    cost = asdict(StageCost(one, one))
    return {"layer": dict.fromkeys(("none", "cheap", "full"), cost), "head": cost}


def predicted(folder: Path, costs: dict, *words: str, link: Link = LINK, memory_gb: float = 80.0, split: bool = False):
    """Predict two steps of one job of a tiny model on GPUs."""
    (folder / "lengths.json").write_text(json.dumps(ONE_JOB))
    usual = [
        "--shape",
        "tiny",
        "--workload",
        "one",
        "--lengths",
        str(folder / "lengths.json"),
        "--jobs",
        "1",
        "--budget",
        "64",
        "--steps",
        "2",
    ]
    options, (case,) = read_options([*usual, *words])
    return predict(options, case, costs, predict_several_gpus.device_of(memory_gb), link, split=split)


def test_one_gpu_takes_the_time_of_its_layers_its_head_and_its_steps(tmp_path):
    found = predicted(tmp_path, table(per_token=1e-3, fixed=0.01))
    passes = 2 * (LAYERS + 1) * (100 * 1e-3 + 2 * 0.01)
    assert found.forecast.figures.seconds == pytest.approx(passes + 2 * STEP_S)
    assert found.tokens_per_s == pytest.approx(100 / (passes + 2 * STEP_S)) and found.communication == 0.0


def test_a_long_run_keeps_a_pace_of_the_table(tmp_path):
    costs = table(per_token=1e-3, fixed=0.01)
    quick, slow = (predicted(tmp_path, at_pace(costs, pace)).forecast.figures.seconds - 2 * STEP_S for pace in (1.0, 0.8))
    assert slow == pytest.approx(quick / 0.8) and costs == table(per_token=1e-3, fixed=0.01)


def test_two_stages_fill_drain_and_wait_for_messages(tmp_path):
    slow = Link(bytes_per_s=1e30, latency_s=0.5)
    words = ["--pipeline", "2", "--layers", "3,1", "--policy", "flush", "--workload", "single"]
    found, waited = (predicted(tmp_path, table(per_token=1e-3), *words, link=link).forecast.figures.seconds for link in (QUICK, slow))
    assert found == pytest.approx(2 * (LAYERS + 1) * 100 * 1e-3 + 2 * STEP_S)  # one microbatch at a time, from stage to stage and back
    assert 2 * 2 * 0.5 <= waited - found <= 2 * 3 * 0.5  # there and back, and forward once more with the verdict


def test_tensor_ranks_add_the_bytes_that_they_exchange(tmp_path):
    costs = table(per_token=1e-3)
    alone = predicted(tmp_path, costs).forecast.figures.seconds
    for recompute, collectives in (("none", 8), ("full", 12)):
        found = predicted(tmp_path, costs, "--tensor", "2", "--sequence", "--recompute", recompute)
        rows = 100 * HIDDEN * 2 / 2 / LINK.bytes_per_s  # half of each row comes from the other rank
        rank_bytes = found.config.jobs[0].r * 4 * (4 * (2 * HIDDEN) - 2 * HIDDEN // 2 + 3 * (HIDDEN + 112)) * LAYERS / 2
        sums = 2 * (LINK.latency_s + rank_bytes / LINK.bytes_per_s)
        exchanged = LAYERS * collectives * (rows + 2 * LINK.latency_s)
        assert found.forecast.figures.seconds == pytest.approx(alone + exchanged + sums)
        assert found.communication == pytest.approx((exchanged + sums) / (alone + exchanged + sums))


def test_replicas_share_the_work_and_a_small_gpu_recomputes_until_nothing_fits(tmp_path):
    both = predicted(tmp_path, table(per_token=1e-3), "--data", "2", link=QUICK).forecast.figures
    assert both.tokens == 100 and both.seconds == pytest.approx(2 * (LAYERS + 1) * (30 + 40) * 1e-3 + 2 * STEP_S)
    most, least = (
        predicted(tmp_path, table(per_token=1e-3), "--recompute", policy).peaks[0] / ((1 - RESERVED) * 1e9) for policy in ("none", "full")
    )
    some = predicted(tmp_path, table(per_token=1e-3), memory_gb=(most + least) / 2)
    assert some.fits and some.config.recompute != "none" and not predicted(tmp_path, table(per_token=1e-3), memory_gb=least / 2).fits


def test_layers_move_to_where_the_table_says(tmp_path):
    costs = table(per_token=1e-3)
    costs["head"] = table(per_token=1.5e-3)["head"]
    words = ["--pipeline", "2", "--workload", "single"]
    found = {split: predicted(tmp_path, costs, *words, split=split).config.parallel.layers_per_stage for split in (False, True)}
    assert found == {False: (2, 2), True: (3, 1)}
    assert predicted(tmp_path, costs, *words, "--layers", "2,2", split=True).config.parallel.layers_per_stage == (2, 2)


def test_layers_are_split_by_the_share_of_targets(tmp_path):
    words = ["--shape", "llama-3.1-8b", "--pipeline", "2", "--budget", "8192", "--policy", "flush"]
    found = {share: predicted(tmp_path, table(per_token=1e-6), *words, "--completion", share).config for share in ("1", "0.25")}
    assert {share: config.parallel.layers_per_stage for share, config in found.items()} == {"1": (17, 15), "0.25": (16, 16)}


def test_the_fastest_budget_that_fits_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "lengths.json").write_text(json.dumps({"two": {"data": [[[20, 20, 20]] * 4, [[30, 30]] * 4]}}))
    costs = table(per_token=1e-3, fixed=0.1) | {"case": "tiny, native", "measurements": [["none", 0, False, 10, 0, 0, 0.11]]}
    costs |= dict.fromkeys(("commit", "hardware", "date", "settings"), "x")
    (tmp_path / "layers.jsonl").write_text(json.dumps(costs) + "\n")
    runs = (
        Run(name="a", machine=1, shape="tiny", workload="two", budgets=(30, 60, 120)),
        Run(name="b", machine=2, shape="tiny", workload="two", tensor=2),
    )
    passed = ("--lengths", str(tmp_path / "lengths.json"))
    predictor = predict_several_gpus.Predictor(tables=tmp_path / "layers.jsonl", link=LINK, passed=passed)
    (line,) = predictor.lines(runs, 80.0)
    assert line["prediction"]["budget"] == 120 and line["prediction"]["fits"] and line["table"]["fit_error"] == pytest.approx(0.0)
    assert "left out: b: " in capsys.readouterr().err
    wanting = replace(predict_several_gpus.device_of(80.0), memory_bytes=1e3)
    _, found, _ = predictor.at_best_budget(runs[0], wanting)
    assert found.config.microbatch_tokens == 30 and not found.fits


def test_a_measured_run_stands_beside_its_prediction(tmp_path, one_process):
    (tmp_path / "lengths.json").write_text(json.dumps(THREE_JOBS))
    workload = ["--shape", "tiny", "--workload", "three", "--lengths", str(tmp_path / "lengths.json"), "--ranks", "4,8,16"]
    cases = ["--case", "recompute=2*full,2*none", "--case", "policy=flush recompute=none", "--case", "adapters=none"]
    kept = ["--output", str(tmp_path / "results.jsonl"), "--jobs", "3", "--budget", "64", "--steps", "3"]
    options, cases = read_options([*workload, *kept, *cases])
    end_to_end.launch(options, cases, parallel_of(options))
    tables = tmp_path / "layers.jsonl"
    assert profile_layers.main([*workload, "--num-layers", "2", "--budgets", "32,64", "--repeats", "2", "--output", str(tables)]) == 0
    measured = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    passed = ("--lengths", str(tmp_path / "lengths.json"), "--recompute", "cheap")  # the run's own words win
    predictor = predict_several_gpus.Predictor(tables=tables, link=LINK, passed=passed)
    *both, without = map(predictor.beside, measured)
    assert without is None
    for line, found in zip(measured[:2], both, strict=True):
        assert found["prediction_of"]["tokens"] == line["results"]["tokens"]
        assert found["prediction_of"]["layer_recompute"] == line["settings"]["layer_recompute"]
        assert 0.2 < found["predicted_over_real"] < 5
    assert fit_error(json.loads(tables.read_text())) < 0.5
    pace, cases = predict_several_gpus.pace_of(predictor, measured)
    assert pace == pytest.approx(statistics.median(found["predicted_over_real"] for found in both)) and len(cases) == 2
    assert predict_several_gpus.pace_of(predictor, [line | {"commit": "another"} for line in measured]) == (1.0, [])
