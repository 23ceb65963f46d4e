"""Patterns and starts of adapters against peft: losses, weights and logits of jobs trained together, in layouts, stopped and resumed."""

from __future__ import annotations

import oracle
import pytest
import runs
import torch
from safetensors.torch import load_file

STEPS = 20
SCHEDULE = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 0.5, "weight_decay": 0.1}
JOBS = {  # keys that peft has under the same names
    "patterns": {
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "layers.2.mlp.down_proj", "up_proj"],
        "exclude_modules": ["layers.0.self_attn.v_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"k_proj": 6, r"layers\.2\.self_attn\.q_proj": 17, "up_proj": 2},
        "alpha_pattern": {"up_proj": 5.0},
        "loraplus_lr_ratio": 3.0,
        "adam_epsilon": 1e-3,  # so that the size of a gradient counts
    },
    "first-stage": {"r": 3, "lora_alpha": 6.0, "target_modules": r".*layers\.[01]\..*(o|gate)_proj", "use_rslora": True,
                    "alpha_pattern": {"o_proj": 4.0}},
    "all": {"r": 2, "lora_alpha": 4.0, "target_modules": "all-linear", "exclude_modules": r".*\.1\..*_proj"},
    "pissa": {"r": 4, "lora_alpha": 6.0, "target_modules": ["q_proj", "o_proj", "down_proj"], "rank_pattern": {"o_proj": 3},
              "init_lora_weights": "pissa"},
    "portable": {"r": 3, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2], "use_rslora": True,
                 "rank_pattern": {"v_proj": 5}, "export": "portable"},
    "olora": {"r": 4, "lora_alpha": 2.0, "target_modules": ["v_proj", "gate_proj"], "use_rslora": True, "init_lora_weights": "olora"},
}  # fmt: skip
OF_PEFT = ("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
           "init_lora_weights")  # fmt: skip


def start_of(model, job: dict):
    """Return peft's model of a job as peft starts it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(**{key: job[key] for key in OF_PEFT if key in job}, task_type="CAUSAL_LM"))


def is_cut(job: dict) -> bool:
    """Whether a job's start is cut out of the base weights."""
    return "init_lora_weights" in job


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("kinds")
    model = oracle.make_model(root / "model")
    jobs, truth = [], {}
    for i, (name, keys) in enumerate(JOBS.items()):
        rows = oracle.make_rows(root / f"{name}.jsonl", num_rows=9, seed=i, longest=20)
        job = {"name": name, **keys, **SCHEDULE, "global_batch_size": 2, "max_steps": STEPS, "shuffle": False}
        theirs, initial = start_of(model, job), root / f"init-{name}"
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(initial)
        job |= {"datasets": [{"path": str(rows), "type": "prompt_completion"}]} | ({} if is_cut(job) else {"init_adapter": str(initial)})
        *_, (_, trained, _, adapter) = found = list(oracle.train_stepwise(model, initial, rows, job, theirs if is_cut(job) else None))
        logits = trained(torch.arange(3, 30)[None]).logits[0].detach()
        truth[name] = [loss for _, _, loss, _ in found[1:]], adapter, logits
        jobs.append(job)
    return {"root": root, "model": model, "jobs": jobs, "truth": truth}


def converted(ours: dict, theirs: dict) -> dict:
    """Return the trained half of an adapter of a frozen half, with the signs of peft's components."""
    found = {}
    for key, a in ours.items():
        if "lora_A" in key:
            b = ours[key.replace("lora_A", "lora_B")]
            r = len(a) // 2
            sign = (a[:r] * theirs[key]).sum(1).sign()
            found[key], found[key.replace("lora_A", "lora_B")] = a[:r] * sign[:, None], b[:, :r] * sign
    return found


@pytest.mark.parametrize(("parallel", "resumed"), [({}, None), ({"tp": 2}, {"pp": 2})])
def test_jobs_of_all_kinds_are_those_of_peft(parallel, resumed, scene, pool, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run(parallel, stop_after=None):
        config = runs.write_config(tmp_path / "config.yaml", scene["model"], tmp_path / "run", scene["jobs"], parallel, 64)
        return runs.start(pool, config, parallel, stop_after)

    assert run(parallel, stop_after=3 if resumed else None) == (75 if resumed else 0)
    if resumed:
        assert 0 < len(runs.losses_of(tmp_path / "run", "pissa")) < STEPS and run(resumed) == 0
    for job in scene["jobs"]:
        name, (losses, adapter, logits) = job["name"], scene["truth"][job["name"]]
        ours = runs.losses_of(tmp_path / "run", name)
        assert max(abs(a - b) / b for a, b in zip(ours, losses, strict=True)) < 1e-5, name
        saved = load_file(tmp_path / "run/jobs" / name / "adapter_model.safetensors")
        saved = converted(saved, adapter) if is_cut(job) else saved
        assert not (tmp_path / "run/jobs" / name / "start").exists()
        if name == "portable":
            assert {min(tensor.shape) for tensor in saved.values()} == {5} and saved.keys() == adapter.keys()
        else:
            assert all(oracle.distance(saved, adapter, kind) < 1e-4 for kind in ("lora_A", "lora_B")), name
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(scene["model"]), tmp_path / "run/jobs" / name)
        found = loaded(torch.arange(3, 30)[None]).logits[0]
        assert (found - logits).abs().max() < 1e-4 * logits.abs().max(), name
    if resumed:
        jobs_continue_from_what_was_written(scene, pool, tmp_path)


def jobs_continue_from_what_was_written(scene, pool, path):
    """Check jobs that start from PEFT directories of others: of patterns, of a frozen half, of a portable form."""
    keys = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
    changes = {
        "patterns": {key: JOBS["patterns"][key] for key in (*keys, *OF_PEFT) if key in JOBS["patterns"]},
        "pissa": {"r": 8, "lora_alpha": 12.0, "target_modules": JOBS["pissa"]["target_modules"], "rank_pattern": {"o_proj": 6}},
        "portable": {"r": 5, "lora_alpha": 5.0, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    }
    jobs, wanted = [], {}
    for name, own in changes.items():
        start, rows = path / "run/jobs" / name, scene["root"] / f"{name}.jsonl"
        job = {"name": name, **SCHEDULE, "global_batch_size": 3, "max_steps": 3, "shuffle": False, "init_adapter": str(start), **own}
        wanted[name], _ = oracle.train_alone(scene["model"], start, rows, job)
        jobs.append(job | {"datasets": [{"path": str(rows), "type": "prompt_completion"}]})
    config = runs.write_config(path / "again.yaml", scene["model"], path / "again", jobs, {}, 64)
    assert runs.start(pool, config, {}) == 0
    for name, losses in wanted.items():
        assert max(abs(a - b) / b for a, b in zip(runs.losses_of(path / "again", name), losses, strict=True)) < 1e-5, name
