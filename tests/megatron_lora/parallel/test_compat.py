"""Every Megatron name in use exists, the CPU patches come and go, and the rank pool tells ranks, layouts and failures apart."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

import megatron_lora
from megatron_lora.errors import UserError
from megatron_lora.parallel import compat, process_groups

PACKAGE = Path(megatron_lora.__file__).parent


def megatron_imports():
    """Yield (file, module, name) for each `from megatron... import name` of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                yield from ((path.name, node.module, alias.name) for alias in node.names)
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name, None) for alias in node.names if alias.name.startswith("megatron."))


def test_every_megatron_name_exists():
    names = list(megatron_imports())
    assert len(names) > 3
    for path, module, name in names:
        loaded = importlib.import_module(module)
        assert name is None or hasattr(loaded, name), f"{path}: {module} has no {name}"


def test_ranks_start_without_torchs_compiler():
    """It takes a third of a rank's imports, and nothing here is compiled by it; the launcher's checks import no Megatron at all."""
    source = "import sys, torch; before = torch.compile; import megatron_lora.commands.checks; print('megatron.core' in sys.modules); "
    source += "import megatron_lora.training.train as train; print(torch.compile is before, 'torch._dynamo' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", source], cwd=PACKAGE.parent, text=True, capture_output=True, check=True)
    assert ended.stdout == "False\nTrue False\n"


@pytest.mark.parametrize("patch, owner, name", [
    (compat.patch_current_device, torch.cuda, "current_device"),
    (compat.patch_rng_fork, CudaRNGStatesTracker, "fork"),
])  # fmt: skip
def test_patch_is_idempotent_and_undone(patch, owner, name):
    before = getattr(owner, name)
    original = getattr(before, "_megatron_lora_original", before)
    patch()
    first = getattr(owner, name)
    undo = patch()
    assert getattr(owner, name) is first and first is not original
    undo()
    assert getattr(owner, name) is original
    patch()


def test_patch_of_a_missing_symbol_fails():
    with pytest.raises(AttributeError):
        compat._replace(torch.cuda, "no_such_symbol", lambda: None)


def ranks():
    return (
        dist.get_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ArithmeticError(f"rank {rank} was told to")
    dist.barrier()


def test_pool_layouts_and_order(pool):
    assert pool(pp=2, tp=2).run(ranks) == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 1, 0), (3, 1, 1, 0)]
    assert pool(tp=2).run(ranks) == [(0, 0, 0, 0), (1, 1, 0, 0)]
    assert pool(pp=2, dp=2).run(ranks) == [(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 1, 0), (3, 0, 1, 1)]


def test_pool_shows_a_ranks_traceback_and_recovers(pool):
    with pytest.raises(AssertionError, match="rank 1 was told to"):
        pool(tp=2).run(fail_on, 1)
    assert pool(tp=2).run(ranks) == [(0, 0, 0, 0), (1, 1, 0, 0)]


def test_wrong_number_of_ranks_is_refused(one_process, pool):
    with pytest.raises(ValueError, match="needs 2 ranks, 1 were started"):
        process_groups.initialize_parallel(pool(pp=2).parallel, "gloo")


def test_building_a_model_does_not_change_the_attention_variables(monkeypatch):
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    monkeypatch.delenv("NVTE_FLASH_ATTN", raising=False)
    with compat.attention_variables_kept():
        assert "NVTE_UNFUSED_ATTN" not in os.environ
        os.environ["NVTE_UNFUSED_ATTN"] = os.environ["NVTE_FLASH_ATTN"] = "1"
    assert os.environ["NVTE_UNFUSED_ATTN"] == "0" and "NVTE_FLASH_ATTN" not in os.environ


def test_the_timeout_is_a_number_of_seconds(monkeypatch):
    monkeypatch.delenv("MEGATRON_LORA_TIMEOUT_S", raising=False)
    assert process_groups.rank_timeout().total_seconds() == 1800
    monkeypatch.setenv("MEGATRON_LORA_TIMEOUT_S", "90")
    assert process_groups.rank_timeout().total_seconds() == 90
    for wrong in ("soon", "0", "-5", "1.5", ""):
        monkeypatch.setenv("MEGATRON_LORA_TIMEOUT_S", wrong)
        with pytest.raises(UserError, match=f"MEGATRON_LORA_TIMEOUT_S: '{wrong}' is no number of seconds"):
            process_groups.rank_timeout()
