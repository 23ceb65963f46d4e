"""A layer's experts: the twin in torch against autograd in float64, the kernels against the twin, and rows that depend on no other."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fused_ops.experts import reference
from fused_ops.experts.adapters import ExpertGroup, Lora
from fused_ops.experts.layer import ExpertWeights, expert_mlp
from fused_ops.experts.route import Choice
from fused_ops.experts.rows_by_job import RowsByJob
from fused_ops.lora.adapters import AdapterTable
from fused_ops.lora.dropout import FEATURE, keep_mask, quantised_p
from fused_ops.lora.route import make_route

HIDDEN, WIDTH = 32, 24


def weights_of(num_experts=8, top_k=3, normalised=True, dtype=torch.float32, seed=0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    router, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
        for shape in ((num_experts, HIDDEN), (num_experts, 2 * WIDTH, HIDDEN), (num_experts, HIDDEN, WIDTH))
    )
    return ExpertWeights(router_EH=router, up_EFH=up, down_EHF=down, top_k=top_k, normalised=normalised)


def plain(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """The same by all experts of all tokens."""
    p = torch.softmax(x @ weights.router_EH.T, -1)
    chosen, experts = p.topk(weights.top_k)
    if weights.normalised:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,efh->tef", x, weights.up_EFH).chunk(2, -1)
    y = torch.einsum("tef,ehf->teh", F.silu(gate) * up, weights.down_EHF)
    return (torch.zeros_like(p).scatter(1, experts, chosen)[..., None] * y).sum(1)


def steps(x, weights, dy, backend=None, values=True):
    """Return Y and dX, and the near ties of rows 3 to 21 and of all others."""
    leaf, route = x.clone().requires_grad_(), make_route(len(x), ((3, 22, 4),), torch.zeros(len(x), dtype=torch.int32), "cpu")
    y = expert_mlp(leaf, weights, backend, values, segments=route)
    y.backward(dy)
    return y.detach(), leaf.grad, route.near_ties.tolist()


def problem(num_tokens=70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype) for _ in range(2))


def in_double(weights: ExpertWeights) -> ExpertWeights:
    router, up, down = (each.double() for each in (weights.router_EH, weights.up_EFH, weights.down_EHF))
    return ExpertWeights(router_EH=router, up_EFH=up, down_EHF=down, top_k=weights.top_k, normalised=weights.normalised)


RANKS, SCALES, A_ROWS, B_ROWS = (3, 5, 2), (0.7, 1.3, 2.0), ((0, 3), (-1, 6), (11, 13)), ((0, 0), (-1, 3), (3, 8))  # job 1: up alone
SEGMENTS = ((0, 20, 2), (20, 21, 0), (30, 70, 1))  # rows 21 to 29 are no job's


def adapters_of(num_experts, dropout=0.0, dtype=torch.float32, seed=3) -> tuple[ExpertGroup, ExpertGroup]:
    """Return adapters of three jobs on gate and up, and on down."""
    generator, table = torch.Generator().manual_seed(seed), AdapterTable(ranks=RANKS, scales=SCALES, dropouts=(dropout,) * 3)

    def tensors(*shapes):
        return [(torch.randn(num_experts, *shape, generator=generator) * 0.3).to(dtype) for shape in shapes]

    def group(a, b, columns, a_rows, b_rows):
        grads = torch.zeros(a.shape), tuple(torch.zeros(each.shape) for each in b)
        views = {"a_ERK": a, "b_ERN": tuple(b), "grad_a_ERK": grads[0], "grad_b_ERN": grads[1]}
        return ExpertGroup(**views, columns=columns, a_rows=a_rows, b_rows=b_rows, adapters=table)

    a, *b = tensors((15, HIDDEN), (5, WIDTH), (10, WIDTH))
    up = group(a, b, ((0, WIDTH), (WIDTH, 2 * WIDTH)), A_ROWS, B_ROWS)
    a, *b = tensors((5, WIDTH), (5, HIDDEN))
    return up, group(a, b, ((0, HIDDEN),), ((0,), (-1,), (3,)), ((0,), (-1,), (3,)))


def segments_of(num_tokens=70, dropout=True):
    keys = torch.randint(-(2**31), 2**31, (num_tokens,), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    return make_route(num_tokens, SEGMENTS, keys, "cpu", dropout)


def plain_with_adapters(x, weights, groups, leaves, segments):
    """The same by all experts of all tokens, with the adapters' `leaves`: ([A, B, ...] of each group)."""
    p = torch.softmax(x @ weights.router_EH.T, -1)
    chosen, experts = p.topk(weights.top_k)
    if weights.normalised:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    mixed = torch.zeros_like(x)
    for expert in range(len(p[0])):
        keys = segments.row_keys ^ torch.tensor(expert * FEATURE).to(torch.int32)

        def product(x, weight, group, factors, expert=expert, keys=keys):
            y = x @ weight[expert].T
            for first, end, adapter in segments.segments:
                r, p_drop = RANKS[adapter], quantised_p(group.adapters.dropouts[adapter])
                for m, (start, stop) in enumerate(group.columns):
                    a, b = group.a_rows[adapter][m], group.b_rows[adapter][m]
                    if a < 0:
                        continue
                    kept = keep_mask(keys[first:end], 0, x.shape[1], m, p_drop) / (1 - p_drop)
                    term = (x[first:end] * kept) @ factors[0][expert, a : a + r].T @ factors[1 + m][expert, b : b + r]
                    y = y + F.pad(SCALES[adapter] * term, (start, y.shape[1] - stop, first, len(y) - end))
            return y

        gate, up = product(x, weights.up_EFH, groups[0], leaves[0]).chunk(2, -1)
        y = product(F.silu(gate) * up, weights.down_EHF, groups[1], leaves[1])
        mixed = mixed + y * torch.where(experts == expert, chosen, 0.0).sum(1, keepdim=True)
    return mixed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_on_experts_are_the_formula(dropout):
    weights, (x, dy), segments = weights_of(5, 2), problem(), segments_of()
    groups, leaf = adapters_of(5, dropout), x.double().requires_grad_()
    leaves = [[each.double().requires_grad_() for each in (group.a_ERK, *group.b_ERN)] for group in groups]
    expected = plain_with_adapters(leaf, in_double(weights), groups, leaves, segments)
    expected.backward(dy.double())
    for values in (True, False):
        for group in groups:
            for grad in (group.grad_a_ERK, *group.grad_b_ERN):
                grad.zero_()
        ours = x.clone().requires_grad_()
        y = expert_mlp(ours, weights, None, values, groups, segments)
        y.backward(dy)
        if values:
            assert (y - expected).abs().max() < 3e-6 * expected.abs().max()
        assert ours.grad is not None and leaf.grad is not None
        assert (ours.grad - leaf.grad).abs().max() < 3e-6 * leaf.grad.abs().max()
        for group, wanted in zip(groups, leaves, strict=True):
            for grad, of in zip((group.grad_a_ERK, *group.grad_b_ERN), wanted, strict=True):
                assert of.grad is not None and (grad - of.grad).abs().max() < 3e-6 * of.grad.abs().max() > 0


