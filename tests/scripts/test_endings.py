"""Runs that are ended: their config starts, and a killed rank is seen to end one."""

import json

import pytest

from scripts.bench import endings
from scripts.bench.model_shapes import SHAPES


def options(*words):
    return endings.parser().parse_args(["--shape", "tiny", "--pipeline", "2", "--longest", "30", *words])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_config_of_every_shape_is_checked_without_weights_or_tokenizer(shape, tmp_path):
    from megatron_lora.commands.checks import read_inputs
    from megatron_lora.config.schema import load_config

    config = endings.config_of(options("--shape", shape), tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"output_dir": str(tmp_path / "run")}))
    inputs = read_inputs(load_config(tmp_path / "config.yaml"))
    assert [data.samples.lengths.max() for data in inputs.data] == [30, 10]


def test_a_killed_rank_is_seen_to_end_the_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = endings.ended(options(), "killed")
    assert found["good"] and found["status"] == 1 and found["seconds"] < 20 and found["says"] == endings.LINES["killed"].strip()
    assert not endings.verdict("killed", 0, found["error"])["good"]
    assert not endings.verdict("killed", 1, found["error"] + "and more\n")["good"] and not endings.verdict("still", 1, "")["good"]


@pytest.mark.parametrize(("words", "says"), [(["--ways", "asleep"], "'asleep' is none of"), (["--pipeline", "1"], "two ranks at least")])
def test_wrong_options_are_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as left:
        endings.main(["--pipeline", "2", *words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and says in told and told.count("\n") == 1
