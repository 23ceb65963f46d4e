"""`deterministic: true`: the same bits for runs that execute the same plan, a stop and its resume being part of it, on any layout."""

from __future__ import annotations

import json
import os

import oracle
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.training.determinism import CUBLAS, SETTINGS, determinism

STEPS = 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> dict:
    """A model, and three jobs with dropout whose samples share microbatches."""
    root = tmp_path_factory.mktemp("determinism")
    jobs = []
    for number, r in enumerate((4, 8, 20)):
        rows = oracle.make_rows(root / f"rows-{number}.jsonl", num_rows=12, seed=30 + number)
        data = {"datasets": [{"path": str(rows), "type": "prompt_completion"}], "global_batch_size": 3, "max_steps": STEPS}
        jobs.append({"name": f"job-{number}", "r": r, "lora_dropout": 0.1, "learning_rate": 1e-3, "seed": number} | data)
    return {"root": root, "model": oracle.make_model(root / "model"), "jobs": jobs}


def config_of(scene: dict, folder, parallel: dict, **keys):
    """Write a deterministic config whose output directory is `folder`/run."""
    path = runs.write_config(folder / "config.yaml", scene["model"], folder / "run", scene["jobs"], parallel, 64)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"deterministic": True} | keys))
    return path


def adapters(run) -> dict[str, torch.Tensor]:
    files = {f"job-{number}": run / "jobs" / f"job-{number}" / "adapter_model.safetensors" for number in range(3)}
    return {f"{name} {key}": tensor for name, file in files.items() for key, tensor in load_file(file).items()}


def losses(run) -> list[list[float]]:
    return [runs.losses_of(run, f"job-{number}") for number in range(3)]


def assert_same_bits(ours, theirs) -> None:
    assert losses(ours) == losses(theirs)
    mine, expected = adapters(ours), adapters(theirs)
    assert mine.keys() == expected.keys() and all(torch.equal(mine[key], expected[key]) for key in expected)


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"dp": 2}])
def test_two_runs_have_the_same_bits_wherever_inputs_wait(parallel, scene, pool, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "lean")]
    for folder, keys in zip(folders, ({}, {}, {"activation_offloading": True}), strict=True):
        folder.mkdir()
        assert runs.start(pool, config_of(scene, folder, parallel, recompute="full", **keys), parallel) == 0
    first, *others = (folder / "run" for folder in folders)
    for other in others:
        assert_same_bits(other, first)
    assert all(len(each) == STEPS for each in losses(first)) and any(tensor.any() for tensor in adapters(first).values())


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}])
def test_stops_are_part_of_the_plan(parallel, scene, pool, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        config = config_of(scene, folder, parallel)
        assert runs.start(pool, config, parallel, stop_after=2) == 75
        assert runs.start(pool, config, parallel) == 0
    assert_same_bits(folders[0] / "run", folders[1] / "run")
    plans = [(folder / "run" / "plan" / "start-1" / "window-0000.json").read_text() for folder in folders]
    assert plans[0] == plans[1]


def test_a_stop_changes_no_bit_where_every_sample_fills_a_microbatch(scene, pool, tmp_path):
    """Then what is planned anew has the same microbatches, and a run that was stopped equals one that never was."""
    tokens = 64
    file = tmp_path / "lengths.jsonl"
    file.write_text("".join(json.dumps({"tokens": tokens, "targets": 20}) + "\n" for _ in range(8)))
    data = {"datasets": [{"path": str(file), "type": "lengths"}], "global_batch_size": 2, "sequence_len": tokens}
    full = scene | {"jobs": [job | data for job in scene["jobs"]]}
    folders = [tmp_path / name for name in ("stopped", "unstopped")]
    for folder in folders:
        folder.mkdir()
        config = config_of(full, folder, {})
        if folder.name == "stopped":
            assert runs.start(pool, config, {}, stop_after=3) == 75
            assert 0 < sum(map(len, losses(folder / "run"))) < 3 * STEPS
        assert runs.start(pool, config, {}) == 0
    assert_same_bits(folders[0] / "run", folders[1] / "run")


def test_a_failed_jobs_microbatches_stay_in_the_plan(scene, pool, tmp_path):
    """When a failure is noticed depends on time; the windows after it must not."""
    broken = oracle.make_adapter(scene["model"], tmp_path / "broken", r=8, lora_alpha=32, target_modules=["v_proj"], seed=0)
    file = broken / "adapter_model.safetensors"
    # finite, as an init_adapter has to be; NaN at its first forward
    save_file({key: torch.full_like(value, 1e30) for key, value in load_file(file).items()}, file)
    failing = {"init_adapter": str(broken), "target_modules": ["v_proj"], "max_steps": 40}
    jobs = [scene["jobs"][0] | {"max_steps": 40}, scene["jobs"][1] | failing, scene["jobs"][2] | {"max_steps": 40}]
    config = config_of(scene | {"jobs": jobs}, tmp_path, {})
    assert runs.start(pool, config, {}) == 3
    windows = sorted((tmp_path / "run" / "plan").glob("window-*.json"))
    steps = {entry[1] for window in windows for slot in json.loads(window.read_text())["microbatches"] for entry in slot if entry[0] == 1}
    assert steps == set(range(40))


def test_what_it_sets_ends_with_it(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled() and CUBLAS not in os.environ
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ[CUBLAS] == ":4096:8" and os.environ["NCCL_NVLS_ENABLE"] == "1"  # the user's stays
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    assert CUBLAS not in os.environ
    monkeypatch.setenv(CUBLAS, ":16:4")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG: ':16:4' does not fix"), determinism(True):
        pass
