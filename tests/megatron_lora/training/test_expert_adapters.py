"""Adapters on experts against peft over an nn.Linear for each expert: losses, weights and logits, among others and over stages."""

from __future__ import annotations

import json

import oracle
import pytest
import runs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import random_factor

from megatron_lora.huggingface.adapter_files import AdapterFile, raw_config, write_adapter
from megatron_lora.huggingface.architecture import Architecture, read_architecture

STEPS, R, EXPERT_R, ALPHA = 5, 6, 3, 12.0
MINE = {"r": R, "experts": True, "expert_r": EXPERT_R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "o_proj"]}
SCHEDULE = {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_ratio": 0.0, "global_batch_size": 3, "max_steps": STEPS}


class PlainExperts(torch.nn.Module):
    """Experts of transformers' fused tensors, each three linears."""

    def __init__(self, fused, names):
        super().__init__()
        for gate_up, down in zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True):
            expert = torch.nn.Module()
            for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight.data.copy_(weight)
                expert.add_module(name, linear)
            self.add_module(str(len(self._modules)), expert)
        self.names = names

    def forward(self, x, experts, weights):
        out = torch.zeros_like(x)
        for number, expert in self.named_children():
            gate, up, down = (getattr(expert, name) for name in self.names)
            share = torch.where(experts == int(number), weights, 0.0).sum(-1, keepdim=True)
            out = out + share * down(F.silu(gate(x)) * up(x))
        return out


class Plain(torch.nn.Module):
    """A model without a config, by which peft would convert names."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        for layer in self.model.layers:
            layer.mlp.experts = PlainExperts(layer.mlp.experts, names)

    def forward(self, tokens):
        return self.lm_head(self.model(input_ids=tokens).last_hidden_state)


def start_of(architecture: Architecture) -> AdapterFile:
    """Return an adapter whose B is not zero."""
    weights = {}
    for path, (k, n) in architecture.linear_sizes().items():
        if path.endswith(("q_proj", "o_proj")) or ".experts." in path:
            r = EXPERT_R if ".experts." in path else R
            weights[path] = random_factor(path, "A", 0, r, k), random_factor(path, "B", 0, r, n).T * 0.2
    modules = tuple(dict.fromkeys(path.rpartition(".")[2] for path in weights))
    return AdapterFile(r=R, expert_r=EXPERT_R, lora_alpha=ALPHA, use_rslora=False, target_modules=modules, weights=weights)


def in_peft(model, adapter: AdapterFile, names):
    """Return peft's model of an adapter over linears."""
    from peft import LoraConfig, get_peft_model

    ranks = {"q_proj": R, "o_proj": R}
    config = LoraConfig(r=EXPERT_R, lora_alpha=ALPHA, target_modules=list(adapter.target_modules), rank_pattern=ranks)
    found = get_peft_model(Plain(model, names), config)
    modules = dict(found.base_model.model.named_modules())
    with torch.no_grad():
        for path, (a, b) in adapter.weights.items():
            modules[path].lora_A["default"].weight.copy_(a)
            modules[path].lora_B["default"].weight.copy_(b)
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model, two files of rows, the adapter that the job starts from, and what peft makes of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("experts")
    model, rows = oracle.make_moe(root / "model"), [oracle.make_rows(root / f"{i}.jsonl", num_rows=9, seed=i) for i in range(2)]
    start = start_of(read_architecture(model))
    write_adapter(root / "start", start, str(model))
    theirs = in_peft(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), start, ("gate_proj", "up_proj", "down_proj"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = [oracle.encode(tokenizer, json.loads(line)) for line in rows[0].read_text().splitlines()]
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, eps=1e-6), []
    for step in range(STEPS):
        batch = [samples[(3 * step + i) % 9] for i in range(3)]
        num_targets = sum(int((labels[1:] != -100).sum()) for _, labels in batch)
        loss = sum(F.cross_entropy(theirs(t[None])[0, :-1], labels[1:], reduction="sum") / num_targets for t, labels in batch)
        loss.backward()
        losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    named = {name.replace(".default", ""): p.detach() for name, p in theirs.named_parameters() if p.requires_grad}
    logits = theirs(samples[0][0][None])[0].detach()
    return {"root": root, "model": model, "rows": rows, "losses": losses, "adapter": named, "tokens": samples[0][0], "logits": logits}


SHARDS = {"tp": 2, "sequence": True}  # of every expert


@pytest.mark.parametrize("first, resumed", [
    ({"pp": 2}, {"tp": 2, "ep": 2, "dp": 2}),
    (SHARDS | {"ep": 2}, {"pp": 2}),
    ({"pp": 2, "tp": 2, "ep": 2}, SHARDS),
])  # fmt: skip
def test_a_job_on_experts_is_that_of_peft(first, resumed, scene, pool, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def job(name, rows, **keys):
        data = {"datasets": [{"path": str(rows), "type": "prompt_completion"}], "shuffle": False}
        return {"name": name, **data, **SCHEDULE, "adam_epsilon": 1e-6, **keys}

    jobs = [job("other", scene["rows"][1], r=4, experts=True, lora_dropout=0.2), job("mine", scene["rows"][0], **MINE)]
    jobs[1]["init_adapter"] = str(scene["root"] / "start")

    for parallel, stop_after in ((first, 1), (resumed, None)):
        config = runs.write_config(tmp_path / "config.yaml", scene["model"], tmp_path / "run", jobs, parallel, 40)
        assert runs.start(pool, config, parallel, stop_after) == (0 if stop_after is None else 75)
        assert 0 < len(runs.losses_of(tmp_path / "run", "mine")) <= STEPS - (stop_after is not None)
    found = runs.losses_of(tmp_path / "run", "mine")
    assert max(abs(a - b) for a, b in zip(found, scene["losses"], strict=True)) < 1e-5
    ours = load_file(tmp_path / "run/jobs/mine/adapter_model.safetensors")
    assert all(oracle.distance(ours, scene["adapter"], kind) < 1e-4 for kind in ("lora_A", "lora_B"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(scene["model"]), tmp_path / "run/jobs/mine")
    logits = loaded(scene["tokens"][None]).logits[0]
    assert (logits - scene["logits"]).abs().max() < 1e-4 * scene["logits"].abs().max()
    other = raw_config(tmp_path / "run/jobs/other")
    assert other["lora_dropout"] == 0.0 and other["r"] == 4 and "rank_pattern" not in other
