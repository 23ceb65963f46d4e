"""What the commands say of validation data: their samples in `plan` and `preview`; one that fits no microbatch is refused."""

import json
from pathlib import Path

import oracle
import pytest
import yaml

from megatron_lora.__main__ import main
from megatron_lora.commands.checks import read_inputs
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError


@pytest.fixture
def scene(tmp_path, monkeypatch) -> None:
    """Two jobs of 12 short records; the first has files of validation, of which one record has 41 tokens and an eos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, words in (("rows", [3] * 12), ("held", [3, 40])):
        records = [{"prompt": "w1", "completion": " w2" * count} for count in words]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    jobs = [{"name": name, "datasets": [{"path": "rows.jsonl", "type": "prompt_completion"}], "global_batch_size": 4} for name in "ab"]
    jobs[0] |= {"val_datasets": [{"path": "held.jsonl", "type": "prompt_completion"}], "eval_steps": 1}
    model = oracle.make_model(tmp_path / "model")
    config = {"base_model": str(model), "output_dir": "out", "precision": "fp32", "microbatch_tokens": 64, "jobs": jobs}
    Path("config.yaml").write_text(yaml.safe_dump(config))


def test_plan_and_preview_say_how_many_samples_are_for_validation(scene, capsys):
    assert main(["plan", "config.yaml", "jobs.b.val_set_size=0.25"]) == 0
    out = capsys.readouterr().out
    assert "a: 2 samples for validation, " in out and "evaluated 3 times" in out
    assert "b: 3 samples for validation, " in out and "evaluated 1 times" not in out.partition("b: 3 samples")[0]
    assert main(["preview", "config.yaml", "--job", "a"]) == 0
    assert "a: 12 samples, " in (out := capsys.readouterr().out) and "; for validation 2 samples, " in out
    assert main(["preview", "config.yaml", "--job", "b", "jobs.b.val_set_size=3"]) == 0
    assert "b: 9 samples, " in (out := capsys.readouterr().out) and "; for validation 3 samples, " in out


def test_a_validation_sample_that_fits_no_microbatch_is_refused(scene, capsys):
    longest = int(read_inputs(load_config("config.yaml")).data[0].validation_samples.lengths.max())
    read_inputs(load_config("config.yaml", [f"microbatch_tokens={longest}"]))
    with pytest.raises(UserError, match=f"is less than the {longest} tokens of record 1 for validation of jobs.a"):
        read_inputs(load_config("config.yaml", [f"microbatch_tokens={longest - 1}"]))
    assert main(["plan", "config.yaml", "microbatch_tokens=auto", "parallel.data=2"]) == 0
    chosen = capsys.readouterr().out.partition("microbatch_tokens: auto is ")[2].split()[0]
    assert int(chosen) >= longest
    with pytest.raises(UserError, match="jobs.a.val_datasets.0.path: 'none.jsonl': no such file"):
        read_inputs(load_config("config.yaml", ["jobs.a.val_datasets.0.path=none.jsonl"]))


def test_plan_says_how_many_tokens_a_reference_runs_forward(scene, capsys):
    """Each pair once: in one epoch, in three, and where two steps take four of the five pairs alone."""
    rows = [{"prompt": "w1", "chosen": " w2" * 3, "rejected": " w3" * count} for count in range(1, 6)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(Path("config.yaml").read_text())
    (job := config["jobs"][1]).update(objective="dpo", datasets=[{"path": "pairs.jsonl", "type": "preference"}], global_batch_size=2)
    found = []
    for more in ({}, {"num_epochs": 3}, {"max_steps": 2, "shuffle": False}):
        Path("config.yaml").write_text(yaml.safe_dump(config | {"jobs": [config["jobs"][0], job | more]}))
        assert main(["plan", "config.yaml"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("b: its reference runs "))
        found.append(int(line.removeprefix("b: its reference runs ").split()[0]))
    lengths = read_inputs(load_config("config.yaml")).data[1].samples.lengths
    assert found == [sum(lengths), sum(lengths), sum(lengths[:4])]
