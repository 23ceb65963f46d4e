"""The autograd.Function against a naive formula, its isolation, and the seams that parallel layers use."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fused_ops.lora import reference
from fused_ops.lora.dropout import keep_mask, quantised_p
from fused_ops.lora.linear import Collectives, backend_for, multi_lora_linear
from fused_ops.lora.route import make_route

MIXES = {
    "one job": {"lengths": [9], "ranks": [4]},
    "one token": {"lengths": [1], "ranks": [1]},
    "mixed ranks, gaps, an empty segment": {"lengths": [7, 0, 5, 33], "ranks": [1, 16, 256, 40], "gaps": 2},
    "dropout": {"lengths": [17, 12, 8], "ranks": [8, 16, 3], "dropouts": [0.1, 0.0, 0.7], "gaps": 1},
    "merged": {
        "lengths": [5, 6, 7],
        "ranks": [8, 33, 16],
        "n": (24, 8, 8),
        "dropouts": [0.0, 0.3, 0.1],
        "missing": {(0, 1), (1, 0), (2, 1)},
    },
    "a job that targets nothing here": {"lengths": [5, 6], "ranks": [8, 8], "n": (9, 7), "missing": {(1, 0), (1, 1)}},
    "forty jobs": {"lengths": list(range(40)), "ranks": [1 + i % 20 for i in range(40)], "k": 17, "n": (13,)},
}


def naive(p, x, a, b):
    """y = x W^T + alpha/r B A dropout(x), job by job and token by token, from the definition."""
    y = [x[t] @ p.weight.T for t in range(len(x))]
    for first, end, adapter in p.route.segments:
        r, rate = p.group.adapters.ranks[adapter], p.group.adapters.dropouts[adapter]
        for m, (start, stop) in enumerate(p.group.columns):
            if p.group.a_rows[adapter][m] < 0:
                continue
            a_rK, b_rN = a[p.group.a_rows[adapter][m] :][:r], b[m][p.group.b_rows[adapter][m] :][:r]
            for t in range(first, end):
                keep = keep_mask(p.route.row_keys[t : t + 1], p.group.first_feature, x.shape[1], m, rate)[0]
                xd = x[t] * keep / (1 - quantised_p(rate))
                delta = p.group.adapters.scales[adapter] * (b_rN.T @ (a_rK @ xd))
                y[t] = y[t] + torch.nn.functional.pad(delta, (start, len(p.weight) - stop))
    return torch.stack(y)


def run(p, **kwargs):
    p.zero_grads()
    x = p.x.clone().requires_grad_()
    y = multi_lora_linear(x, p.weight, kwargs.pop("bias", None), p.group, p.route, **kwargs)
    y.backward(p.dy)
    return [y.detach(), x.grad, *[g.clone() for g in p.grads]]


@pytest.mark.parametrize("mix", ["one job", "dropout", "merged"])
def test_backward_alone_has_the_same_bits_without_a_product(make_problem, mix, monkeypatch):
    p = make_problem(**MIXES[mix])
    y, *gradients = run(p)
    monkeypatch.setattr(reference, "up", None)  # a call of it would raise
    alone, *again = run(p, output_shape=y.shape)
    assert alone.shape == y.shape and alone.untyped_storage().nbytes() == y.element_size()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, gradients, strict=True))


@pytest.mark.parametrize("mix", MIXES)
def test_forward_and_gradients_match_autograd_of_the_definition(make_problem, mix):
    p = make_problem(**MIXES[mix], dtype=torch.float32, first_feature=50)
    leaves = [t.double().requires_grad_() for t in (p.x, p.group.a_RK, *p.group.b_RN)]
    p64 = make_problem(**MIXES[mix], dtype=torch.float64, first_feature=50)
    y = naive(p64, leaves[0], leaves[1], leaves[2:])
    grads = torch.autograd.grad(y, leaves, p64.dy, allow_unused=True)
    for ours, theirs in zip(run(p), [y, *grads], strict=True):
        expected = torch.zeros_like(ours).double() if theirs is None else theirs
        torch.testing.assert_close(ours.double(), expected.detach(), rtol=2e-5, atol=2e-5)


def test_the_differentiable_reference_agrees(make_problem):
    p = make_problem(**MIXES["merged"], dtype=torch.float64)
    p.group.a_RK.requires_grad_()
    x, bias = p.x.clone().requires_grad_(), torch.randn(40, dtype=torch.float64)
    y = p.differentiable(x, bias)
    dx, da = torch.autograd.grad(y, [x, p.group.a_RK], p.dy)
    p.group.a_RK.requires_grad_(False)
    ours = run(p, bias=bias)
    for got, expected in zip(ours[:3], (y, dx, da), strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_bf16_is_as_good_as_plain_bf16(make_problem):
    mix = {"lengths": [40, 30, 50], "ranks": [8, 16, 64], "k": 96, "n": (64,), "dropouts": [0.1, 0.0, 0.1]}
    exact, half = make_problem(**mix), make_problem(**mix, dtype=torch.bfloat16)
    for name in ("x", "weight", "dy"):
        setattr(exact, name, getattr(half, name).float())
    exact.group.a_RK.copy_(half.group.a_RK)
    exact.group.b_RN[0].copy_(half.group.b_RN[0])
    x, a, b = half.x.clone().requires_grad_(), half.group.a_RK.clone().requires_grad_(), half.group.b_RN[0].clone().requires_grad_()
    plain = naive(half, x, a, [b])
    plain = [plain, *torch.autograd.grad(plain, [x, a, b], half.dy)]
    for ours, theirs, truth in zip(run(half), plain, run(exact), strict=True):
        error, allowed = ours.float() - truth, theirs.float() - truth
        assert error.pow(2).mean().sqrt() <= 1.2 * allowed.pow(2).mean().sqrt() + 1e-6


@pytest.mark.parametrize("where", ["x", "dy", "a", "b"])
def test_nan_stays_with_its_job(make_problem, where):
    mix = {"lengths": [6, 5, 9], "ranks": [4, 20, 16], "n": (24, 16), "dropouts": [0.1, 0.2, 0.0], "gaps": 1}
    clean, p = make_problem(**mix), make_problem(**mix)
    first, end, adapter = p.route.segments[1]
    a0, b0, rank = p.group.a_rows[1][0], p.group.b_rows[1], 32
    if where in ("x", "dy"):
        getattr(p, where)[first:end] = float("nan")
    elif where == "a":
        p.group.a_RK[a0 : a0 + 2 * rank] = float("nan")
    else:
        for m in range(2):
            p.group.b_RN[m][b0[m] : b0[m] + rank] = float("nan")
    others = torch.ones(len(p.x), dtype=torch.bool)
    others[first:end] = False
    got, expected = run(p), run(clean)
    assert any(not g.isfinite().all() for g in got)
    for g, e in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(g[others], e[others])
    keep_a = torch.ones(len(p.group.a_RK), dtype=torch.bool)
    keep_a[a0 : a0 + 2 * rank] = False
    assert torch.equal(got[2][keep_a], expected[2][keep_a])
    for m in range(2):
        keep_b = torch.ones(len(p.group.b_RN[m]), dtype=torch.bool)
        keep_b[b0[m] : b0[m] + rank] = False
        assert torch.equal(got[3 + m][keep_b], expected[3 + m][keep_b])


def test_a_route_without_dropout_sees_the_whole_input(make_problem):
    mix = {"lengths": [17, 12, 8], "ranks": [8, 16, 3], "gaps": 1}
    p, plain = make_problem(**mix, dropouts=[0.1, 0.0, 0.7]), make_problem(**mix)
    segments, keys = p.route.segments, p.route.row_keys
    route = make_route(p.route.num_rows, segments, keys, "cpu", dropout=False)
    ours, theirs = (multi_lora_linear(p.x, p.weight, None, each.group, each.route) for each in (p, plain))
    assert not torch.allclose(ours, theirs), "dropout changes nothing"
    assert torch.equal(multi_lora_linear(p.x, p.weight, None, p.group, route), theirs)
    assert not route.rows(3, 9).dropout and p.route.rows(3, 9).dropout
    assert p.group.without_dropout is p.group.without_dropout and not p.group.without_dropout.has_dropout


def test_gradients_accumulate_over_microbatches(make_problem):
    p = make_problem([6, 5], [4, 20])
    once = run(p)
    x = p.x.clone().requires_grad_()
    multi_lora_linear(x, p.weight, None, p.group, p.route).backward(p.dy)
    for grad, first in zip(p.grads, once[2:], strict=True):
        torch.testing.assert_close(grad, 2 * first)


def test_a_step_of_another_job_between_forward_and_backward_is_allowed(make_problem):
    p = make_problem([6, 0], [4, 20])
    expected = run(p)
    p.zero_grads()
    x = p.x.clone().requires_grad_()
    y = multi_lora_linear(x, p.weight, None, p.group, p.route)
    p.group.a_RK[16:].add_(1.0)
    p.group.b_RN[0][16:].add_(1.0)
    y.backward(p.dy)
    for got, want in zip([y, x.grad, *p.grads], expected, strict=True):
        assert torch.equal(got, want)


def test_base_only_and_groupless_calls_are_the_frozen_linear(make_problem):
    p = make_problem([6], [4])
    empty = make_route(6, [], np.zeros(6, np.int32), "cpu")
    for group, route in ((None, None), (p.group, empty), (None, p.route), (p.group, None)):
        x = p.x.clone().requires_grad_()
        y = multi_lora_linear(x, p.weight, None, group, route)
        y.backward(p.dy)
        assert torch.equal(y, p.x @ p.weight.T) and torch.equal(x.grad, p.dy @ p.weight)
    assert not any(g.any() for g in p.grads)


MERGED = {"lengths": [7, 5, 8], "ranks": [8, 33, 16], "k": 32, "n": (24, 8), "dropouts": [0.2, 0.3, 0.0]}


def assert_same(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_row_parallel_shards_add_up(make_problem):
    """K is cut in two: partial Y and partial dB add up, dX and dA are slices, the masks are slices of one mask."""
    whole = make_problem(**MERGED)
    expected, parts = run(whole), []
    for cut in (slice(0, 12), slice(12, 32)):
        p = make_problem(**MERGED)
        p.x, p.weight = p.x[:, cut].contiguous(), p.weight[:, cut].contiguous()
        p.group = replace(
            p.group, a_RK=p.group.a_RK[:, cut].contiguous(), grad_a_RK=p.group.grad_a_RK[:, cut].contiguous(), first_feature=cut.start
        )
        parts.append(run(p))
    left, right = parts
    assert_same([left[0] + right[0], left[3] + right[3], left[4] + right[4]], [expected[0], expected[3], expected[4]])
    assert_same([torch.cat([left[i], right[i]], 1) for i in (1, 2)], expected[1:3])


class GatheredRows(Collectives):
    """A column-parallel layer under sequence parallelism, seen by one rank: all rows of X come from outside, dS arrives summed."""

    def __init__(self, full_x, other_ds, rows):
        self.full_x, self.other_ds, self.rows = full_x, other_ds, rows

    def gather_input(self, x):
        return self.full_x

    def reduce_grad(self, dx):
        return dx[self.rows[0] : self.rows[1]]

    def reduce_ds(self, ds):
        self.own_ds = ds.clone()
        return (
            (ds + self.other_ds)[self.rows[0] : self.rows[1]].contiguous() if self.other_ds is not None else ds[self.rows[0] : self.rows[1]]
        )

    def local_rows(self, num_rows):
        return self.rows


def test_da_runs_beside_dx_only_where_nothing_is_launched_between(make_problem, monkeypatch):
    told = []
    monkeypatch.setattr(reference, "grad_a", lambda *args, after_dx=False, **kwargs: told.append(after_dx))

    def backward(needs_dx=True, **kwargs):
        p = make_problem([9], [4])
        x = p.x.clone().requires_grad_(needs_dx)
        y = multi_lora_linear(x, p.weight if needs_dx else p.weight.clone().requires_grad_(), None, p.group, p.route, **kwargs)
        y.backward(p.dy)
        return told.pop()

    class Talking(Collectives):
        pass

    assert backward() is True
    assert backward(collectives=Talking()) is False
    assert backward(needs_dx=False) is False


def test_what_is_less_than_half_a_step_of_the_frozen_product_is_not_lost(make_problem):
    """In bf16 the frozen product is near 100, a step there 0.5, and LoRA's share 0.1: rounded once, it is there on average."""
    torch.manual_seed(0)
    p = make_problem([4096], [16], k=64, n=(32,), dtype=torch.bfloat16)
    p.x.fill_(1.0)
    p.dy.fill_(1.0)
    p.weight.copy_(torch.rand(32, 64) * 3)
    p.x[:, 0] = torch.linspace(0, 4, 4096)  # no two frozen sums the same
    p.dy[:, 0] = torch.linspace(0, 4, 4096)
    s = torch.full((4096, 16), 0.1 / 16, dtype=torch.bfloat16)
    p.group.b_RN[0].fill_(1.0)
    p.group.a_RK.fill_(1.0)
    for ours, frozen in (
        (reference.up(p.x, p.weight, None, s, p.group, p.route), reference.up(p.x, p.weight, None, None, None, None)),
        (reference.grad_x(p.dy, p.weight, s, p.group, p.route), reference.grad_x(p.dy, p.weight, None, None, None)),
    ):
        assert float((ours.float() - frozen.float()).mean()) == pytest.approx(0.1, rel=0.1)


