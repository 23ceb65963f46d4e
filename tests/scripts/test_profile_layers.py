"""The table of layer costs: measured on CPU for a tiny shape, put together into stages, and read where end_to_end.py reads it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/bench"))

import profile_layers  # noqa: E402
from layer_table import fit_error, read_stages, read_table, stages_of, table_name  # noqa: E402
from model_shapes import architecture_of  # noqa: E402

from megatron_lora.commands.plan import read_cost  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402

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
    assert whole == read_stages(measured / "layers.jsonl", (3, 2), "full", "tiny, native")
    table = json.loads((measured / "layers.jsonl").read_text())
    layer, head = table["layer"]["full"], table["head"]
    assert whole.stages[0].backward.fixed == pytest.approx(3 * layer["backward"]["fixed"])
    assert whole.stages[1].forward.per_token == pytest.approx(2 * layer["forward"]["per_token"] + head["forward"]["per_token"])
    mixed = read_stages(measured / "layers.jsonl", (3, 2), ["full", "none", "none", "cheap", "full"], "tiny, native").stages[0].forward
    others = table["layer"]["none"]["forward"]["per_square"]
    assert mixed.per_square == pytest.approx(layer["forward"]["per_square"] + 2 * others)


def test_one_of_two_tensor_ranks_with_plain_lora_is_a_table_of_its_own(measured, tmp_path):
    whole, half = architecture_of("tiny"), architecture_of("tiny", tensor=2)
    assert (half.num_heads, half.num_kv_heads, half.ffn_size, half.vocab_size) == (2, 1, 56, 128)
    assert (half.hidden_size, half.head_dim, half.num_layers) == (whole.hidden_size, whole.head_dim, whole.num_layers)
    kind = ["--tensor", "2", "--adapters", "unfused", "--policies", "full", "--num-layers", "1", "--budgets", "32", "--repeats", "1"]
    workload = ["--workload", "tiny", "--lengths", str(measured / "lengths.json"), "--ranks", "4,16"]
    assert profile_layers.main(["--shape", "tiny", *kind, *workload, "--output", str(tmp_path / "layers.jsonl")]) == 0
    found = read_table(tmp_path / "layers.jsonl", table_name("tiny", tensor=2, adapters="unfused"))
    assert found["layer"].keys() == {"full"} and 0 <= fit_error(found) < 1
    with pytest.raises(UserError, match="no layers with recomputation 'none'"):
        stages_of(found, (1, 1), ["full", "none"])


def test_wrong_files_and_options_are_one_line(measured, capsys):
    with pytest.raises(UserError, match="no table of 'llama-3.1-8b, native'"):
        read_stages(measured / "layers.jsonl", (3, 2), "full", "llama-3.1-8b, native")
    with pytest.raises(SystemExit):
        profile_layers.main(["--stages", "3,2"])
    assert capsys.readouterr().err == "profile_layers.py: --stages and --cost go together\n"
    with pytest.raises(SystemExit):
        profile_layers.main(["--policies", "some"])
    assert capsys.readouterr().err == "profile_layers.py: --policies: 'some' is none of none, cheap, full\n"