def test_evaluation_drops_nothing_and_other_jobs_change_no_bit():
    weights, (x, dy) = weights_of(5, 2), problem()

    def run(groups, segments, x=x, dy=dy):
        leaf = x.clone().requires_grad_()
        y = expert_mlp(leaf, weights, groups=groups, segments=segments)
        y.backward(dy)
        return y.detach(), leaf.grad, groups[0].grad_a_ERK[:, 3:6], groups[0].grad_b_ERN[1][:, 3:8]

    without, dropped = run(adapters_of(5), segments_of()), run(adapters_of(5, 0.5), segments_of())
    assert torch.equal(run(adapters_of(5, 0.5), segments_of(dropout=False))[0], without[0]) and not torch.equal(dropped[0], without[0])
    mine = torch.arange(70) >= 30
    for spoilt in (float("nan"), 1e30):
        groups = adapters_of(5, 0.5)
        groups[0].a_ERK[:, 11:] = groups[1].a_ERK[:, 3:] = spoilt  # of job 2
        others, upstream = x.clone(), dy.clone()
        others[:20] = upstream[:20] = spoilt
        again = run(groups, segments_of(), others, upstream)
        assert all(torch.equal(found[mine], before[mine]) for found, before in zip(again[:2], dropped[:2], strict=True))
        assert torch.equal(again[3], dropped[3]) and not torch.equal(again[0], dropped[0])


SHAPES = [(8, 3, True), (5, 2, False), (4, 4, True), (6, 1, False), (3, 1, True)]


