"""What is installed works: a wheel outside the checkout, and a machine without Triton.

Both run the command line in processes of their own, in a directory that knows nothing of the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import oracle
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("megatron_lora", "fused_ops", "scheduling", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NO_TRITON = """
import sys
sys.modules["triton"] = None  # every import of it raises ImportError
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with config.yaml: one job of two steps on a tiny model."""
    oracle.make_model(tmp_path / "model")
    oracle.make_rows(tmp_path / "rows.jsonl", num_rows=4, seed=0, longest=20)
    job = {"name": "one", "datasets": [{"path": "rows.jsonl", "type": "prompt_completion"}], "global_batch_size": 2}
    config = {"base_model": "model", "output_dir": "out", "microbatch_tokens": 64, "jobs": [job]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(folder: Path, *command: str | Path, path: str = "") -> str:
    """Run a command there, with `path` alone as PYTHONPATH; returns its output, and fails with it unless the command ends 0."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_LORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if path:
        environ["PYTHONPATH"] = path
    done = subprocess.run(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_trained(folder: Path) -> None:
    """Check that the run of `folder` took its two steps and wrote its adapter."""
    steps = [json.loads(line)["step"] for line in (folder / "out/jobs/one/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2] and (folder / "out/jobs/one/adapter_model.safetensors").exists()


def test_a_built_wheel_plans_and_trains_outside_the_checkout(folder):
    source, wheels, env = folder / "source", folder / "wheels", folder / "env"
    source.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip")
    run(folder, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source)
    shutil.rmtree(source)
    (wheel,) = wheels.glob("*.whl")
    venv.create(env, with_pip=False)
    python = env / "bin/python"
    run(folder, *pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # of the packages that it needs, not of the checkout
    where = run(folder, python, "-c", "import fused_ops, megatron_lora.commands as m, scheduling as s; print(fused_ops, m, s)")
    assert where.count(str(site)) == 3, where
    assert "one" in run(folder, env / "bin/megatron-lora", "plan", "config.yaml")
    run(folder, env / "bin/megatron-lora", "train", "config.yaml")
    check_trained(folder)


def test_every_command_works_without_triton(folder):
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(NO_TRITON)
    path = os.pathsep.join([str(folder / "hook"), str(ROOT)])
    command = (sys.executable, "-m", "megatron_lora")
    assert "triton" in run(folder, *command, "doctor", path=path)
    assert "one" in run(folder, *command, "plan", "config.yaml", path=path)
    assert run(folder, *command, "preview", "config.yaml", "--job", "one", path=path)
    run(folder, *command, "train", "config.yaml", path=path)
    check_trained(folder)
    blocked = run(folder, sys.executable, "-c", "from fused_ops.launch.optional_triton import tl; print(type(tl).__name__)", path=path)
    assert blocked == "_Absent\n"
