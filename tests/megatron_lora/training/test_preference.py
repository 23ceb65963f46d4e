"""Preference jobs on complete runs: TRL's own trainer's numbers on every layout, alone as among others, resumed elsewhere mid-epoch."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import runs
import torch
import trl_oracle
from safetensors.torch import load_file, save_file

from megatron_lora.commands.checks import check_run
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.output.run_files import read_windows

STEPS = 10
SETTINGS = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "shuffle": False, "max_steps": STEPS}
JOBS = {
    "sigmoid": {"objective": {"type": "dpo", "beta": 0.3}, "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"],
                "learning_rate": 1e-3, "global_batch_size": 3, "max_grad_norm": 1.0},
    "ipo-sft": {"objective": {"type": "dpo", "beta": 0.5, "loss_type": ["ipo", "sft"], "loss_weights": [0.7, 0.2],
                              "reference": "init_adapter"},
                "r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "o_proj", "up_proj"], "learning_rate": 5e-4,
                "global_batch_size": 4, "max_grad_norm": 0.5, "weight_decay": 0.1},
    "robust": {"objective": {"type": "dpo", "loss_type": ["robust", "hinge"], "label_smoothing": 0.2}, "r": 16, "lora_alpha": 16,
               "target_modules": ["gate_proj", "o_proj"], "learning_rate": 1e-3, "global_batch_size": 2, "max_grad_norm": 0.2},
    "orpo": {"objective": {"type": "orpo", "beta": 0.4}, "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"],
             "learning_rate": 1e-3, "global_batch_size": 3, "max_grad_norm": 1.0},
    "kto": {"objective": {"type": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "reference": "init_adapter"},
            "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj", "up_proj"], "learning_rate": 1e-3, "global_batch_size": 4,
            "max_grad_norm": 1.0},
}  # fmt: skip
WITHOUT_REFERENCE = {
    "cpo": {"objective": {"type": "cpo", "beta": 0.2, "cpo_alpha": 0.5}, "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"],
            "learning_rate": 1e-3, "global_batch_size": 3, "max_grad_norm": 1.0},
    "simpo": {"objective": {"type": "simpo", "beta": 2.0}, "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"],
              "learning_rate": 1e-3, "global_batch_size": 2, "max_grad_norm": 1.0},
}  # fmt: skip
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
MORE_METRICS = {"orpo": (*METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen"),
                "kto": ("kl", *(name for name in METRICS if name != "rewards/accuracies"))}  # fmt: skip
LAYOUTS = {"pp1": ({}, 90), "pp2": ({"pp": 2}, 90), "tp2": ({"tp": 2, "sequence": True}, 160), "dp2": ({"dp": 2}, 90)}


def warm_adapter(model, directory, **settings):
    """Save an adapter whose B is not 0, so that it is not the base model."""
    oracle.make_adapter(model, directory, **settings)
    tensors, generator = load_file(directory / "adapter_model.safetensors"), torch.Generator().manual_seed(settings["seed"])
    warm = {key: torch.randn(t.shape, generator=generator) * 0.05 if "lora_B" in key else t for key, t in tensors.items()}
    save_file(warm, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model, and the jobs with their pairs and starting adapters; beside them one of sft."""
    root = tmp_path_factory.mktemp("preference")
    model, jobs, rows = oracle.make_model(root / "model"), {}, {}
    for i, (name, settings) in enumerate((JOBS | WITHOUT_REFERENCE).items()):
        make = trl_oracle.make_answers if name == "kto" else trl_oracle.make_pairs
        rows[name] = make(root / f"{name}.jsonl", num_rows=4 * settings["global_batch_size"] + (2 if name == "kto" else 1), seed=i)
        lora = {key: settings[key] for key in ("r", "lora_alpha", "target_modules")}
        start = warm_adapter(model, root / f"init-{name}", seed=i, **lora)
        datasets = [{"path": str(rows[name]), "type": "kto" if name == "kto" else "preference"}]
        jobs[name] = {"name": name, "datasets": datasets, "init_adapter": str(start), **SETTINGS, **settings}
    sft = oracle.make_rows(root / "sft.jsonl", num_rows=13, seed=7)
    jobs["sft"] = {"name": "sft", "datasets": [{"path": str(sft), "type": "prompt_completion"}], "r": 8, "global_batch_size": 3,
                   "learning_rate": 1e-3, **SETTINGS}  # fmt: skip
    return {"root": root, "model": model, "jobs": jobs, "rows": rows}


