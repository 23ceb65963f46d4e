"""The serving check: copies that it spoils have those faults; and, where VLLM_VENV names an environment with vLLM, all of it.

VLLM_VENV=.venv-vllm bash scripts/test.sh tests/scripts/test_serve_check.py        # makes the environment if it is not there
"""

import json
import os
import subprocess
import sys

import oracle
import pytest
import torch

from megatron_lora.huggingface.adapter_effect import faults_of_files, linear_sizes, load_base
from megatron_lora.huggingface.adapter_files import AdapterFile, raw_config, read_adapter, write_adapter
from scripts.serve_check import SPOILT, spoil


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(oracle.make_model(tmp_path_factory.mktemp("base"), num_layers=1))


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_copy_has_the_fault_that_it_is_called_by(base, tmp_path, kind):
    modules = ("q_proj", "v_proj")
    linears = {path: sizes for path, sizes in linear_sizes(base).items() if path.endswith(modules)}
    weights = {path: (torch.ones(2, k), torch.ones(n, 2)) for path, (k, n) in linears.items()}
    write_adapter(tmp_path, AdapterFile(r=2, lora_alpha=8, use_rslora=False, target_modules=modules, weights=weights), "base")
    spoil(tmp_path, kind)
    faults = [found for found, _ in faults_of_files(tmp_path, raw_config(tmp_path), linear_sizes(base))]
    if kind in ("wrong prefix", "missing module"):
        assert faults == [kind]
        return
    adapter = read_adapter(tmp_path)
    zero = all(not b_NR.any() for _, b_NR in adapter.weights.values())
    assert (faults, adapter.lora_alpha, zero) == ([], 32 if kind == "wrong alpha" else 8, kind == "no effect")


@pytest.mark.skipif("VLLM_VENV" not in os.environ, reason="VLLM_VENV names no environment with vLLM, which takes 3 GB and minutes")
def test_vllm_serves_what_was_trained(tmp_path):
    command = [sys.executable, "-m", "scripts.serve_check", "--venv", os.environ["VLLM_VENV"], "--cases", "llama"]
    done = subprocess.run([*command, "--output", str(tmp_path / "lines.jsonl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and all(line["as_expected"] for line in lines)
