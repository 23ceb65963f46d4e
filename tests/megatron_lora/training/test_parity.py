"""Promise 1 against the oracle: three different jobs trained together equal peft training each alone, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import runs
from safetensors.torch import load_file

STEPS = 20
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
JOBS = [
    {
        "name": "four",
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": ALL,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 2,
        "global_batch_size": 3,
        "max_grad_norm": 0.5,
        "weight_decay": 0.0,
    },
    {
        "name": "eight",
        "r": 8,
        "lora_alpha": 32.0,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "learning_rate": 5e-4,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.0,
        "global_batch_size": 5,
        "max_grad_norm": 1.0,
        "weight_decay": 0.1,
    },
    {
        "name": "sixteen",
        "r": 16,
        "lora_alpha": 16.0,
        "target_modules": ["k_proj", "o_proj", "up_proj", "gate_proj"],
        "learning_rate": 1e-3,
        "loraplus_lr_ratio": 3.0,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.25,
        "global_batch_size": 2,
        "max_grad_norm": 0.1,
        "weight_decay": 0.01,
    },
]
LAYOUTS = {
    "pp1": ({}, 64),
    "pp1-large-microbatches": ({}, 300),
    "pp2": ({"pp": 2}, 64),
    "pp2-large-microbatches": ({"pp": 2}, 150),
    "tp2": ({"tp": 2}, 64),
    "tp2-sequence": ({"tp": 2, "sequence": True}, 96),
    "dp2": ({"dp": 2}, 64),
    "pp2-dp2": ({"pp": 2, "dp": 2}, 64),
    "tp2-dp2-sequence": ({"tp": 2, "dp": 2, "sequence": True}, 64),
    "pp2-tp2": ({"pp": 2, "tp": 2}, 64),
    "pp2-tp2-sequence": ({"pp": 2, "tp": 2, "sequence": True}, 96),
}


def weigh(path: Path) -> None:
    """Give rows weights, and one of them none."""
    rows = [json.loads(line) | ({"weight": 0.25 + 0.5 * k} if k else {}) for k, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model, each job's rows and starting adapter, and what the oracle makes of them."""
    root = tmp_path_factory.mktemp("parity")
    model = oracle.make_model(root / "model")
    jobs, truth = [], {}
    for i, settings in enumerate(JOBS):
        rows = oracle.make_rows(root / f"{settings['name']}.jsonl", num_rows=4 * settings["global_batch_size"] + 1, seed=i)
        if not i:
            weigh(rows)
        lora = {key: settings[key] for key in ("r", "lora_alpha", "target_modules")}
        start = oracle.make_adapter(model, root / f"init-{settings['name']}", seed=i, **lora)
        truth[settings["name"]] = oracle.train_alone(model, start, rows, settings | {"max_steps": STEPS})
        datasets = [{"path": str(rows), "type": "prompt_completion"}]
        jobs.append(settings | {"datasets": datasets, "init_adapter": str(start), "max_steps": STEPS, "shuffle": False})
    return {"root": root, "model": model, "jobs": jobs, "truth": truth}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jobs_trained_together_equal_peft_training_each_alone(layout, scene, pool, tmp_path):
    parallel, microbatch_tokens = LAYOUTS[layout]
    output_dir = tmp_path / "run"
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], output_dir, scene["jobs"], parallel, microbatch_tokens)
    assert runs.start(pool, config, parallel) == 0
    for settings in scene["jobs"]:
        name = settings["name"]
        losses, adapter = scene["truth"][name]
        ours = runs.losses_of(output_dir, name)
        assert len(ours) == STEPS
        assert max(abs(a - b) / b for a, b in zip(ours, losses, strict=True)) < 1e-5, name
        saved = load_file(output_dir / "jobs" / name / "adapter_model.safetensors")
        assert oracle.distance(saved, adapter, "lora_A") < 1e-4, name
        assert oracle.distance(saved, adapter, "lora_B") < 1e-4, name
