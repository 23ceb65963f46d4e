"""DoRA against the oracle: jobs of LoRA and DoRA trained together equal peft training each alone, also where a run is stopped between."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import runs
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_effect import applied, load_base
from megatron_lora.huggingface.adapter_files import read_adapter

STEPS = 20
KINDS = ("lora", "dora")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0}
JOBS = [
    {"name": "all", "adapter": "dora", "r": 4, "lora_alpha": 8.0, "target_modules": ALL, "learning_rate": 1e-3, "global_batch_size": 3},
    {"name": "lora", "r": 16, "lora_alpha": 16.0, "target_modules": ALL, "learning_rate": 1e-3, "global_batch_size": 2},
    {
        "name": "some",
        "adapter": "dora",
        "r": 8,
        "lora_alpha": 32.0,
        "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
        "layers_to_transform": [0, 1, 3],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"o_proj": 12},
        "learning_rate": 5e-4,
        "loraplus_lr_ratio": 4.0,
        "weight_decay": 0.1,
        "global_batch_size": 5,
    },
]
OF_PEFT = ("r", "lora_alpha", "target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern")
LAYOUTS = {  # the layout, the budget, and the layout in which the run resumes once it has been stopped
    "pp2-dp2": ({"pp": 2, "dp": 2}, 150, None),
    "pp2-tp2-sequence": ({"pp": 2, "tp": 2, "sequence": True}, 96, None),
    "tp2-then-pp1": ({"tp": 2}, 64, {}),
    "pp1-then-tp2": ({}, 64, {"tp": 2}),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model, each job's rows and starting adapter, and what the oracle makes of them."""
    root = tmp_path_factory.mktemp("dora")
    model = oracle.make_model(root / "model")
    jobs, truth = [], {}
    for i, settings in enumerate(JOBS):
        settings = SHARED | settings
        rows = oracle.make_rows(root / f"{settings['name']}.jsonl", num_rows=4 * settings["global_batch_size"] + 1, seed=i)
        lora = {key: settings[key] for key in OF_PEFT if key in settings}
        start = oracle.make_adapter(model, root / f"init-{settings['name']}", seed=i, use_dora="adapter" in settings, **lora)
        truth[settings["name"]] = oracle.train_alone(model, start, rows, settings | {"max_steps": STEPS})
        datasets = [{"path": str(rows), "type": "prompt_completion"}]
        jobs.append(settings | {"datasets": datasets, "init_adapter": str(start), "max_steps": STEPS, "shuffle": False})
    return {"root": root, "model": model, "jobs": jobs, "truth": truth}


def train(scene, pool, folder, jobs, parallel, tokens, stop_after=None, **keys) -> Path:
    """Train jobs in a layout, stop there if that is wanted; return the run's directory."""
    config = runs.write_config(folder / "config.yaml", scene["model"], folder / "run", jobs, parallel, tokens)
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    assert runs.start(pool, config, parallel, stop_after) == (0 if stop_after is None else 75)
    return folder / "run"


def adapter_in(run: Path, name: str) -> dict:
    return load_file(run / "jobs" / name / "adapter_model.safetensors")


def check(run: Path, scene: dict) -> None:
    """Compare the jobs of a run with the oracle's."""
    for settings in scene["jobs"]:
        name = settings["name"]
        losses, adapter = scene["truth"][name]
        assert max(abs(a - b) / b for a, b in zip(runs.losses_of(run, name), losses, strict=True)) < 1e-5, name
        for kind in ("lora_A", "lora_B", *(["magnitude"] if "adapter" in settings else [])):
            assert oracle.distance(adapter_in(run, name), adapter, kind) < 1e-4, (name, kind)


@pytest.fixture(scope="module")
def trained(scene, pool, tmp_path_factory) -> Path:
    """A run of one rank whose layers all run again in backward."""
    return train(scene, pool, tmp_path_factory.mktemp("trained"), scene["jobs"], {}, 64, recompute="full")


def test_jobs_of_both_kinds_equal_peft_training_each_alone(trained, scene):
    check(trained, scene)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_they_do_in_other_layouts_and_after_a_stop(layout, scene, pool, tmp_path):
    parallel, tokens, then = LAYOUTS[layout]
    run = train(scene, pool, tmp_path, scene["jobs"], parallel, tokens, None if then is None else 2)
    if then is not None:
        assert any(0 < len(runs.losses_of(run, settings["name"])) < STEPS for settings in JOBS)
        train(scene, pool, tmp_path, scene["jobs"], then, tokens)
    check(run, scene)


def test_what_is_written_is_what_peft_computes_and_jobs_go_on_from_it(trained, scene, pool, tmp_path):
    base, tokens = AutoModelForCausalLM.from_pretrained(scene["model"]), torch.arange(3, 40)[None]
    plain = base(tokens).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, trained / "jobs" / "some").eval()(tokens).logits
    with applied(again := load_base(scene["model"]), read_adapter(trained / "jobs" / "some")), torch.no_grad():
        assert (again(tokens).logits - theirs).abs().max() < 1e-4 < (plain - theirs).abs().max()
    by_name = {settings["name"]: settings for settings in scene["jobs"]}
    short = {"max_steps": 3, "shuffle": False}
    with pytest.raises(UserError, match="jobs.some.adapter: lora, and init_adapter .* is a DoRA adapter; set adapter: dora"):
        train(scene, pool, tmp_path, [by_name["some"] | {"init_adapter": str(trained / "jobs" / "some"), "adapter": "lora"}], {}, 96)
    onward = by_name["some"] | short | {"init_adapter": str(trained / "jobs" / "some")}
    of_lora = [by_name["lora"] | short | {"init_adapter": str(trained / "jobs" / "lora"), "name": kind, "adapter": kind} for kind in KINDS]
    run = train(scene, pool, tmp_path, [onward, *of_lora], {"pp": 2}, 96)
    losses, adapter = oracle.train_alone(scene["model"], trained / "jobs" / "some", scene["root"] / "some.jsonl", onward)
    assert max(abs(a - b) / b for a, b in zip(runs.losses_of(run, "some"), losses, strict=True)) < 1e-5
    assert oracle.distance(adapter_in(run, "some"), adapter, "magnitude") < 1e-4
    lora, dora = (runs.losses_of(run, kind) for kind in KINDS)
    assert abs(lora[0] - dora[0]) < 1e-6 * lora[0], "a LoRA adapter begins as it is: its magnitudes are its norms"
    assert abs(lora[2] - dora[2]) > 1e-6 * lora[2]
