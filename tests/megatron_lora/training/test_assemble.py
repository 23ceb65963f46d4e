"""Which libraries a rank uses: another's attention is tried with the shapes of its run, and the first rank says what came of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.model.backends import Backends, Machine
from megatron_lora.training import assemble

ARCHITECTURE = SimpleNamespace(num_heads=32, num_kv_heads=8, head_dim=128, sliding_windows=(None, 512), attention_cap=None)


def chosen(monkeypatch, fault: str, machine: Machine, tensor: int = 1) -> tuple[Backends, list]:
    tried = []
    monkeypatch.setattr(assemble, "this_machine", lambda: machine)
    monkeypatch.setattr(assemble.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(assemble.cudnn_attention, "attention_fault", lambda *shape, num_rows: tried.append((*shape, num_rows)) or fault)
    config = SimpleNamespace(backend="auto", deterministic=False, parallel=ParallelConfig(tensor=tensor), microbatch_tokens=8192)
    return assemble.choose_backends(config, ARCHITECTURE, torch.bfloat16, torch.device("cpu")), tried


@pytest.mark.parametrize(
    ("fault", "attention", "line"),
    [
        ("", "cudnn", "attention: cuDNN's, tried on this GPU\n"),
        ("no plan", "torch", "torch's, since cuDNN's fails on this GPU (no plan)\n"),
    ],
)
def test_cudnns_attention_is_tried_with_this_ranks_heads(fault, attention, line, monkeypatch, capsys):
    backends, tried = chosen(monkeypatch, fault, Machine(capability=(9, 0), cudnn="1.32.0"), tensor=4)
    assert backends == Backends(attention=attention) and capsys.readouterr().out.endswith(line)
    assert tried == [(8, 2, 128, (None, 512), torch.bfloat16, torch.device("cpu"), 8192)]


@pytest.mark.parametrize("machine", [Machine(capability=None, cudnn="1.32.0"), Machine(capability=(9, 0))])
def test_torchs_is_not_tried(machine, monkeypatch, capsys):
    backends, tried = chosen(monkeypatch, "", machine)
    assert backends == Backends() and not tried and not capsys.readouterr().out