@pytest.mark.parametrize("num_experts, top_k, normalised", SHAPES)
def test_the_twin_is_the_formula(num_experts, top_k, normalised):
    weights, (x, dy) = weights_of(num_experts, top_k, normalised), problem()
    leaf = x.double().requires_grad_()
    expected = plain(leaf, in_double(weights))
    expected.backward(dy.double())
    assert leaf.grad is not None
    y, dx, near = steps(x, weights, dy)
    assert (y - expected).abs().max() < 2e-6 * expected.abs().max() and near == [0, 0]
    assert (dx - leaf.grad).abs().max() < 2e-6 * leaf.grad.abs().max()
    assert torch.equal(steps(x, weights, dy, values=False)[1], dx)


def test_neighbours_change_no_bit_of_a_token():
    weights, (x, dy) = weights_of(), problem()
    y, dx, _ = steps(x, weights, dy)
    kept = torch.arange(len(x)) % 3 != 1
    for spoilt in (float("nan"), float("inf"), 7.0):
        others, upstream = x.clone(), dy.clone()
        others[~kept] = others[~kept] * -2 + spoilt
        upstream[~kept] = spoilt
        again, dx_again, _ = steps(others, weights, upstream)
        assert torch.equal(y[kept], again[kept]) and torch.equal(dx[kept], dx_again[kept])
        assert not torch.equal(y[~kept], again[~kept])


def test_a_token_of_nan_has_the_first_experts_and_near_ties_are_counted():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [float("nan")] * 4, [3.0, 1.0, 1.0 + 1e-6, 0.0], [1.0, 1.0, 0.0, 0.0]])
    route = make_route(4, ((0, 2, 1), (2, 3, 0)), torch.zeros(4, dtype=torch.int32), "cpu")
    choice, _ = reference.choose(logits, 2, True, route)
    assert choice.expert_Tk.tolist() == [[1, 2], [0, 1], [0, 2], [0, 1]] and route.near_ties.tolist() == [0, 1, 0]
    assert isinstance(choice, Choice) and choice.weight_Tk[0].sum() == 1


@pytest.mark.parametrize("num_experts, top_k, normalised, num_tokens", [(5, 2, False, 25), (2, 1, True, 150)])
def test_the_kernels_are_the_twin(num_experts, top_k, normalised, num_tokens):
    pytest.importorskip("triton")
    from kernel_tools import interpreted

    from fused_ops.experts import fused, grouped, kernels

    weights, (x, dy) = weights_of(num_experts, top_k, normalised), problem(num_tokens)
    x[10] = float("nan")
    x[11:, 0], weights.router_EH[:, 0] = 9.0, torch.linspace(1.0, 0.0, num_experts)  # one expert has more rows than a tile
    x[20:24] = 0.0  # all experts are alike to them
    expected = steps(x, weights, dy)
    with interpreted(kernels, grouped):
        found = steps(x, weights, dy, "triton")
        route = fused.choose(x @ weights.router_EH.T, top_k, normalised)[1]
    healthy = torch.arange(len(x)) != 10
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours[10].isnan().all() and (ours - theirs)[healthy].abs().max() < 2e-6 * theirs[healthy].abs().max()
    assert found[2] == expected[2] == ([2, 2] if top_k < num_experts else [0, 0])
    twin = reference.choose(x @ weights.router_EH.T, top_k, normalised)[1]
    assert torch.equal(route.place_Tk.long(), twin.place_Tk) and torch.equal(route.first_E.long(), twin.first_E)
    assert route.tiles is not None
    covered = torch.cat([torch.arange(first, end) for _, first, end in route.tiles[: route.tiles[-1, 0]].tolist()])
    assert torch.equal(covered, torch.arange(len(x) * top_k))


def of_some_experts(x, dy, segments, weights, first, end, backend="reference"):
    """Return Y, dX and the adapters' gradients of a rank that has some of the experts."""
    own, leaf = slice(first, end), x.clone().requires_grad_()
    up, down = (
        replace(
            group,
            a_ERK=group.a_ERK[own],
            b_ERN=tuple(b[own] for b in group.b_ERN),
            grad_a_ERK=torch.zeros_like(group.grad_a_ERK[own]),
            grad_b_ERN=tuple(torch.zeros_like(b[own]) for b in group.grad_b_ERN),
        )
        for group in adapters_of(len(weights.up_EFH), 0.3)
    )
    of_rank = replace(weights, up_EFH=weights.up_EFH[own], down_EHF=weights.down_EHF[own], first_expert=first)
    y = expert_mlp(leaf, of_rank, backend, groups=(up, down), segments=segments)
    y.backward(dy)
    return [y.detach(), leaf.grad, *(grad for group in (up, down) for grad in (group.grad_a_ERK, *group.grad_b_ERN))]


