"""The size of an adapter, as `megatron-lora plan` says it, is PEFT's."""

import dataclasses

import pytest
import tiny

from megatron_lora.commands.plan import adapter_lines, num_parameters
from megatron_lora.config.schema import JobConfig, load_jobs
from megatron_lora.huggingface.architecture import read_architecture


def job(name: str, r: int, modules: list[str]) -> JobConfig:
    mapping = {"name": name, "datasets": [{"path": "d.jsonl", "type": "text"}], "r": r, "target_modules": modules}
    return load_jobs(None, [mapping], 0)[0]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3_text", "qwen3_moe"])
def test_parameters_are_those_of_peft(tmp_path, kind, adapter):
    from peft import LoraConfig, get_peft_model

    base = tiny.save_model(tmp_path, kind)
    architecture = read_architecture(tmp_path)
    modules = list(architecture.module_sizes)
    model = get_peft_model(base, LoraConfig(r=6, target_modules=modules, use_dora=adapter == "dora", task_type="CAUSAL_LM"))
    number, _ = model.get_nb_trainable_parameters()
    (line,) = adapter_lines([dataclasses.replace(job("a", 6, modules), adapter=adapter)], architecture)
    assert line == f"a: {number:,} parameters, {4 * number / 1e6:.0f} MB, and {12 * number / 1e6:.0f} MB a checkpoint"


def test_parameters_of_experts(tmp_path):
    tiny.save_model(tmp_path, "qwen3_moe")
    architecture = read_architecture(tmp_path)
    keys = {"name": "a", "datasets": [{"path": "d.jsonl", "type": "text"}], "r": 6, "experts": True, "expert_r": 5}
    (targeted,) = load_jobs(None, [keys | {"target_modules": ["q_proj", "gate_proj", "up_proj"]}], 0)
    number = 3 * (6 * (32 + 64) + 2 * 8 * 5 * (32 + 24))  # layers (q + gate and up of 8 experts)
    assert num_parameters(targeted, architecture) == number


def test_equal_adapters_share_a_line(tmp_path):
    tiny.save_model(tmp_path, "llama")
    architecture = read_architecture(tmp_path)
    many = [job(f"m{i}", 4, ["q_proj"]) for i in range(4)]
    lines = adapter_lines([*many, job("b", 8, ["q_proj"]), job("c", 8, ["q_proj"])], architecture)
    assert [line.split(":")[0] for line in lines] == ["each of 4 adapters", "b, c"]
