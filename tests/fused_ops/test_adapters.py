"""What a group works out from its geometry, and what it refuses."""

import dataclasses

import pytest
import torch

from fused_ops.lora.adapters import AdapterTable, padded_rank


def test_ranks_take_whole_blocks_of_16():
    assert [padded_rank(r) for r in (1, 15, 16, 17, 255, 256)] == [16, 16, 16, 32, 256, 256]


def test_adapter_tables_refuse_what_is_out_of_range():
    for ranks, scales, dropouts, match in [
        ((0,), (1.0,), (0.0,), "rank 0"),
        ((257,), (1.0,), (0.0,), "rank 257"),
        ((8,), (1.0,), (1.0,), "dropout 1.0"),
        ((8, 8), (1.0,), (0.0,), "differ in number"),
    ]:
        with pytest.raises(ValueError, match=match):
            AdapterTable(ranks=ranks, scales=scales, dropouts=dropouts)


def test_columns_of_s_lie_side_by_side(make_problem):
    group = make_problem([4, 4, 4], [8, 20, 16], n=(16, 8, 8), missing={(0, 0), (1, 1), (2, 0), (2, 1), (2, 2)}, dropouts=[0, 0.1, 0]).group
    assert group.widths == (32, 64, 0) and group.width == 64 and group.max_padded_rank == 32 and group.has_dropout
    assert [[group.s_column(s, m) for m in range(3)] for s in range(3)] == [[-1, 0, 16], [0, -1, 32], [-1, -1, -1]]
    assert group.adapter_table.tolist() == [
        [16, 0, 32, 0, -1, -1, -1, 0, 0, 0, 16, 0, 16, -1, -1, -1],
        [32, 102, 64, 32, 32, 0, 0, -1, -1, -1, 64, 16, 32, -1, -1, -1],
        [16, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert group.scale_table.tolist() == pytest.approx([2.0, 1.0 / (1 - 102 / 1024), 2 / 3])


def test_groups_refuse_what_does_not_fit(make_problem):
    group = make_problem([4, 4], [8, 20], n=(16, 8)).group
    wrong = {
        "same in float32": {"grad_a_RK": group.grad_a_RK.double()},
        "contiguous": {"a_RK": torch.zeros(48, 96).T, "grad_a_RK": torch.zeros(48, 96).T},
        "need 1 to 3": {"b_RN": group.b_RN[:1]},
        "overlap": {"columns": ((0, 16), (8, 16))},
        "do not name the same": {"a_rows": ((-1, 0), (32, 64))},
        "leave the arena": {"b_rows": ((0, 0), (16, 32))},
        "unaligned": {"a_rows": ((0, 8), (32, 64))},
        "side by side": {"a_rows": ((0, 32), (32, 64))},
        "for 2 adapters": {"a_rows": ((0, 16),)},
    }
    for match, change in wrong.items():
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(group, **change)


def test_a_group_beside_another_has_its_tables_and_its_own_views(make_problem):
    group = make_problem([4, 4], [8, 20], n=(16, 8)).group
    views = {name: getattr(group, name) for name in ("columns", "b_RN", "grad_b_RN")}
    a, grad = torch.zeros(group.a_RK.shape[0], 10), torch.zeros(group.a_RK.shape[0], 10)
    other = group.beside(**views, a_RK=a, grad_a_RK=grad, first_feature=4)
    assert other.a_RK is a and other.adapter_table is group.adapter_table and other.scale_table is group.scale_table
    assert (other.first_feature, other.width, other.a_rows) == (4, group.width, group.a_rows) and group.first_feature == 0
    with pytest.raises(ValueError, match="has other rows than A"):
        group.beside(**views, a_RK=a[1:], grad_a_RK=grad[1:], first_feature=4)
