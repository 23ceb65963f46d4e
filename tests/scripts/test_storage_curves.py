"""Benchmarks of stored bits: distances of loss curves, and synthetic checkpoints that the loader takes in every form."""

import pytest
import torch

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.stage import build_stage
from scripts.bench import loading
from scripts.bench.storage_curves import PEFT, QLORA, figures

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 9, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_distances_are_the_largest_of_any_step_and_job():
    curves = {"native": [[3.0, 1.0], [2.0, 2.0]], PEFT: [[3.0, 1.5], [2.0, 2.0]], QLORA: [[3.0, 1.0], [2.0, 4.0]]}
    found = figures(curves, ["a", "b"])
    assert found["native"] == {"last": {"a": 2.0, "b": 2.0}, "apart_from": {"native": 0.0, "peft": 0.5, "qlora": 2.0}}
    assert found[QLORA]["last"] == {"a": 2.0, "b": 3.0} and found[PEFT]["apart_from"]["qlora"] == 2.0


@pytest.mark.parametrize(("kind", "base_weights"), loading.CASES)
def test_a_synthetic_checkpoint_is_loaded(kind, base_weights, tmp_path, monkeypatch, one_process):
    monkeypatch.setitem(loading.SHAPES, "tiny", loading.SHAPES["llama-3.1-70b"] | SHAPE)
    loading.write_checkpoint(tmp_path, "tiny", 2, kind, vocab=50)
    stage = build_stage(
        read_base_model(tmp_path), tmp_path, ParallelConfig(), dtype=torch.bfloat16, device=torch.device("cpu"), base_weights=base_weights
    )  # fmt: skip
    assert len(stage.layers) == 2 and len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert all((linear.frozen is None) == (base_weights == "native") for linear in stage.linears)
