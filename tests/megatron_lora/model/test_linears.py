"""The table of collectives: each linear on two tensor ranks, with and without sequence parallelism and dropout, equals one rank."""

from __future__ import annotations

import pytest
import torch
from tiny import attach_adapters, joined_gradients, save_model, stage_input

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.stage import build_stage
from megatron_lora.parallel.collectives import gather_rows

NUM_ROWS = 12
SEGMENTS = ((1, 5, 1), (5, 11, 0))  # rows 0 and 11 are base-only
ROLES = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_model(directory, "llama")
    return directory


def linear_step(directory, parallel, role, dropout):
    """Run one linear of the first layer forward and backward; return Y, dX and factor gradients of all ranks joined, Y by module."""
    architecture = read_architecture(directory)
    stage = build_stage(architecture, directory, parallel, dtype=torch.float32, device=torch.device("cpu"))
    linear = stage.linears[ROLES.index(role)]
    attach_adapters([linear], parallel.tensor, dropout)
    geometry, group = linear.geometry, linear.tp_group
    column, ranks, rank = geometry.parallel == "column", group.size(), group.rank()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, geometry.in_features * (1 if column else ranks), generator=generator)
    dy = torch.randn(NUM_ROWS, sum(geometry.out_features) * (ranks if column else 1), generator=generator)
    rows = slice(rank * NUM_ROWS // ranks, (rank + 1) * NUM_ROWS // ranks) if stage.sequence_parallel else slice(None)
    x = (x[rows] if column else x[:, geometry.first_feature :][:, : geometry.in_features]).clone().requires_grad_()
    y, bias = linear(x.unsqueeze(1), stage_input((NUM_ROWS,), 61, SEGMENTS).route)
    assert bias is None
    y = y.squeeze(1)
    y.backward(_local_columns(dy, geometry, rank, ranks) if column else dy[rows])

    dx = x.grad if column else torch.cat(list(_all_ranks(x.grad, group)), dim=1)
    if stage.sequence_parallel:
        dx, y = (gather_rows(dx, group), y) if column else (dx, gather_rows(y.detach(), group))
    parts = list(zip(*(part.split(geometry.out_features, dim=1) for part in _all_ranks(y, group)), strict=True)) if column else [[y]]
    whole_y = torch.cat([torch.cat(list(part), dim=1) for part in parts], dim=1)
    return {"y": whole_y.detach(), "dx": dx, **joined_gradients([linear])}


def _local_columns(dy, geometry, rank, ranks):
    """Return this rank's columns of each module, from a dY with the modules' full columns side by side."""
    modules = dy.split([n * ranks for n in geometry.out_features], dim=1)
    return torch.cat([part[:, rank * n :][:, :n] for part, n in zip(modules, geometry.out_features, strict=True)], dim=1)


def _all_ranks(x, group):
    return gather_rows(x.detach(), group).chunk(group.size())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("role", ROLES)
def test_two_tensor_ranks_equal_one(role, sequence, dropout, model_dir, one_process, pool):
    expected = linear_step(model_dir, ParallelConfig(), role, dropout)
    for found in pool(tp=2, sequence=sequence).run(linear_step, model_dir, ParallelConfig(tensor=2, sequence=sequence), role, dropout):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.abs().max() > 0
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_changes_the_output(model_dir, one_process):
    with_dropout, without = (linear_step(model_dir, ParallelConfig(), "qkv", p)["y"] for p in (0.3, 0.0))
    assert torch.equal(with_dropout[0], without[0]) and torch.equal(with_dropout[11], without[11]), "base-only rows"
    assert not torch.allclose(with_dropout[1:11], without[1:11])


def test_geometry(model_dir, pool):
    first, second = pool(tp=2).run(geometries, model_dir)
    assert first[0] == second[0] == {
        "modules": ("q_proj", "k_proj", "v_proj"),
        "paths": tuple(f"model.layers.0.self_attn.{m}_proj" for m in "qkv"),
        "in_features": 32, "out_features": (16, 16, 16), "parallel": "column", "first_feature": 0,
        "columns": ((0, 16), (16, 32), (32, 48)),
    }  # fmt: skip
    assert second[1]["first_feature"] == 16 and second[3]["first_feature"] == 24 and first[3]["first_feature"] == 0
    assert second[3]["out_features"] == (32,) and second[3]["in_features"] == 24
    assert len(first) == 12 and first[11]["paths"] == ("model.layers.2.mlp.down_proj",)


def geometries(directory):
    parallel = ParallelConfig(tensor=2)
    stage = build_stage(read_architecture(directory), directory, parallel, dtype=torch.float32, device=torch.device("cpu"))
    names = ("modules", "paths", "in_features", "out_features", "parallel", "first_feature", "columns")
    return [{name: getattr(linear.geometry, name) for name in names} for linear in stage.linears]
