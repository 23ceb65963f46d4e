"""A folder with a config and a stand-in for train.py, in which the command line is called."""

import os
from pathlib import Path

import oracle
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = """
import os, sys, time, types

def run(config, stop, live, on_begin):
    from megatron_lora.errors import UserError
    from megatron_lora.output.run_directory import RunDirectory
    mode, rank = os.environ["STAND_IN"], int(os.environ["RANK"])
    open(f"rank{rank}.pid", "w").write(str(os.getpid()))
    if mode == "wait":
        stop.can_save = True
        open(f"rank{rank}.ready", "w").close()
        while not stop.requested:
            time.sleep(0.02)
        return 75
    if mode == "done" and rank == 0:
        with RunDirectory.join(config) as directory:
            directory.set_job("a", "done")
            directory.set_job("b", "failed", "not finite")
    if mode in ("mistake", "crash") and rank == 1:
        time.sleep(0.3)  # the other is waiting by now
        raise UserError("base_model: shard 2 is damaged; fetch it again") if mode == "mistake" else RuntimeError("matrix is torn")
    if mode in ("mistake", "crash"):
        time.sleep(60)
    return 3 if mode == "done" else 0

sys.modules["megatron_lora.training.train"] = types.SimpleNamespace(run=run)
"""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("materials")
    oracle.make_model(root / "model")
    for seed, name in enumerate(("a", "b")):
        oracle.make_rows(root / f"{name}.jsonl", num_rows=12, seed=seed, longest=20)
    return root


@pytest.fixture
def scene(materials, tmp_path, monkeypatch) -> Path:
    """A folder with config.yaml for two jobs on two stages, and the stand-in in the way of train.py."""
    datasets = {name: [{"path": str(materials / f"{name}.jsonl"), "type": "prompt_completion"}] for name in ("a", "b")}
    config = {
        "base_model": str(materials / "model"),
        "output_dir": "out",
        "microbatch_tokens": 64,
        "parallel": {"pipeline": 2},
        "jobs": [{"name": name, "datasets": datasets[name], "global_batch_size": 4} for name in ("a", "b")],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stand_in"), str(ROOT)]))
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path
