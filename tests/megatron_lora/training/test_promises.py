"""Promises 1, 2 and 6 on complete runs: solo equivalence with dropout, isolation bit for bit, adapters that are the user's."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import runs
import torch
from full_logits import full_logits
from safetensors.torch import load_file, save_file

STEPS = 6
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def job(name: str, rows, **settings) -> dict:
    """Return a job of the config with short defaults."""
    defaults = {"r": 8, "lora_alpha": 16, "learning_rate": 1e-3, "global_batch_size": 3, "max_steps": STEPS, "seed": 5}
    return {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}]} | defaults | settings


def job_on(model: str):
    """Return `job` for a model, which has adapters on attention where the model has experts."""
    return job if model == "model" else partial(job, target_modules=MODULES[:4])


def adapter_of(output_dir, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a job's adapter."""
    return load_file(output_dir / "jobs" / name / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model and four files of rows."""
    root = tmp_path_factory.mktemp("promises")
    rows = [oracle.make_rows(root / f"rows-{i}.jsonl", num_rows=12, seed=10 + i) for i in range(4)]
    return {"root": root, "model": oracle.make_model(root / "model"), "moe": oracle.make_moe(root / "moe"), "rows": rows}


@pytest.mark.parametrize(
    ("model", "parallel", "microbatch_tokens"),
    [
        *(("model", {}, 48), ("model", {"pp": 2}, 130), ("model", {"tp": 2, "sequence": True}, 64)),
        *(("moe", layout, 64) for layout in ({"tp": 2, "sequence": True}, {"tp": 2, "ep": 2})),
    ],
)
def test_a_job_with_dropout_trains_as_it_would_alone(model, parallel, microbatch_tokens, scene, pool, tmp_path):
    rows, job = scene["rows"], job_on(model)
    # Adam's first update is almost the sign of the gradient: with its default epsilon an element whose gradient is below rounding
    # noise goes either way, in any implementation, and one such element in these few steps is more than the bound.
    mine = job("mine", rows[0], lora_dropout=0.1, warmup_ratio=0.0, adam_epsilon=1e-6, experts="ep" in parallel)
    others = [
        job("wide", rows[1], r=20, lora_dropout=0.3, seed=6),
        job("narrow", rows[2], r=2, target_modules=["v_proj"], global_batch_size=5, seed=5),
        job("same-seed", rows[3], lora_dropout=0.1, use_rslora=True),
    ]
    alone = runs.write_config(tmp_path / "alone.yaml", scene[model], tmp_path / "alone", [mine], {}, 256)
    among = runs.write_config(tmp_path / "among.yaml", scene[model], tmp_path / "among", [*others, mine], parallel, microbatch_tokens)
    assert runs.start(pool, alone, {}) == runs.start(pool, among, parallel) == 0
    for a, b in zip(runs.losses_of(tmp_path / "alone", "mine"), runs.losses_of(tmp_path / "among", "mine"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for kind in ("lora_A", "lora_B"):
        assert oracle.distance(adapter_of(tmp_path / "among", "mine"), adapter_of(tmp_path / "alone", "mine"), kind) < 1e-4


def test_dropout_changes_the_run(scene, pool, tmp_path):
    """The test above could not fail if dropout did nothing."""
    jobs = [job("with", scene["rows"][0], lora_dropout=0.1), job("without", scene["rows"][0])]
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], tmp_path / "run", jobs, {}, 256)
    assert runs.start(pool, config, {}) == 0
    assert runs.losses_of(tmp_path / "run", "with")[1:] != pytest.approx(runs.losses_of(tmp_path / "run", "without")[1:], rel=1e-5)


@pytest.mark.parametrize(("model", "parallel"), [("model", {}), ("model", {"pp": 2}), ("moe", {"pp": 2}), ("moe", {"tp": 2, "ep": 2})])
def test_neighbours_with_other_rows_and_nan_change_no_bit(model, parallel, scene, pool, tmp_path):
    job = job_on(model)
    mine = [job("first", scene["rows"][0], lora_dropout=0.1), job("last", scene["rows"][1], r=4)]
    modules = MODULES if model == "model" else MODULES[:4]
    broken = oracle.make_adapter(scene[model], tmp_path / "broken", r=8, lora_alpha=16, target_modules=modules, seed=0)
    tensors = load_file(broken / "adapter_model.safetensors")
    # finite, as an init_adapter has to be; NaN at its first forward
    save_file({key: torch.full_like(value, 1e30) for key, value in tensors.items()}, broken / "adapter_model.safetensors")
    swapped = oracle.swap_words(scene["rows"][2], tmp_path / "swapped.jsonl")
    neighbours = {
        "as-is": (job("other", scene["rows"][2]), 0),
        "other-rows": (job("other", swapped), 0),
        "nan": (job("other", swapped, init_adapter=str(broken)), 3),
    }
    adapters = {}
    for name, (neighbour, status) in neighbours.items():
        jobs = [mine[0], neighbour, mine[1]]
        config = runs.write_config(tmp_path / f"{name}.yaml", scene[model], tmp_path / name, jobs, parallel, 96)
        assert runs.start(pool, config, parallel) == status
        adapters[name] = {j["name"]: adapter_of(tmp_path / name, j["name"]) for j in mine}
    shared = json.loads((tmp_path / "nan" / "plan" / "window-0000.json").read_text())["microbatches"]
    assert any({0, 1} <= {entry[0] for entry in microbatch} for microbatch in shared), "no microbatch was shared"
    for name in ("other-rows", "nan"):
        for job_name, tensors in adapters["as-is"].items():
            assert all(torch.equal(tensors[key], adapters[name][job_name][key]) for key in tensors), (name, job_name)
    status = json.loads((tmp_path / "nan" / "status.json").read_text())["jobs"]
    assert status["other"]["state"] == "failed" and "not finite" in status["other"]["reason"]
    assert status["first"]["state"] == status["last"]["state"] == "done"
    assert [(tmp_path / "nan/jobs" / name / "adapter_model.safetensors").exists() for name in ("other", "first")] == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "nan/jobs/other/metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] and row["loss"] is None and row["grad_norm"] is None for row in rows)


def test_an_exported_adapter_continues_here_and_in_peft(scene, pool, tmp_path):
    rows = oracle.make_rows(tmp_path / "rows.jsonl", num_rows=4 * 3, seed=3)  # an epoch is 4 steps: step 5 sees step 1's rows
    settings = {"shuffle": False, "lr_scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0}
    saved, longer = job("mine", rows, **settings, max_steps=4), job("mine", rows, **settings, max_steps=5)
    onward = job("mine", rows, **settings, max_steps=6, init_adapter=str(tmp_path / "saved/jobs/mine"))
    for name, each in (("saved", saved), ("longer", longer), ("onward", onward)):
        config = runs.write_config(tmp_path / f"{name}.yaml", scene["model"], tmp_path / name, [each], {}, 128)
        assert runs.start(pool, config, {}) == 0
    losses = runs.losses_of(tmp_path / "onward", "mine")
    assert losses[0] == pytest.approx(runs.losses_of(tmp_path / "longer", "mine")[4], rel=1e-6)
    theirs, adapter = oracle.train_alone(scene["model"], tmp_path / "saved/jobs/mine", rows, onward)
    assert losses == pytest.approx(theirs, rel=1e-5)
    for kind in ("lora_A", "lora_B"):
        assert oracle.distance(adapter_of(tmp_path / "onward", "mine"), adapter, kind) < 1e-4


def test_peft_computes_the_trainers_own_logits(scene, one_process, pool, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from megatron_lora.config.schema import ParallelConfig
    from megatron_lora.data.collate import collate
    from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
    from megatron_lora.data.steps import job_steps
    from megatron_lora.huggingface.adapter_files import read_adapter
    from megatron_lora.huggingface.architecture import read_architecture
    from megatron_lora.model.adapter_arena import Arena
    from megatron_lora.model.arena_region import AdapterSpec
    from megatron_lora.model.stage import build_stage
    from scheduling.types import Microbatch, Segment

    mine = job("mine", scene["rows"][0], r=5, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    config = runs.write_config(tmp_path / "config.yaml", scene["model"], tmp_path / "run", [mine], {}, 128)
    assert runs.start(pool, config, {}) == 0
    directory = tmp_path / "run/jobs/mine"
    tokens = torch.arange(3, 25, dtype=torch.int32)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(scene["model"]), directory)(input_ids=tokens[None]).logits[0]
    base = AutoModelForCausalLM.from_pretrained(scene["model"])(input_ids=tokens[None]).logits[0]

    cpu = torch.device("cpu")
    stage = build_stage(read_architecture(scene["model"]), scene["model"], ParallelConfig(), dtype=torch.float32, device=cpu)
    spec = AdapterSpec(r=5, scale=12 / 5**0.5, dropout=0.0, target_modules=frozenset(mine["target_modules"]))
    arena = Arena(stage.linears, [spec], tensor_rank=0, tensor_ranks=1, dtype=torch.float32, device=cpu)
    arena.load(0, read_adapter(directory).weights)
    sample = Sample(record=0, tokens=tokens.numpy(), targets=(tokens > 3).numpy())
    resident = SimpleNamespace(
        step_samples=JobSamples(seed=0, samples=Samples.of([sample]), steps=job_steps(1, 1, 1, None, False, 0)), adapter_row=0
    )
    data = collate(Microbatch((Segment(0, 0, (0,), len(tokens)),)), {0: resident}, multiple=1, device=cpu)
    ours = full_logits(stage(data), stage.head)
    assert float((theirs - base).abs().max()) > 1e-2, "the adapter changes nothing"
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
