"""What adapters of pissa and olora start from: the best approximation, with a sign of its own; and files that are not what was written."""

import json
import shutil

import oracle
import pytest
import torch

from megatron_lora.commands.checks import check_run
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.planning.targets import targeted
from megatron_lora.training.first_factors import FirstFactors, cut
from megatron_lora.training.job_reader import read_and_check

SHAPES = [(48, 32), (20, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_16", "olora"])
def test_a_start_is_what_peft_cuts_out(how, shape):
    """peft's own start is compared in test_adapter_kinds.py; here the products, of a weight whose spectrum falls."""
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    weight = u @ torch.diag(s * 0.7 ** torch.arange(len(s))) @ vh
    a, b = cut(weight, 5, how, 1.5, torch.Generator().manual_seed(1))
    assert a.shape == (5, shape[1]) and b.shape == (shape[0], 5)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
    q, upper = torch.linalg.qr(weight)
    expected = q[:, :5] @ upper[:5] if how == "olora" else best / 1.5
    torch.testing.assert_close(b @ a, expected, atol=1e-4, rtol=1e-4)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all(), "the sign is not fixed"
    flipped = cut(-weight, 5, how, 1.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(flipped[0], a, atol=1e-4, rtol=1e-3)
    if how != "olora":
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-5, rtol=1e-4)


def test_they_are_cut_once_and_damage_is_named(tmp_path):
    model = oracle.make_model(tmp_path / "model")
    job = {"name": "one", "datasets": [{"path": str(tmp_path / "d.jsonl"), "type": "text"}], "r": 3, "target_modules": ["v_proj"]}
    job |= {"init_lora_weights": "olora", "layers_to_transform": [1, 3], "rank_pattern": {"layers.3.*": 2}}
    config = {"base_model": str(model), "output_dir": str(tmp_path / "run"), "microbatch_tokens": 64, "jobs": [job]}
    (tmp_path / "d.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "other.yaml").write_text(json.dumps(config | {"output_dir": str(tmp_path / "other")}))
    config = targeted(load_config(tmp_path / "config.yaml"), read_architecture(model))
    factors = FirstFactors(config.output_dir, config.base_model, read_architecture(model), model)
    factors.write(config.jobs[0])
    found, file = factors.read("one"), tmp_path / "run/jobs/one/start/adapter_model.safetensors"
    assert {path: len(a) for path, (a, _) in found.items()} == {f"model.layers.{n}.self_attn.v_proj": 2 * r for n, r in ((1, 3), (3, 2))}
    assert all((b @ a).abs().max() < 1e-6 < a.abs().max() for a, b in found.values()), "the two halves do not cancel"
    written = file.stat().st_mtime_ns
    factors.write(config.jobs[0])
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"start/adapter_model.safetensors: is damaged \(its SHA-256 differs"):
        factors.read("one")
    inputs = check_run(load_config(tmp_path / "other.yaml"))
    with RunDirectory.create(load_config(tmp_path / "other.yaml"), failed=inputs.failed, rests_on=inputs.rests_on):
        shutil.copytree(file.parent, tmp_path / "other/jobs/one/start", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"other/jobs/one/start/adapter_model.safetensors: is damaged .* remove the directory"):
        check_run(load_config(tmp_path / "other.yaml"))  # before its ranks start
    (file.parent / "state.json").unlink()
    with pytest.raises(UserError, match=r"start: cannot be read"):
        factors.read("one")


def test_those_of_a_queued_job_are_there_once_it_is_read(tmp_path):
    model, rows = oracle.make_model(tmp_path / "model"), oracle.make_rows(tmp_path / "rows.jsonl", num_rows=4, seed=0)
    job = {"name": "one", "datasets": [{"path": str(rows), "type": "prompt_completion"}], "r": 2, "target_modules": ["v_proj"]}
    config = {"base_model": str(model), "output_dir": str(tmp_path / "run"), "jobs": [job | {"init_lora_weights": "pissa_niter_2"}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    architecture = read_architecture(model)
    config = targeted(load_config(tmp_path / "config.yaml"), architecture)
    places = {"output_dir": config.output_dir, "base_model": str(model), "model_dir": model, "cache_dir": None}
    assert read_and_check(config.jobs[0], architecture=architecture, budget=256, **places) is None
    assert FirstFactors(config.output_dir, str(model), architecture, model).read("one")
