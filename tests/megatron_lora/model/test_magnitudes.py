"""The norms of W + c B A against those of the sum itself, for every way in which W may be stored, and for shares of its inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_ops.lora.fp8 import quantise_rows, quantise_weight
from fused_ops.lora.frozen import operand
from fused_ops.lora.nf4 import quantise_nf4
from fused_ops.lora.packed import Scratch, pack
from megatron_lora.model import magnitudes
from megatron_lora.model.arena_region import Region
from megatron_lora.model.linears import LinearGeometry
from megatron_lora.model.magnitudes import MagnitudeRows

WIDTHS, K, R, SCALE = (20, 12), 128, 3, 1.75
STORED = {
    "fp32": lambda w: w,
    "bf16": lambda w: w.bfloat16(),
    "fp8": quantise_weight,
    "nf4": lambda w: pack(quantise_nf4(w), torch.float32, False, Scratch()),
    "nf4 in 8 bits": lambda w: pack(quantise_nf4(w), torch.bfloat16, True, Scratch()),
    "packed fp8": lambda w: pack(quantise_rows(w), torch.bfloat16, False, Scratch()),
}


def rows_of(weight, parallel="column", ranks=1):
    geometry = LinearGeometry(
        modules=("gate_proj", "up_proj"), paths=("gate", "up"), in_features=K // ranks, out_features=WIDTHS, parallel=parallel,
        first_feature=0, tensor_ranks=ranks,
    )  # fmt: skip
    region = Region(geometry, {"gate_proj": 16, "up_proj": 16, "magnitudes": 2}, 0, 0)
    linear = SimpleNamespace(stored_weight=weight, parallel=parallel, config=SimpleNamespace(sequence_parallel=False))
    return MagnitudeRows(linear, region, torch.zeros(region.end), torch.zeros(region.end))


@pytest.fixture
def factors():
    draw = torch.Generator().manual_seed(0)
    w, a = torch.randn(sum(WIDTHS), K, generator=draw) * 0.1, torch.randn(2, R, K, generator=draw) * 0.3
    return w, a, [torch.randn(R, n, generator=draw) * 0.2 for n in WIDTHS]


@pytest.mark.parametrize("stored", STORED)
def test_norms_are_those_of_the_sum(stored, factors, monkeypatch):
    monkeypatch.setattr(magnitudes, "BLOCK_ROWS", 8)
    w, a, b = factors
    weight = STORED[stored](w)
    rows, matrix = rows_of(weight), operand(weight, backward=False)
    exact = matrix.double() if isinstance(matrix, torch.Tensor) else matrix.float().double()
    exact[WIDTHS[0] :] += SCALE * b[1].T.double() @ a[1].double()  # the first module is not targeted
    squares = rows.square_norms([(1, a[1], b[1])], SCALE)
    torch.testing.assert_close(squares.double(), exact.square().sum(1), rtol=1e-5, atol=0)
    rows.set(1, [1], squares, restart=True)
    table = rows.factors
    assert (table.scale_MN == 1).all() and not table.inverse_norm_MN[0].any() and not table.inverse_norm_MN[1, : WIDTHS[0]].any()
    torch.testing.assert_close(rows.master_MN[1, WIDTHS[0] :].double(), exact.norm(dim=1)[WIDTHS[0] :], rtol=1e-5, atol=0)
    rows.master_MN[1] *= 3
    rows.set(1, [1], squares, restart=False)
    torch.testing.assert_close(table.scale_MN[1, WIDTHS[0] :], torch.full((WIDTHS[1],), 3.0))
    rows.move(1, 0)
    assert torch.equal(table.scale_MN[0], table.scale_MN[1]) and torch.equal(table.inverse_norm_MN[0], table.inverse_norm_MN[1])


def test_ranks_that_hold_parts_of_the_inputs_add_up(factors):
    w, a, b = factors
    terms = [(m, a[m], b[m]) for m in (0, 1)]
    parts = [
        rows_of(w[:, half], "row", 2).square_norms([(m, a_RK[:, half], b_RN) for m, a_RK, b_RN in terms], SCALE)
        for half in (slice(0, 64), slice(64, K))
    ]
    torch.testing.assert_close(sum(parts), rows_of(w).square_norms(terms, SCALE))
    assert rows_of(w[:, :64], "row", 2).factors.share == 0.5 and rows_of(w).factors.share == 1.0
