"""Calibration on CPU: a table that plan and train take, that a run keeps and resumes with, and that is refused where it is of another."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import oracle
import pytest
import runs
from waiting import wait_for

from megatron_lora.__main__ import main
from megatron_lora.commands import launch
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.files import sealed, unsealed
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.planning.calibration import RUN_FILE, calibrated, find_calibration, read_calibration
from megatron_lora.planning.predict import cost_of, planner_cost
from megatron_lora.training import calibrate
from scheduling.cost import DEVICES

CPU = DEVICES["cpu"]
TRAIN = runs.train
LAYOUTS = {"pp": {"pp": 2}, "tp": {"tp": 2, "sequence": True}, "dp": {"dp": 2}}
STORED = {"pp": "native", "tp": "nf4/bf16", "dp": "fp8/fp8"}
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8}  # two tensor ranks have whole blocks of NF4


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A config of two jobs of lengths on two stages, over a model without weights or tokenizer; caches are its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "train", train)
    whole = oracle.make_model(tmp_path / "whole")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(json.loads((whole / "config.json").read_text()) | SIZES))
    jobs = []
    for r, lengths in ((4, (9, 30, 17, 5, 22, 12)), (16, (40, 8, 25, 33))):
        (tmp_path / f"r{r}.jsonl").write_text("".join(json.dumps({"tokens": n, "targets": n // 3}) + "\n" for n in lengths))
        jobs.append({"name": f"r{r}", "r": r, "datasets": [{"path": str(tmp_path / f"r{r}.jsonl"), "type": "lengths"}], "max_steps": 40})
        jobs[-1] |= {"global_batch_size": 4, "save_steps": 2}
    return written(tmp_path / "config.yaml", jobs, {"pp": 2})


def written(path: Path, jobs: list[dict], parallel: dict, base_weights: str = "native") -> Path:
    runs.write_config(path, path.parent / "model", path.parent / "run", jobs, parallel, 64)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"load_weights": False, "base_weights": base_weights}))
    return path


def measure(path: Path, output: Path | None) -> None:
    """Calibrate as one rank, the cache beside the config; top level, so that pool ranks can be told to call it."""
    with mock.patch.dict(os.environ, {"MEGATRON_LORA_CACHE": str(path.parent / "cache")}):
        calibrate.run(load_config(path), output)


def train(path: Path, stop_after: int | None) -> None:
    """Train as runs.train does, with the same cache."""
    with mock.patch.dict(os.environ, {"MEGATRON_LORA_CACHE": str(path.parent / "cache")}):
        TRAIN(path, stop_after)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_is_measured_in_every_layout(config, pool, tmp_path, layout):
    written(config, json.loads(config.read_text())["jobs"], LAYOUTS[layout], STORED[layout])
    pool(**LAYOUTS[layout]).run(measure, config, tmp_path / "table.json")
    table = read_calibration(tmp_path / "table.json")
    assert table.subject["base_weights"] == STORED[layout]
    assert dict(table.costs.layers).keys() == {"none", "cheap", "full"} and table.costs.step_s > 0
    assert (table.costs.hop is not None) == (layout == "pp") and table.about["fit_error"] >= 0
    assert all(slots >= 1 and turns >= 2 for slots, turns in table.about["turns"].values())
    for _, cost in [*table.costs.layers, ("head", table.costs.head)]:
        assert cost.forward.seconds(64, 64 * 16, 64 * 8) > 0 < cost.backward.seconds(64, 64 * 16, 64 * 8)


@pytest.mark.parametrize(("slot_s", "timed"), [(0.01, (12, 5)), (0.5, (12, 5)), (0.8, (7, 5)), (1.5, (6, 3)), (60.0, (6, 2))])
def test_fewer_slots_then_fewer_turns_are_timed_where_they_take_long(slot_s, timed):
    assert calibrate.EFFORTS["none"].within(12, slot_s, 60.0) == timed
    assert calibrate.EFFORTS["none"].within(2, slot_s, 60.0)[0] == 2
    assert calibrate.EFFORTS["none"].within(12, slot_s, -1.0) == (6, 2)


def test_plan_and_train_take_the_table_and_a_run_resumes_with_its_own(config, pool, tmp_path, capsys):
    given, architecture = load_config(config), read_architecture(tmp_path / "model")
    assert find_calibration(tmp_path / "cache", given, architecture, CPU) is None
    pool(pp=2).run(measure, config, None)
    table = find_calibration(tmp_path / "cache", given, architecture, CPU)
    assert main(["plan", str(config)]) == 0
    assert f"Seconds are by {table.describe()}" in capsys.readouterr().out
    assert runs.start(pool, config, {"pp": 2}, stop_after=3) == 75
    kept = tmp_path / "run" / RUN_FILE
    assert kept.read_text() == table.to_json()
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    resolved = load_config(tmp_path / "run" / "config.yaml")
    share = cost_of(resolved, architecture, calibrated(CPU, table)).stages[0].forward.per_token
    assert cost["basis"] == table.describe() and cost["stages"][0]["forward"]["per_token"] == pytest.approx(share)
    assert cost["hop_s"] > 0 and cost["jobs"] == ["r4", "r16"]

    slower = json.loads(kept.read_text())  # calibrated again meanwhile: the run resumes with what it began with
    slower["about"]["date"] = "later"
    next((tmp_path / "cache" / "calibrations").iterdir()).write_text(json.dumps(slower))
    assert runs.start(pool, config, {"pp": 2}) == 0
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["basis"] == table.describe() and kept.read_text() == table.to_json()
    assert main(["report", str(tmp_path / "run")]) == 0 and f"by {table.describe()}" in capsys.readouterr().out


def test_a_run_that_began_without_a_table_goes_on_without(config, pool, tmp_path):
    assert runs.start(pool, config, {"pp": 2}, stop_after=3) == 75
    pool(pp=2).run(measure, config, None)
    assert runs.start(pool, config, {"pp": 2}) == 0
    assert not (tmp_path / "run" / RUN_FILE).exists()
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["basis"] == "the table figures of cpu"


def test_a_run_whose_table_does_not_fit_its_layout_says_so(config, pool, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runs.start(pool, config, {"pp": 2}, stop_after=3) == 75
    pool(pp=2).run(measure, config, None)
    table = unsealed(next((tmp_path / "cache" / "calibrations").iterdir()).read_text())
    table["of"]["tensor"] = 2
    (tmp_path / "run" / RUN_FILE).write_text(sealed(json.dumps(table)))
    assert main(["train", str(config)]) == 0
    assert f"costs are by formulas: {tmp_path / 'run' / RUN_FILE} is of tensor 2, and this config needs 1" in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["basis"] == "the table figures of cpu"


def table_of(layer: dict) -> dict:
    """A table in which a layer costs the same under every policy, and as much as the head."""
    layers = dict.fromkeys(("none", "cheap", "full"), layer)
    about = {"date": "today", "memory_bytes": 8e9}
    return {"format": 1, "of": {"device": "cpu"}, "layers": layers, "head": layer, "step_s": 0.1, "links": {}, "about": about}


@pytest.mark.parametrize(
    "spoilt",
    [
        {"step_s": float("nan")},
        {"head": {"forward": {}, "backward": {}}},
        {"links": {"stage": {"latency_s": "soon", "bytes_per_s": 1e9}}},
        {"links": {"stage": {"latency_s": -1.0, "bytes_per_s": 1e9}}},
        {"of": {}},
        {"about": {"date": "today"}},
        {"format": 2},
    ],
)
def test_a_table_that_was_spoilt_is_one_line(config, spoilt, tmp_path, capsys):
    layer = {side: {"per_token": 1e-3, "per_square": 0.0, "per_rank_token": 0.0, "fixed": 0.5} for side in ("forward", "backward")}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table_of(layer)))
    table = read_calibration(file)
    assert table.costs.step_s == 0.1
    file.write_text(table.to_json().replace('"step_s": 0.1', '"step_s": 0.2'))
    with pytest.raises(UserError, match="was damaged or edited since it was written"):
        read_calibration(file)
    file.write_text(json.dumps(table_of(layer) | spoilt))
    assert main(["plan", str(config), "--cost", str(file)]) == 2
    told = capsys.readouterr().err
    assert "holds no cost table" in told and told.count("\n") == 1


def test_the_planner_weighs_slots_by_the_table(config, tmp_path):
    layer = {side: {"per_token": 1e-3, "per_square": 0.0, "per_rank_token": 0.0, "fixed": 0.5} for side in ("forward", "backward")}
    architecture = read_architecture(tmp_path / "model")
    given = load_config(config, ["parallel.layers_per_stage=[2,2]", "recompute=full"])
    (tmp_path / "table.json").write_text(json.dumps(table_of(layer)))
    device = calibrated(CPU, read_calibration(tmp_path / "table.json"))
    first, last = cost_of(given, architecture, device, 0.25).stages
    assert first.forward.seconds(10, 100) == pytest.approx(2 * (10e-3 + 0.5)) and last.forward.fixed == pytest.approx(3 * 0.5)
    assert planner_cost(given, architecture, device).fixed == pytest.approx(2 * 3 * 0.5 / (2 * 3 * 1e-3), rel=0.01)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "CONFIG", "--cost", "nothing.json"], "--cost: 'nothing.json' cannot be read"),
        (["plan", "CONFIG", "--cost", "CONFIG"], "holds no cost table; write one with megatron-lora calibrate"),
        (["calibrate", "CONFIG", "--output", "no/folder/table.json"], "--output: 'no/folder/table.json' is no file in a folder"),
        (["calibrate", "CONFIG", "parallel.pipeline=5"], "parallel"),
        (["calibrate", "gone.yaml"], "gone.yaml"),
    ],
)
def test_wrong_words_are_one_line(config, words, says, capsys):
    assert main([str(config) if word == "CONFIG" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_a_table_of_another_layout_is_refused(config, pool, tmp_path, capsys):
    pool(pp=2).run(measure, config, tmp_path / "table.json")
    assert main(["plan", str(config), "--cost", str(tmp_path / "table.json")]) == 0
    assert main(["plan", str(config), "parallel.tensor=2", "--cost", str(tmp_path / "table.json")]) == 2
    assert "--cost: the table is of tensor 1, and this config needs 2; calibrate this config" in capsys.readouterr().err


def test_the_command_starts_its_ranks(config, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["calibrate", str(config), "--output", str(tmp_path / "table.json")]) == 0
    told = capfd.readouterr().out
    assert "a message between stages: " in told and f"{tmp_path / 'table.json'}: written after" in told


def test_a_signal_ends_it_with_its_ranks(config, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "megatron_lora", "calibrate", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        ranks: list[int] = []

        def started() -> bool:
            ranks[:] = [rank for agent in launch.children_of(process.pid) for rank in launch.children_of(agent)]
            return len(ranks) == 2

        wait_for(started)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM before its table was written\n" in told
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
