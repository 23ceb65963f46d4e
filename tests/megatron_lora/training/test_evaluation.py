"""Evaluation against the oracle, in every layout: losses, best weights, and where a job's patience ends it; and what a stop leaves.

The oracle is peft training each job alone, evaluated one record at a time, and transformers' own early stopping.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import oracle
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer

from megatron_lora.data.evaluation import draw_validation
from megatron_lora.training.agree_to_stop import FEWEST_SLOTS

STEPS = 13
SETTINGS = {
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "shuffle": False,
    "max_steps": STEPS,
}
JOBS = {  # seeds of rows with which the patience is over before the end, and the best weights are not the last
    "lasting": {"r": 4, "lora_alpha": 8.0, "global_batch_size": 3, "eval_steps": 5, "eval_on_start": True},
    "stopped": {
        "r": 16,
        "lora_alpha": 512.0,
        "global_batch_size": 2,
        "eval_steps": 1,
        "early_stopping_patience": 3,
        "early_stopping_threshold": 0.02,
    },
    "accurate": {
        "r": 12,
        "lora_alpha": 512.0,
        "global_batch_size": 2,
        "eval_steps": 1,
        "metric": "eval_accuracy",
        "early_stopping_patience": 2,
        "keep": "last",
    },
    "drawn": {"r": 2, "lora_alpha": 16.0, "global_batch_size": 4, "val_set_size": 6},
}
SEEDS = {"lasting": 0, "stopped": 2, "accurate": 4, "drawn": 3}
MODULES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LAYOUTS = {
    "pp1": ({}, 64),
    "pp1-large-microbatches": ({}, 300),
    "pp2": ({"pp": 2}, 64),
    "tp2": ({"tp": 2}, 64),
    "dp2": ({"dp": 2}, 64),
    "pp2-dp2": ({"pp": 2, "dp": 2}, 64),
    "pp2-tp2-sequence": ({"pp": 2, "tp": 2, "sequence": True}, 96),
}


def truth_of(model, start, rows, validation, settings) -> dict:
    """Return the oracle's evaluations (step -> loss, accuracy) until it stops, its adapters, the best step and the last one."""
    every = settings.get("eval_steps") or -(-len(rows.read_text().splitlines()) // settings["global_batch_size"])
    metric, patience = settings.get("metric", "eval_loss"), settings.get("early_stopping_patience")
    args = SimpleNamespace(greater_is_better=metric == "eval_accuracy", metric_for_best_model=metric, save_strategy="best")
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    callback = EarlyStoppingCallback(patience or STEPS + 2, settings.get("early_stopping_threshold", 0.0))
    control = SimpleNamespace(should_training_stop=False)
    evaluations, adapters, losses = {}, {}, []
    for step, trained, loss, adapter in oracle.train_stepwise(model, start, rows, settings):
        adapters[step], state.global_step = adapter, step
        losses += [loss] if step else []
        if step and step % every and step < STEPS or not step and not settings.get("eval_on_start"):
            continue
        eval_loss, accuracy = evaluations[step] = oracle.evaluate(trained, model, validation)
        metrics = {"eval_loss": eval_loss, "eval_accuracy": accuracy}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(SimpleNamespace(args=args, state=state), metrics, None)
        if control.should_training_stop:
            break
    return {"evaluations": evaluations, "adapters": adapters, "losses": losses, "best": state.best_global_step, "last": step}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model; each job's rows, validation rows and starting adapter; and what the oracle makes of them."""
    root = tmp_path_factory.mktemp("evaluation")
    model = oracle.make_model(root / "model")
    jobs, truth = [], {}
    for name, given in JOBS.items():
        settings, seed = {"target_modules": MODULES} | SETTINGS | given, SEEDS[name]
        rows = oracle.make_rows(root / f"{name}.jsonl", num_rows=4 * given["global_batch_size"] + 2, seed=seed)
        lora = {"r": given["r"], "lora_alpha": given["lora_alpha"], "target_modules": MODULES}
        start = oracle.make_adapter(model, root / f"init-{name}", seed=seed, **lora)
        job = settings | {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "init_adapter": str(start)}
        if "val_set_size" in given:
            lines = rows.read_text().splitlines(keepends=True)
            drawn = draw_validation(len(lines), given["val_set_size"], 0)
            trained, validation = root / f"{name}-trained.jsonl", root / f"{name}-val.jsonl"
            trained.write_text("".join(line for line, is_drawn in zip(lines, drawn, strict=True) if not is_drawn))
            validation.write_text("".join(line for line, is_drawn in zip(lines, drawn, strict=True) if is_drawn))
        else:
            trained, validation = rows, oracle.make_rows(root / f"{name}-val.jsonl", num_rows=11, seed=50 + seed)
            job["val_datasets"] = [{"path": str(validation), "type": "prompt_completion"}]
        truth[name] = truth_of(model, start, trained, validation, settings)
        jobs.append(job)
    return {"root": root, "model": model, "jobs": jobs, "truth": truth}


def test_the_oracle_stops_two_jobs_early_with_other_weights_than_the_best(scene):
    """The tests below could not fail otherwise; and nothing that they compare is decided by less than rounding."""
    truth = scene["truth"]
    assert [truth[name]["last"] for name in JOBS][0::3] == [STEPS, STEPS]
    for name in ("stopped", "accurate"):
        assert truth[name]["best"] < truth[name]["last"] < STEPS - 1, name
    losses = [loss for loss, _ in truth["stopped"]["evaluations"].values()]
    best = losses[0]
    for loss in losses[1:]:
        assert abs(best - loss - 0.02) > 1e-4 and abs(best - loss) > 1e-4
        best = min(best, loss)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluations_best_weights_and_early_stops_equal_the_oracles(layout, scene, pool, tmp_path):
    parallel, microbatch_tokens = LAYOUTS[layout]
    run = tmp_path / "run"
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], run, scene["jobs"], parallel, microbatch_tokens)
    assert runs.start(pool, config, parallel) == 0
    states = json.loads((run / "status.json").read_text())["jobs"]
    for name, truth in scene["truth"].items():
        lines = runs.lines_of(run, name)
        found = {line["step"]: (line["eval_loss"], line["eval_accuracy"]) for line in lines if "eval_loss" in line}
        assert list(found) == list(truth["evaluations"]), name
        for step, (loss, accuracy) in truth["evaluations"].items():
            assert found[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy, abs=1e-6)), (name, step)
        assert runs.losses_of(run, name) == pytest.approx(truth["losses"], rel=1e-5), name
        # each line of an evaluation stands behind the line of its step
        order = [(line["step"], "eval_loss" in line) for line in lines]
        assert order == sorted(order), name
        assert states[name]["state"] == ("done" if truth["last"] == STEPS else "stopped"), name
        kept = truth["last"] if JOBS[name].get("keep") == "last" else truth["best"]
        job_dir = run / "jobs" / name
        for directory, step in ((job_dir, kept), (job_dir / f"best-{truth['best']}", truth["best"])):
            saved = load_file(directory / "adapter_model.safetensors")
            for kind in ("lora_A", "lora_B"):
                assert oracle.distance(saved, truth["adapters"][step], kind) < 1e-4, (name, directory)
        assert [path.name for path in job_dir.glob("best-*")] == [f"best-{truth['best']}"]


