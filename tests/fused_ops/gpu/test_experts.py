"""A layer's experts on a GPU, in the shape of Qwen3-30B-A3B: against float64, the same bits beside any neighbour, without waiting for the
device. Needs CUDA."""

import pytest
import torch

from fused_ops.experts import reference
from fused_ops.experts.layer import ExpertWeights, expert_mlp, operators

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
    y = expert_mlp(leaf, frozen, None, backend, values)
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