@pytest.fixture
def spoilt_memory(monkeypatch):
    """Have new tensors hold what must not be read before something else is written there."""

    def new_empty(like, *shape, **kind):
        value = float("nan") if kind.get("dtype", like.dtype).is_floating_point else 2**31 - 1
        return like.new_full(shape if isinstance(shape[0], int) else shape[0], value, **kind)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def assert_they_add_up(parts, whole):
    """Y and dX of ranks are summed; gradients belong to experts."""
    for index, expected in enumerate(whole):
        of_ranks = [part[index] for part in parts]
        found = sum(of_ranks) if index < 2 else torch.cat(of_ranks)
        assert torch.equal(found.isnan(), expected.isnan())
        assert (found - expected).nan_to_num().abs().max() < 2e-6 * expected.nan_to_num().abs().max() > 0


def test_ranks_with_some_of_the_experts_add_up_to_all(spoilt_memory):
    weights, (x, dy), segments = weights_of(5, 2), problem(), segments_of()
    x[5] = dy[40] = float("nan")  # of jobs 2 and 1
    parts = [of_some_experts(x, dy, segments, weights, *own) for own in ((0, 2), (2, 5))]
    assert_they_add_up(parts, of_some_experts(x, dy, segments, weights, 0, 5))


def test_the_kernels_of_adapters_are_the_twins(spoilt_memory):
    pytest.importorskip("triton")
    from kernel_tools import interpreted

    from fused_ops.experts import grouped, kernels, lora_kernels

    weights, (x, dy), segments = weights_of(3, 1, False), problem(150), segments_of(150)
    x[5] = dy[40] = float("nan")  # of jobs 2 and 1
    x[11:, 0], weights.router_EH[:, 0] = 9.0, torch.linspace(0.0, 1.0, 3)  # one expert has more rows than a tile
    whole = of_some_experts(x, dy, segments, weights, 0, 3)
    with interpreted(kernels, grouped, lora_kernels):
        parts = [of_some_experts(x, dy, segments, weights, *own, "triton") for own in ((0, 1), (1, 3))]
    assert_they_add_up(parts, whole)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_grouped_products_neither_spill_nor_wait():
    pytest.importorskip("triton")
    from kernel_tools import assemble
    from stand_in_gpu import compiling

    from fused_ops.experts import fused
    from fused_ops.experts.route import ExpertRoute
    from fused_ops.launch.triton_version import VERSION

    places, weight = torch.zeros(64, 2, dtype=torch.int32), torch.zeros(4, 1536, 2048, dtype=torch.bfloat16)
    route = ExpertRoute(weight_R=places, place_Tk=places, first_E=places, tiles=places)
    with compiling() as compiled:
        for transposed in (False, True):
            fused.grouped(weight.new_zeros(128, 1536 if transposed else 2048), weight, route, transposed)
    assert len(compiled) == 2
    for kernel in compiled:
        found = assemble(kernel.asm["ptx"])
        assert not found.spilled_bytes and not found.serialised, (found.registers, found.spilled_bytes, found.serialised)
        assert "wgmma.mma_async" in found.ptx and "cp.async.bulk.tensor" in found.ptx
    bounds = places[:8].reshape(4, 2, 2)
    rows = RowsByJob(bounds=bounds, keys_R=bounds.new_zeros(128), segments=bounds.new_zeros(2, 4), adapters=(0, 1))
    views = {"a_ERK": weight.new_zeros(4, 15, 2048), "b_ERN": (weight.new_zeros(4, 5, 768), weight.new_zeros(4, 10, 768))}
    group = replace(adapters_of(4, 0.1)[0], **views, columns=((0, 768), (768, 1536)))
    with compiling() as compiled:
        for transposed in (False, True):
            lora = Lora(weight.new_zeros(128, group.width), group, rows)
            fused.grouped(weight.new_zeros(128, 1536 if transposed else 2048), weight, route, transposed, lora)
    most = 512 if VERSION < (3, 9) else 576
    for kernel in compiled:  # after the loop, of a tile of 32 blocks, some registers are spilled once
        found = assemble(kernel.asm["ptx"])
        assert found.spilled_bytes <= most and not found.serialised, (found.registers, found.spilled_bytes, found.serialised)
        assert "wgmma.mma_async" in found.ptx and "cp.async.bulk.tensor" in found.ptx