def test_column_parallel_shards_add_up_under_sequence_parallelism(make_problem):
    """N is cut in two, rows of X too: dA of local rows needs dS of both ranks; partial dX and partial dA add up."""
    expected = run(make_problem(**MERGED))
    shards, cuts, rows = [], [((0, 12), (24, 28)), ((12, 24), (28, 32))], [(0, 9), (9, 20)]
    for (q0, q1), (k0, k1) in cuts:
        p = make_problem(**MERGED)
        columns = [*range(q0, q1), *range(k0, k1)]
        p.weight, p.dy = p.weight[columns].contiguous(), p.dy[:, columns].contiguous()
        b = (p.group.b_RN[0][:, q0:q1].contiguous(), p.group.b_RN[1][:, k0 - 24 : k1 - 24].contiguous())
        p.group = replace(p.group, b_RN=b, grad_b_RN=tuple(torch.zeros_like(t) for t in b), columns=((0, 12), (12, 16)))
        shards.append(p)
    ds = []
    for p in shards:
        seam = GatheredRows(p.x, None, (0, 20))
        run(p, collectives=seam)
        ds.append(seam.own_ds)
    outs = []
    for i, p in enumerate(shards):
        full_x, p.x = p.x, p.x[rows[i][0] : rows[i][1]].contiguous()
        outs.append(run(p, collectives=GatheredRows(full_x, ds[1 - i], rows[i])))
    assert_same([outs[0][2] + outs[1][2]], [expected[2]])
    assert_same([torch.cat([outs[0][0][:, :12], outs[1][0][:, :12], outs[0][0][:, 12:], outs[1][0][:, 12:]], 1)], [expected[0]])
    for m in range(2):
        assert_same([torch.cat([outs[0][3 + m], outs[1][3 + m]], 1)], [expected[3 + m]])


def test_wrong_shapes_are_named(make_problem):
    p = make_problem([6], [4])
    for x, weight, bias, match in [
        (p.x[:, :-1], p.weight, None, "does not fit W"),
        (p.x, p.weight.double(), None, "does not fit W"),
        (p.x, p.weight, torch.zeros(3), "bias"),
        (p.x, p.weight[:8], None, "do not fit W"),
        (p.x[:4], p.weight, None, "route has 6 rows"),
    ]:
        with pytest.raises(ValueError, match=match):
            multi_lora_linear(x, weight, bias, p.group, p.route)
    with pytest.raises(ValueError, match="neither"):
        backend_for(torch.device("cpu"), "cublas")