@pytest.fixture(scope="module")
def truth(scene) -> dict:
    """What TRL makes of each preference job."""
    trl = pytest.importorskip("trl")
    assert trl.__version__ == trl_oracle.VERSION, "training/objectives.py states the formulas of another version"
    found = {}
    for name in JOBS:
        job = scene["jobs"][name]
        found[name] = trl_oracle.train_trl(scene["model"], job["init_adapter"], scene["rows"][name], job, scene["root"] / f"trl-{name}")
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep references of one test from another."""
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))


def train(pool, scene, path, parallel, budget, names, **more) -> dict:
    """Train jobs in one run; returns each one's metrics."""
    jobs = [scene["jobs"][name] | more for name in names]
    config = runs.write_config(path.with_suffix(".yaml"), scene["model"], path, jobs, parallel, budget)
    assert runs.start(pool, config, parallel) == 0
    return {name: runs.lines_of(path, name) for name in names}


def adapter_of(path, name: str) -> dict:
    return load_file(path / "jobs" / name / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preference_jobs_among_others_equal_trl_training_each_alone(layout, scene, truth, pool, tmp_path):
    parallel, budget = LAYOUTS[layout]
    found = train(pool, scene, tmp_path / "run", parallel, budget, [*JOBS, "sft"])
    for name, (logs, adapter) in truth.items():
        assert len(found[name]) == len(logs) == STEPS
        for ours, theirs in zip(found[name], logs, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (name, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (name, ours["step"])
            for metric in MORE_METRICS.get(name, METRICS):  # rewards are differences of sums of about 50
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=2e-5), (name, metric, ours["step"])
        saved = adapter_of(tmp_path / "run", name)
        assert oracle.distance(saved, adapter, "lora_A") < 1e-4, name
        assert oracle.distance(saved, adapter, "lora_B") < 1e-4, name


def test_a_job_among_others_trains_as_it_would_alone_and_reads_what_a_run_kept(scene, pool, tmp_path):
    """With dropout, evaluations and shuffled pairs; a run alone finds its references in the cache, and has no slot for them."""
    names = [*JOBS, *WITHOUT_REFERENCE, "sft"]
    more = {"shuffle": True, "val_set_size": 3, "lora_dropout": 0.1, "adam_epsilon": 1e-6, "metric": "eval_loss"}
    among = train(pool, scene, tmp_path / "among", {"pp": 2}, 90, names, **more)
    for name in ("sigmoid", "orpo", "kto", "simpo"):
        path = tmp_path / name
        alone = train(pool, scene, path, {}, 160, [name], **more)[name]
        assert [line.keys() for line in alone] == [line.keys() for line in among[name]]
        for ours, theirs in zip(alone, among[name], strict=True):
            named = {"loss", "eval_loss", "kl", "eval_kl", "logps/chosen", "eval_rewards/margins", "eval_rewards/accuracies"}
            for key in ours.keys() & named:  # null: of labels that none of the answers has
                close = ours[key] is not None and ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=2e-5)
                assert close or ours[key] is theirs[key] is None, (name, key)
        assert "eval_rewards/margins" in alone[-1] and "eval_perplexity" not in alone[-1]
        for kind in ("lora_A", "lora_B"):
            assert oracle.distance(adapter_of(path, name), adapter_of(tmp_path / "among", name), kind) < 1e-4
        assert not references_in(path), "what the first run kept was not read"
    assert references_in(tmp_path / "among")


def references_in(path) -> int:
    """Count the reference slots of a run's plan; those of mismatched samples are of every step."""
    plans = [json.loads(text) for _, text in read_windows(path)]
    return sum(len({*plan["reference"]} - {*plan["mismatched"]}) for plan in plans)


def test_a_run_stopped_mid_epoch_resumes_in_another_layout(scene, pool, tmp_path, monkeypatch):
    """The steps before and after the stop are those of a run that was not stopped, also where the cache of references is lost."""
    names = ["sigmoid", "ipo-sft", "kto"]
    jobs = [scene["jobs"][name] for name in names]

    def start(path, parallel, stop_after=None):
        config = runs.write_config(tmp_path / "config.yaml", scene["model"], path, jobs, parallel, 90)
        return runs.start(pool, config, parallel, stop_after)

    assert start(tmp_path / "whole", {}) == 0
    assert start(tmp_path / "stopped", {"dp": 2}, stop_after=1) == 75
    taken = {name: len(runs.lines_of(tmp_path / "stopped", name)) for name in names}
    assert all(0 < steps < STEPS and steps % 5 for steps in taken.values()), taken  # an epoch is of five steps
    file = Path(scene["jobs"]["ipo-sft"]["init_adapter"]) / "adapter_model.safetensors"
    held = file.read_bytes()
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="jobs.ipo-sft.init_adapter: .*, to which the job is held, has other weights than when"):
        check_run(load_config(tmp_path / "config.yaml"))
    file.write_bytes(held)
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "another cache"))
    assert start(tmp_path / "stopped", {"pp": 2}) == 0
    for name in names:
        whole, stopped = (runs.losses_of(tmp_path / path, name) for path in ("whole", "stopped"))
        assert stopped == pytest.approx(whole, rel=1e-5)
        for kind in ("lora_A", "lora_B"):
            assert oracle.distance(adapter_of(tmp_path / "stopped", name), adapter_of(tmp_path / "whole", name), kind) < 1e-4


