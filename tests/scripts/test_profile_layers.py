"""The table of layer costs: measured on CPU for a tiny shape, put together into stages, and read where end_to_end.py reads it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import profile_layers  # noqa: E402
from layer_table import read_stages, stages_of  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402
from megatron_lora.plan_report import read_cost  # noqa: E402

WORKLOAD = {"tiny": {"data": [[[10, 20, 30, 7]], [[8, 16, 5]]]}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_process) -> Path:
    """Measure a tiny model of two layers; the folder has its table and the cost model of two stages."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "lengths.json").write_text(json.dumps(WORKLOAD))
    sizes = ["--num-layers", "2", "--budgets", "32,64", "--ranks", "4,16", "--repeats", "2", "--stages", "3,2", "--recompute", "full"]
    files = ["--output", str(folder / "layers.jsonl"), "--cost", str(folder / "cost.json")]
    workload = ["--workload", "tiny", "--lengths", str(folder / "lengths.json")]
    assert profile_layers.main(["--shape", "tiny", *sizes, *files, *workload]) == 0
    return folder


def test_the_table_predicts_what_it_was_fitted_to(measured):
    (table,) = (json.loads(line) for line in (measured / "layers.jsonl").read_text().splitlines())
    assert table["layer"].keys() == {"none", "cheap", "full"} and {"commit", "hardware", "versions"} <= table.keys()
    model = stages_of(table, (1, 0), "none")
    rows = [row for row in table["measurements"] if row[:3] == ["none", 0, False]]
    real, predicted = (sum(values) for values in zip(*((r[6], model.stages[0].forward.seconds(*r[3:6])) for r in rows), strict=True))
    assert predicted == pytest.approx(real, rel=0.5)


def test_stages_are_sums_of_layers_and_the_head(measured):
    whole = read_cost(str(measured / "cost.json"), 2)
    assert whole == read_stages(measured / "layers.jsonl", (3, 2), "full", "tiny")
    table = json.loads((measured / "layers.jsonl").read_text())
    layer, head = table["layer"]["full"], table["head"]
    assert whole.stages[0].backward.fixed == pytest.approx(3 * layer["backward"]["fixed"])
    assert whole.stages[1].forward.per_token == pytest.approx(2 * layer["forward"]["per_token"] + head["forward"]["per_token"])
    mixed = read_stages(measured / "layers.jsonl", (3, 2), ["full", "none", "none", "cheap", "full"], "tiny").stages[0].forward
    others = table["layer"]["none"]["forward"]["per_square"]
    assert mixed.per_square == pytest.approx(layer["forward"]["per_square"] + 2 * others)


def test_wrong_files_and_options_are_one_line(measured, capsys):
    with pytest.raises(UserError, match="no table for llama-3.1-8b"):
        read_stages(measured / "layers.jsonl", (3, 2), "full", "llama-3.1-8b")
    with pytest.raises(SystemExit):
        profile_layers.main(["--stages", "3,2"])
    assert capsys.readouterr().err == "profile_layers.py: --stages and --cost go together\n"
