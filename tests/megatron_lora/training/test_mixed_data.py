"""Promise 1 for mixed data: a job whose datasets have sampling weights trains alone as it does among others; weights are kept on resume."""

import oracle
import pytest
import runs

from megatron_lora.commands.checks import check_run
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError


def mixed(root, weights=(2.0, 0.4), **keys) -> dict:
    """Write two files and return a job that mixes them."""
    files = [oracle.make_rows(root / f"rows-{i}.jsonl", num_rows=9, seed=i) for i in range(2)]
    datasets = [
        {"path": str(file), "type": "prompt_completion", "sampling_weight": weight} for file, weight in zip(files, weights, strict=True)
    ]
    shared = {"r": 4, "learning_rate": 1e-3, "lora_dropout": 0.1, "global_batch_size": 4, "num_epochs": 2}
    return {"name": "mixed", "datasets": datasets} | shared | keys


def test_a_mixture_trains_alone_as_among_others(tmp_path, pool):
    model = oracle.make_model(tmp_path / "model")
    job = mixed(tmp_path)
    plain = {"name": "plain", "datasets": [{"path": job["datasets"][0]["path"], "type": "prompt_completion"}], "r": 8}
    losses = []
    for name, jobs in (("alone", [job]), ("among", [plain, job])):
        assert runs.start(pool, runs.write_config(tmp_path / f"{name}.yaml", model, tmp_path / name, jobs, {}, 96), {}) == 0
        losses.append(runs.losses_of(tmp_path / name, "mixed"))
    assert len(losses[0]) == 2 * 6, "22 samples an epoch, 4 a step"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_is_not_resumed_with_other_weights(tmp_path, pool):
    model = oracle.make_model(tmp_path / "model")

    def config(*weights):
        jobs = [mixed(tmp_path, weights, max_steps=20, save_steps=1)]
        return runs.write_config(tmp_path / "run.yaml", model, tmp_path / "run", jobs, {}, 48)

    assert runs.start(pool, config(2.0, 0.4), {}, stop_after=8) == 75
    check_run(load_config(config(2.0, 0.4)))
    for weights in ((1.0, 1.0), (2.0, 0.5), (0.4, 2.0)):
        with pytest.raises(UserError, match="jobs.mixed.datasets: have other records"):
            check_run(load_config(config(*weights)))