KINDS = {"sigmoid": {"adapter": "dora", "init_adapter": None}, "orpo": {"init_lora_weights": "pissa", "init_adapter": None},
         "kto": {"loraplus_lr_ratio": 4.0}, "sft": {"adapter": "dora", "rank_pattern": {"v_proj": 4}},
         "simpo": {"lora_dropout": 0.1}}  # fmt: skip


def test_jobs_of_all_objectives_and_kinds_in_one_run_are_each_the_job_alone(scene, pool, tmp_path):
    """DPO and sft with DoRA, ORPO from PiSSA, KTO with LoRA+: stopped on a pipeline in the middle of an epoch, resumed on tensor ranks."""
    jobs = {name: scene["jobs"][name] | {"adam_epsilon": 1e-6} | kind for name, kind in KINDS.items()}
    parts = [({"pp": 2}, 2, 75), ({"tp": 2, "sequence": True}, None, 0)]
    for parallel, stop_after, status in parts:
        config = runs.write_config(tmp_path / "mixed.yaml", scene["model"], tmp_path / "mixed", list(jobs.values()), parallel, 160)
        assert runs.start(pool, config, parallel, stop_after) == status
        if stop_after:
            taken = {name: len(runs.lines_of(tmp_path / "mixed", name)) for name in jobs}
            assert 0 < taken["sigmoid"] < STEPS and taken["sigmoid"] % 5, taken
    for name, job in jobs.items():
        config = runs.write_config(tmp_path / f"{name}.yaml", scene["model"], tmp_path / name, [job], {}, 160)
        assert runs.start(pool, config, {}) == 0
        assert runs.losses_of(tmp_path / "mixed", name) == pytest.approx(runs.losses_of(tmp_path / name, name), rel=1e-5), name
        mixed, alone = (adapter_of(tmp_path / path, name) for path in ("mixed", name))
        assert mixed.keys() == alone.keys()
        for kind in {key.split(".")[-2 if key.endswith(".weight") else -1] for key in alone}:
            assert oracle.distance(mixed, alone, kind) < 1e-4, (name, kind)


def test_references_are_those_of_peft_with_the_adapter_off(scene, pool, tmp_path):
    """At step 1, where the policy is the adapter that it began from: what the rewards leave out of logps is the reference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = train(pool, scene, tmp_path / "run", {}, 90, ["sigmoid"]).values()
    job = scene["jobs"]["sigmoid"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(scene["model"]), job["init_adapter"])
    tokenizer = AutoTokenizer.from_pretrained(scene["model"])
    rows = [json.loads(line) for line in scene["rows"]["sigmoid"].read_text().splitlines()][: job["global_batch_size"]]
    for answer in ("chosen", "rejected"):
        total = 0.0
        for row in rows:
            tokens, labels = oracle.encode(tokenizer, {"prompt": row["prompt"], "completion": row[answer]})
            with model.disable_adapter(), torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, :-1]
            total -= float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        reference = found[0][f"logps/{answer}"] - found[0][f"rewards/{answer}"] / job["objective"]["beta"]
        assert reference == pytest.approx(total / len(rows), rel=1e-6)
