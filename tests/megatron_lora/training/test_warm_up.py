"""Warming up changes no bit: not of the adapters' states, not of the generators, not of the training that follows, on any layout."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny import random_factor, save_model, stage_input, train_step

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import FREE_ROW, AdapterSpec
from megatron_lora.model.stage import build_stage
from megatron_lora.training import warm_up

LENGTHS, SEGMENTS = (5, 22, 1, 16), ((2, 9, 1), (9, 40, 0))
LAYOUTS = [{}, {"pp": 2}, {"tp": 2}, {"tp": 2, "sequence": True}, {"pp": 2, "tp": 2, "sequence": True}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    save_model(path, "qwen3")
    return path


def states_of(arena: Arena) -> list[torch.Tensor]:
    return [each.clone() for each in (arena.master, arena.grad, arena.exp_avg, arena.exp_avg_sq, arena.compute)]


def train(directory, parallel, warm: bool) -> dict:
    """Train one microbatch with dropout, after warming up or not; runs on any rank."""
    architecture, kind = read_architecture(directory), {"dtype": torch.float32, "device": torch.device("cpu")}
    stage = build_stage(architecture, directory, parallel, **kind, recompute=("full", "cheap", "none"))
    specs = [AdapterSpec(r=r, scale=2.0, dropout=p, target_modules=frozenset(TARGET_MODULES)) for r, p in ((8, 0.25), (20, 0.0))]
    ranks = {"tensor_rank": stage.tensor_group.rank(), "tensor_ranks": parallel.tensor}
    arena = Arena(stage.linears, specs, **ranks, **kind)
    for row, factors in enumerate(arena.factors):
        for factor in factors:
            arena.view(factor, arena.master).copy_(random_factor(factor.path, factor.kind, row, factor.r, factor.width))
    arena.exp_avg.fill_(0.5)
    before, generator = states_of(arena), torch.get_rng_state()
    parameters = [parameter.clone() for parameter in stage.parameters()]
    if warm:
        warm_up.warm_up(stage, arena, 45, parallel.tensor if parallel.sequence else 1)
    assert all(map(torch.equal, states_of(arena), before)) and torch.equal(torch.get_rng_state(), generator)
    assert all(map(torch.equal, stage.parameters(), parameters))
    return train_step(stage, stage_input(LENGTHS, architecture.vocab_size, SEGMENTS), parallel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_changes(layout, directory, pool):
    parallel = ParallelConfig(pipeline=layout.get("pp", 1), tensor=layout.get("tp", 1), sequence=layout.get("sequence", False))
    warm, cold = (pool(**layout).run(train, directory, parallel, each) for each in (True, False))
    for mine, theirs in zip(warm, cold, strict=True):
        assert mine["gradients"].keys() == theirs["gradients"].keys() != set()
        for name, gradient in theirs["gradients"].items():
            assert gradient.any() and torch.equal(mine["gradients"][name], gradient), name
        assert torch.equal(mine["losses"], theirs["losses"]) if "losses" in theirs else "losses" not in mine


def test_every_size_class_and_every_job(monkeypatch):
    monkeypatch.setattr(warm_up, "SMALLEST_ROWS", 100)
    assert warm_up._sizes(700) == [700, 350, 175, 88] and warm_up._sizes(100) == [100] and warm_up._sizes(5) == [5]
    data = warm_up.dummy(2500, 3, torch.device("cpu"))
    assert data.packing.lengths == (1024, 1024, 452) and data.packing.cu_seqlens.tolist() == [0, 1024, 2048, 2500]
    assert data.route.segments == ((0, 833, 0), (833, 1666, 1), (1666, 2500, 2))
    assert {len(each) for each in (data.tokens, data.labels, data.weights, data.packing.positions)} == {2500}
    assert warm_up.dummy(2, 5, torch.device("cpu")).route.num_rows == 2


def adapter(r: int, dropout: float = 0.0, *targets: str) -> AdapterSpec:
    return AdapterSpec(r=r, scale=2.0, dropout=dropout, target_modules=frozenset(targets or ("q_proj",)))


def test_a_round_for_each_kind_of_kernels_that_may_come(monkeypatch):
    """Rank classes and targets, each with dropout too where any job has it; none for what the residents need anyway, or what never fits."""
    assert warm_up.variants([adapter(8), adapter(16), adapter(3)]) == [adapter(8)]
    assert warm_up.variants([adapter(8), adapter(33, 0.1), adapter(64, 0.2)]) == [adapter(8), adapter(8, 0.2), adapter(33, 0.1)]
    assert warm_up.variants([adapter(8), adapter(8, 0.0, "k_proj")]) == [adapter(8), adapter(8, 0.0, "k_proj")]
    tried, shown = [], []
    monkeypatch.setattr(warm_up, "_try", lambda stage, rows, multiple, num_jobs: tried.append((rows, num_jobs)))
    monkeypatch.setattr(warm_up, "adamw_", lambda *_: None)
    stage, empty = SimpleNamespace(device=torch.device("cpu"), reserve_host_memory=lambda rows: None), torch.zeros(1)
    buffers = dict.fromkeys(("master", "grad", "exp_avg", "exp_avg_sq", "compute"), empty)

    def showing(specs):
        shown.append(specs)
        return contextlib.nullcontext()

    for resident, others, rounds in (
        ([adapter(8)] * 3, [adapter(16)] * 5, [[adapter(8)] * 3]),
        ([adapter(8)] * 3, [adapter(32), adapter(64)], [[adapter(8)] * 3, [adapter(32)]]),
        ([], [adapter(8, 0.1), adapter(8, 0.0, "v_proj")], [[adapter(8, 0.1)]]),
        ([adapter(8), adapter(20)], [], [[adapter(8), adapter(20)], [adapter(8)], [adapter(20)]]),
    ):
        shown.clear()
        warm_up.warm_up(
            stage, SimpleNamespace(specs=[*resident, FREE_ROW], room={"q_proj": 48}, showing=showing, **buffers), 2000, 1, others
        )
        assert shown == rounds
    assert tried[:2] == [(2000, 3), (1000, 3)] and tried[-1] == (1000, 1)


def test_a_microbatch_that_does_not_fit_is_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(warm_up, "_pass", full)
    stage = SimpleNamespace(device=torch.device("cpu"), reserve_host_memory=lambda rows: None)
    arena = SimpleNamespace(specs=[adapter(8)], room={"q_proj": 16}, showing=contextlib.nullcontext)
    with pytest.raises(UserError, match=r"^microbatch_tokens: 700 tokens do not fit \(CUDA out of memory\); use fewer"):
        warm_up.warm_up(stage, arena, 700)
