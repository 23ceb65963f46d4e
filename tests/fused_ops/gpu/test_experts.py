"""A layer's experts on a GPU, in the shape of Qwen3-30B-A3B: against float64, the same bits beside any neighbour, without waiting for the
device. Needs CUDA."""

import pytest
import torch

from fused_ops.experts import reference
from fused_ops.experts.adapters import ExpertGroup
from fused_ops.experts.layer import ExpertWeights, expert_mlp, operators
from fused_ops.lora.adapters import AdapterTable
from fused_ops.lora.route import make_route

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def route_of(counts):
    """Return the route of one expert a token, expert e having counts[e] tokens, shuffled."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))].cuda()
    return operators(experts.device).choose(torch.nn.functional.one_hot(experts, len(counts)).bfloat16(), 1, True)[1]


COUNTS = {"even": [64] * 8, "empty ones, one tile and one more row": [0, 129, 0, 1, 128, 700, 0], "one expert": [300], "small": [1, 0, 2]}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_out, num_in", [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH), (200, 72)])
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_products_equal_float64(name, num_out, num_in, transposed):
    route = route_of(COUNTS[name])
    weight = random(len(COUNTS[name]), num_out, num_in, seed=1, scale=0.05)
    x = random(sum(COUNTS[name]), num_out if transposed else num_in)
    found = operators(x.device).grouped(x, weight, route, transposed)
    expected = reference.grouped(x.double(), weight.double(), route, transposed)
    assert (found - expected).norm() < 3e-3 * expected.norm()
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def weights(seed=0):
    return ExpertWeights(
        router_EH=random(EXPERTS, HIDDEN, seed=seed + 1, scale=0.02),
        up_EFH=random(EXPERTS, 2 * WIDTH, HIDDEN, seed=seed + 2, scale=0.02),
        down_EHF=random(EXPERTS, HIDDEN, WIDTH, seed=seed + 3, scale=0.02),
        top_k=TOP_K,
        normalised=True,
    )


def steps(x, frozen, dy, backend=None, values=True):
    leaf = x.clone().requires_grad_()
    y = expert_mlp(leaf, frozen, backend, values)
    y.backward(dy)
    return y.detach(), leaf.grad


def test_a_layer_equals_its_twin():
    frozen, x, dy = weights(), random(1000, HIDDEN, seed=8), random(1000, HIDDEN, seed=9)
    for ours, theirs in zip(steps(x, frozen, dy), steps(x, frozen, dy, "reference"), strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()
    assert torch.equal(steps(x, frozen, dy, values=False)[1], steps(x, frozen, dy)[1])


def test_neighbours_change_no_bit_and_nothing_waits_for_the_device():
    frozen, x, dy = weights(), random(3000, HIDDEN, seed=8), random(3000, HIDDEN, seed=9)
    kept = torch.arange(len(x), device="cuda") % 3 != 1
    others, upstream = x.clone(), dy.clone()
    others[~kept], upstream[~kept] = float("nan"), float("nan")
    expected = steps(x, frozen, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = steps(others, frozen, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[kept], theirs[kept]) and ours[~kept].isnan().all()


JOBS, RANKS, SEGMENTS = 3, (4, 16, 7), ((0, 1000, 2), (1000, 1030, 0), (1100, 3000, 1))


def adapters(dropout):
    """Return adapters of three jobs on all experts: gate and up, and down."""
    table = AdapterTable(ranks=RANKS, scales=(0.5, 1.0, 2.0), dropouts=(dropout, 0.0, dropout))
    starts = [sum(RANKS[:job]) for job in range(JOBS)]

    def group(seed, num_in, columns):
        m, total = len(columns), sum(RANKS)
        a = random(EXPERTS, m * total, num_in, seed=seed, scale=0.05)
        b = tuple(random(EXPERTS, total, stop - start, seed=seed + 1 + start, scale=0.05) for start, stop in columns)
        return ExpertGroup(
            a_ERK=a,
            b_ERN=b,
            grad_a_ERK=torch.zeros_like(a, dtype=torch.float32),
            grad_b_ERN=tuple(torch.zeros_like(each, dtype=torch.float32) for each in b),
            columns=columns,
            a_rows=tuple(tuple(m * start + i * r for i in range(m)) for start, r in zip(starts, RANKS, strict=True)),
            b_rows=tuple((start,) * m for start in starts),
            adapters=table,
        )

    return group(20, HIDDEN, ((0, WIDTH), (WIDTH, 2 * WIDTH))), group(30, WIDTH, ((0, HIDDEN),))


def adapted_steps(x, dy, groups, frozen, backend=None):
    """Return Y, dX and all gradients of the adapters."""
    keys = torch.randint(-(2**31), 2**31, (len(x),), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    leaf, route = x.clone().requires_grad_(), make_route(len(x), SEGMENTS, keys, "cuda")
    _ = route.segment_table  # uploaded before anything may wait
    for group in groups:
        _ = group.adapter_table, group.scale_table
    y = expert_mlp(leaf, frozen, backend, True, groups, route)
    y.backward(dy)
    return y.detach(), leaf.grad, *(grad for group in groups for grad in (group.grad_a_ERK, *group.grad_b_ERN))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_equal_their_twin(dropout):
    x, dy, frozen = random(3000, HIDDEN, seed=8), random(3000, HIDDEN, seed=9), weights()
    found, expected = (adapted_steps(x, dy, adapters(dropout), frozen, backend) for backend in (None, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm() > 0
    again = adapted_steps(x, dy, adapters(dropout), frozen)
    assert all(torch.equal(ours, repeated) for ours, repeated in zip(found, again, strict=True))


def test_other_jobs_change_no_bit_of_a_job_on_experts():
    x, dy, before, frozen = random(3000, HIDDEN, seed=8), random(3000, HIDDEN, seed=9), adapters(0.1), weights()
    expected, mine = adapted_steps(x, dy, before, frozen), slice(1100, 3000)
    others, upstream, groups = x.clone(), dy.clone(), adapters(0.1)
    others[:1030], upstream[:1030] = float("nan"), float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = adapted_steps(others, upstream, groups, frozen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[0][mine], expected[0][mine]) and torch.equal(found[1][mine], expected[1][mine])
    rows_a, rows_b = before[0].a_rows[1][0], before[0].b_rows[1][0]
    for ours, theirs, first, count in ((found[2], expected[2], rows_a, 32), (found[3], expected[3], rows_b, 16)):
        assert torch.equal(ours[:, first : first + count], theirs[:, first : first + count])
    assert found[2].isnan().any()
