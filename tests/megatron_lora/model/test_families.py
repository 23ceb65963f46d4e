"""Every family against peft: an exported adapter loads there with our logits, and its gradients are ours."""

from __future__ import annotations

import pytest
import torch
from full_logits import full_logits
from safetensors.torch import load_file, save_file
from tiny import (
    KINDS,
    MULTIMODAL,
    attach_adapters,
    joined_gradients,
    random_factor,
    save_model,
    save_multimodal,
    stage_input,
)

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_effect import faults_of_files, linear_sizes, load_base
from megatron_lora.huggingface.adapter_files import AdapterFile, of_expert, raw_config, read_adapter, write_adapter
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.export import export
from megatron_lora.huggingface.families import FAMILIES, OTHERS
from megatron_lora.huggingface.merge import merge
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.stage import build_stage

LENGTHS, R = (5, 22, 1, 16), 4
RECOMPUTE = ("none", "cheap", "full")


def largest_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kind", [*KINDS, *MULTIMODAL])
def test_an_adapter_is_that_of_peft(kind, tmp_path, one_process):
    from peft import PeftModel

    reference = (save_multimodal if kind in MULTIMODAL else save_model)(tmp_path / "base", kind)
    architecture = read_base_model(tmp_path / "base")
    weights = {}
    for layer in range(architecture.num_layers):
        for module, (num_in, num_out) in architecture.module_sizes.items():
            path = architecture.module_path(layer, module)
            weights[path] = (random_factor(path, "A", 0, R, num_in), random_factor(path, "B", 0, R, num_out).T)
    modules = tuple(architecture.module_sizes)
    adapter = AdapterFile(r=R, lora_alpha=R / 2, use_rslora=False, target_modules=modules, weights=weights)
    write_adapter(tmp_path / "adapter", adapter, str(tmp_path / "base"))
    reader = read_adapter(tmp_path / "adapter")
    assert reader.target_modules == tuple(sorted(modules)) and reader.weights.keys() == weights.keys()
    assert faults_of_files(tmp_path / "adapter", raw_config(tmp_path / "adapter"), linear_sizes(load_base(tmp_path / "base"))) == []
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    microbatch = stage_input(LENGTHS, architecture.vocab_size, ((0, sum(LENGTHS), 0),))
    logits = torch.cat([theirs(tokens[None]).logits[0] for tokens in microbatch.tokens.split(LENGTHS)])
    losses = torch.nn.functional.cross_entropy(logits, microbatch.labels, reduction="none")
    (losses * microbatch.weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}

    stage = build_stage(architecture, tmp_path / "base", ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))
    found = []
    for recompute in RECOMPUTE:
        stage.set_recompute(recompute)
        attach_adapters(stage.linears, 1, ranks=(R,), skip=())
        hidden = stage(microbatch)
        assert largest_error(full_logits(hidden, stage.head), logits) < 1e-5
        (stage.losses(hidden, microbatch.labels) * microbatch.weights).sum().backward()
        found.append(joined_gradients(stage.linears))
    assert len(expected) == len(found[0])
    for path in weights:
        for name, transposed in (("A", False), ("B", True)):
            gradient = expected[f"base_model.model.{path}.lora_{name}.default.weight"]
            ours = found[0][f"{path} {name} 0"]
            assert largest_error(ours.T if transposed else ours, gradient) < 1e-4, (path, name)
            assert all(torch.equal(ours, again[f"{path} {name} 0"]) for again in found), f"{path} {name}: policies differ"


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_part_under_newer_names_is_the_same(kind, tmp_path, one_process):
    save_multimodal(tmp_path, kind)
    architecture = read_base_model(tmp_path)
    assert "the text part alone is trained" in architecture.notes()[0]
    stages = [build_stage(architecture, tmp_path, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))]
    file, renamed = tmp_path / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        newer = name.replace("language_model.model.", "language_model.").removeprefix("language_model.lm_head")
        renamed["lm_head.weight" if newer == ".weight" else f"model.{newer}"] = tensor
    assert not renamed.keys() & load_file(file).keys() and any("vision_tower" in name for name in renamed)
    save_file(renamed, file)
    stages.append(build_stage(read_base_model(tmp_path), tmp_path, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu")))
    pairs = list(zip(*(stage.parameters() for stage in stages), strict=True))
    assert pairs and all(torch.equal(ours, other) for ours, other in pairs)


@pytest.mark.parametrize("kind, nearest", [(kind, nearest) for kind, (nearest, _) in OTHERS.items()])
def test_other_families_are_refused_with_the_nearest(kind, nearest, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(
        UserError, match=f"model_type is '{kind}'; supported are llama, .*; the nearest is {nearest}, from which it differs"
    ):
        read_architecture(tmp_path)
    assert nearest in FAMILIES


def test_each_family_is_tested():
    from transformers import CONFIG_MAPPING

    tested = {cls.model_type for cls in (CONFIG_MAPPING[name] for name in FAMILIES)}
    import transformers

    assert {getattr(transformers, f"{name}Config").model_type for name, _ in KINDS.values()} == tested == set(FAMILIES)


@pytest.mark.parametrize("kind", ["qwen3_moe-unnormalised", "mixtral"])
def test_an_adapter_of_experts_is_that_of_peft_and_merges(kind, tmp_path, one_process):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "base", kind)
    architecture = read_base_model(tmp_path / "base")
    spec = AdapterSpec(r=R, scale=0.5, dropout=0.0, target_modules=frozenset(TARGET_MODULES), expert_rank=3, expert_scale=R / 2 / 3)
    weights = {
        path: (random_factor(path, "A", 0, r := 3 if of_expert(path) else R, k), random_factor(path, "B", 0, r, n).T)
        for path, (k, n) in architecture.linear_sizes().items()
    }
    modules = tuple(architecture.adapter_modules)
    adapter = AdapterFile(r=R, expert_r=3, lora_alpha=R / 2, use_rslora=False, target_modules=modules, weights=weights)
    stage = build_stage(architecture, tmp_path / "base", ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))
    arena = Arena(stage.adapted, [spec], tensor_rank=0, tensor_ranks=1, dtype=torch.float32, device=torch.device("cpu"))
    arena.load(0, weights)
    microbatch, found = stage_input(LENGTHS, architecture.vocab_size, ((0, sum(LENGTHS), 0),)), []
    for recompute in RECOMPUTE:
        stage.set_recompute(recompute)
        hidden = stage(microbatch)
        (stage.losses(hidden, microbatch.labels) * microbatch.weights).sum().backward()
        found.append(arena.grad.clone())
        arena.grad.zero_()
    assert found[0].any() and all(torch.equal(found[0], other) for other in found[1:])
    ours = full_logits(hidden, stage.head)
    for form in ("peft", "portable"):
        write_adapter(tmp_path / form, export(adapter, form, "fp32"), str(tmp_path / "base"))
        read = read_adapter(tmp_path / form)
        assert (read.r, read.expert_r) == ((R, 3) if form == "peft" else (R, R)) and read.weights.keys() == weights.keys()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(base, tmp_path / form)
        logits = torch.cat([theirs(tokens[None]).logits[0] for tokens in microbatch.tokens.split(LENGTHS)])
        assert largest_error(ours, logits) < 1e-5
    merge(tmp_path / "base", architecture, [(adapter, 1.0)], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits = torch.cat([merged(tokens[None]).logits[0] for tokens in microbatch.tokens.split(LENGTHS)])
    assert largest_error(ours, logits) < 1e-5
    with pytest.raises(UserError, match="adapts experts, which check-adapter does not compare; load it with peft, or merge it"):
        faults_of_files(tmp_path / "peft", raw_config(tmp_path / "peft"), linear_sizes(base))
