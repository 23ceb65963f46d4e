"""Tuning without a GPU: one line; and with a stand-in for its measurements, choices that are added to those of other GPUs."""

import json

import pytest
import torch

from fused_ops.lora.triton import gemm_config, tune
from fused_ops.lora.triton.gemm_config import GemmConfig
from megatron_lora.__main__ import main


def test_a_machine_without_a_gpu_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    told = capsys.readouterr()
    assert told.err == "megatron-lora: tune: measures kernels of a GPU, and this machine shows none; run it where one is visible\n"
    assert not told.out


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU, on which the second way to cut is the fastest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune, "_random", lambda *shape: torch.empty(*shape, device="meta"))
    times = {name: (0.5 if name == json.dumps({"stages": 3}) else 1.0, 0.0, 0.0) for name in map(json.dumps, tune.PLAIN)}
    monkeypatch.setattr(tune, "measure", lambda candidates, *_, **__: {name: times[name] for name in candidates})


def test_the_fastest_cut_of_every_product_is_kept_beside_other_gpus(gpu, tmp_path, capsys):
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"another": {"x": {}}}))
    assert main(["tune", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["another"] == {"x": {}} and len(found["a GPU"]) == 2 * len(tune.SHAPES)
    assert all(fields == {"stages": 3} and GemmConfig(**fields).stages == 3 for fields in found["a GPU"].values())
    assert "8192 rows, 4096 -> 6144, forward, none" in found["a GPU"] and "8192 rows, 6144 -> 4096, dx, none" in found["a GPU"]
    assert f"{file}: 12 choices for a GPU" in capsys.readouterr().out


def test_a_file_that_cannot_take_choices_is_one_line(gpu, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("no JSON")
    for name, says in (("list.json", "holds no choices"), ("text.json", "is no JSON"), (".", "no file that can be written")):
        assert main(["tune", "--output", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert says in told and told.count("\n") == 1


def test_all_ways_to_cut_that_are_tried_exist():
    tried = [*tune.PLAIN, *(fields for listed in tune.IN_8_BITS.values() for fields in listed)]
    assert all(GemmConfig(**fields) for fields in tried) and gemm_config.CHOICES.name == "gemm_choices.json"