def rows_of(path, num_rows: int, seed: int) -> list[dict]:
    """Write rows; return them as the datasets of a config."""
    return [{"path": str(oracle.make_rows(path, num_rows=num_rows, seed=seed)), "type": "prompt_completion"}]


@pytest.fixture(scope="module")
def owed(scene, pool) -> dict:
    """A run whose evaluations take many slots, and after how many chunks of slots a stop falls into one: after 0, 2 and 4 steps."""
    root = scene["root"]
    job = {"name": "owed", "datasets": rows_of(root / "owed.jsonl", 8, 7), "val_datasets": rows_of(root / "owed-val.jsonl", 30, 8)}
    job |= {"r": 4, "lora_alpha": 64.0, "global_batch_size": 2, "learning_rate": 1e-3, "eval_steps": 2, "eval_on_start": True}
    job |= {"max_steps": 4, "warmup_ratio": 0.0, "seed": 3}
    config = runs.write_config(root / "steady.yaml", scene["model"], root / "steady", [job], {}, 32)
    assert runs.start(pool, config, {}) == 0
    slots = []  # of each chunk, the last slot: the version that it evaluates, or None
    for window in sorted((root / "steady" / "plan").glob("window-*.json")):
        plan = json.loads(window.read_text())
        versions = [slot[0][1] if i in plan["evaluate"] else None for i, slot in enumerate(plan["microbatches"])]
        slots += [versions[min(first + FEWEST_SLOTS, len(versions)) - 1] for first in range(0, len(versions), FEWEST_SLOTS)]
    return {"job": job, "run": root / "steady", "stops": {version: slots.index(version) for version in (0, 2, 4)}}


@pytest.mark.parametrize("version", [0, 2, 4])
def test_an_evaluation_that_is_due_when_a_run_is_stopped_is_made_first_when_it_resumes(version, owed, scene, pool, tmp_path):
    run = tmp_path / "run"
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], run, [owed["job"]], {}, 32)
    assert runs.start(pool, config, {}, stop_after=owed["stops"][version]) == 75
    states = [json.loads(path.read_text()) for path in run.glob("jobs/owed/checkpoint-*/state.json")]
    assert [(state["step"], state["evaluation_due"]) for state in states] == ([(version, True)] if version else [])
    assert [line["step"] for line in runs.lines_of(run, "owed") if "eval_loss" in line] == list(range(0, version, 2))
    assert runs.start(pool, config, {}) == 0
    for ours, theirs in zip(runs.lines_of(run, "owed"), runs.lines_of(owed["run"], "owed"), strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-5)
    for directory in ("jobs/owed", "jobs/owed/best-4"):
        mine, other = (load_file(each / directory / "adapter_model.safetensors") for each in (run, owed["run"]))
        assert max(oracle.distance(mine, other, kind) for kind in ("lora_A", "lora_B")) < 1e-4


def test_an_evaluation_has_no_dropout(scene, pool, tmp_path):
    start = oracle.make_adapter(scene["model"], tmp_path / "start", r=8, lora_alpha=64, target_modules=MODULES, seed=0)
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({key: torch.randn_like(value) * 0.05 for key, value in tensors.items()}, start / "adapter_model.safetensors")
    job = {"datasets": rows_of(tmp_path / "a.jsonl", 6, 1), "val_datasets": rows_of(tmp_path / "b.jsonl", 9, 2), "eval_on_start": True}
    job |= {"init_adapter": str(start), "r": 8, "lora_alpha": 64, "target_modules": MODULES, "max_steps": 2, "learning_rate": 1e-5}
    jobs = [job | {"name": f"dropout-{p}", "lora_dropout": p} for p in (0.0, 0.5)]
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], tmp_path / "run", jobs, {}, 64)
    assert runs.start(pool, config, {}) == 0
    (without, *rest), (half, *_) = (runs.lines_of(tmp_path / "run", each["name"]) for each in jobs)
    assert without["eval_loss"] == pytest.approx(half["eval_loss"], rel=1e-6)
    losses = [runs.losses_of(tmp_path / "run", each["name"])[0] for each in jobs]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "dropout changes nothing"
