"""The Triton kernels on a GPU: calibrated accuracy, isolation, repetition, the pointer path. Needs CUDA, compute capability >= 8.0."""

import dataclasses
import threading

import pytest
import torch
from kernel_tools import setting_row

from fused_ops.elementwise.adamw import adamw_, adamw_reference_, make_chunks
from fused_ops.launch import early_launch
from fused_ops.lora import fused, reference
from fused_ops.lora.linear import multi_lora_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MIXES = {
    "one token": {"lengths": [1], "ranks": [1], "k": 64, "n": (64,)},
    "many tiles": {"lengths": [1000, 1100, 948], "ranks": [16, 16, 16], "k": 256, "n": (4096,)},
    "many tiles and dropout": {"lengths": [1000, 1100, 948], "ranks": [16, 16, 16], "k": 256, "n": (2048, 2048), "dropouts": [0.1] * 3},
    "many tiles and ranks": {"lengths": [700, 900, 64, 1100, 300], "ranks": [8, 64, 16, 128, 32], "k": 512, "n": (3072, 512, 512)},
    "several jobs in a tile": {
        "lengths": [100, 30, 20, 60, 500, 7, 9, 300],
        "ranks": [16, 8, 33, 16, 64, 1, 16, 24],
        "k": 512,
        "n": (3072, 512, 512),
        "gaps": 2,
        "missing": {(1, 0), (2, 2)},
    },
    "several jobs in a tile and dropout": {
        "lengths": [100, 30, 20, 60, 500, 7, 9, 300],
        "ranks": [16, 8, 33, 16, 64, 1, 16, 24],
        "k": 512,
        "n": (3072, 512, 512),
        "gaps": 2,
        "dropouts": [0.1, 0.0, 0.5, 0.3, 0.0, 0.2, 0.1, 0.0],
    },
    "aligned": {"lengths": [256, 256], "ranks": [16, 16], "k": 512, "n": (512,)},
    "ragged": {"lengths": [100, 0, 77, 340, 5], "ranks": [16, 8, 3, 16, 12], "k": 512, "n": (384,), "gaps": 3},
    "mixed ranks": {"lengths": [130, 70, 300, 129, 64], "ranks": [1, 16, 256, 40, 128], "k": 264, "n": (200,), "gaps": 1},
    "mixed ranks and dropout": {"lengths": [130, 70, 300], "ranks": [8, 256, 40], "k": 264, "n": (200,), "dropouts": [0.1, 0.0, 0.5]},
    "dropout": {"lengths": [200, 333, 90], "ranks": [16, 8, 16], "k": 512, "n": (256,), "dropouts": [0.1, 0.0, 0.7], "gaps": 1},
    "merged": {"lengths": [150, 260, 90], "ranks": [8, 33, 16], "k": 256, "n": (192, 64, 64), "missing": {(0, 1), (1, 0), (2, 1)}},
    "merged and dropout": {"lengths": [150, 260, 90], "ranks": [8, 33, 16], "k": 256, "n": (192, 64, 64), "dropouts": [0.1, 0.3, 0.0]},
    "merged of rank 16": {"lengths": [150, 260], "ranks": [16, 16], "k": 256, "n": (512, 256, 256), "dropouts": [0.1, 0.3]},
    "two modules": {"lengths": [700, 400], "ranks": [16, 32], "k": 256, "n": (512, 512), "dropouts": [0.0, 0.2]},
    "odd sizes": {"lengths": [100, 40], "ranks": [8, 16], "k": 77, "n": (51, 33), "dropouts": [0.1, 0.0], "gaps": 1},
    "merged across tiles": {"lengths": [300, 84], "ranks": [16, 40], "k": 320, "n": (896, 128, 128), "dropouts": [0.0, 0.2], "gaps": 9},
    "long segments": {"lengths": [640, 513, 900], "ranks": [16, 64, 8], "k": 1000, "n": (520,), "gaps": 30},
    "rank 16, several items": {"lengths": [3000, 65, 1290], "ranks": [16, 9, 1], "k": 128, "n": (1104,), "gaps": 5},
    "several items and dropout": {
        "lengths": [3000, 65, 1290],
        "ranks": [16, 9, 1],
        "k": 128,
        "n": (1104,),
        "gaps": 5,
        "dropouts": [0.1] * 3,
    },
    "rank 32, several items": {"lengths": [2000, 700], "ranks": [32, 16], "k": 128, "n": (520, 264), "gaps": 1},
    "rank 64, several items": {"lengths": [2000, 1300, 130], "ranks": [64, 8, 40], "k": 128, "n": (840, 264, 8), "gaps": 3},
    "forty jobs": {"lengths": [7 * i % 61 for i in range(40)], "ranks": [1 + 5 * i % 64 for i in range(40)], "k": 128, "n": (136,)},
}


SEVERAL_ITEMS = ["rank 16, several items", "rank 64, several items", "several items and dropout"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN, so that an element that a kernel forgets, or should not read, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def exact(p, make_problem, mix):
    """Return the same steps in float32 over the bf16 problem's values."""
    q = make_problem(**mix, device="cuda")
    q.x, q.weight, q.dy = p.x.float(), p.weight.float(), p.dy.float()
    q.group.a_RK.copy_(p.group.a_RK)
    for b, half in zip(q.group.b_RN, p.group.b_RN, strict=True):
        b.copy_(half)
    return q.steps(reference)


def plain_bf16(p):
    """Return what PEFT's formula gives in bf16 under autograd."""
    leaves = [t.clone().requires_grad_() for t in (p.x, p.group.a_RK, *p.group.b_RN)]
    group = type(p.group)(
        **{**{f: getattr(p.group, f) for f in p.group.__dataclass_fields__}, "a_RK": leaves[1], "b_RN": tuple(leaves[2:])}
    )
    y = dataclasses.replace(p, group=group).differentiable(leaves[0])
    grads = torch.autograd.grad(y, leaves, p.dy, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
    return dict(zip(["y", "dx", "da", *[f"db{m}" for m in range(len(leaves) - 2)]], [y.detach(), *grads], strict=True))


@pytest.mark.parametrize("mix", MIXES)
def test_as_accurate_as_plain_bf16(make_problem, mix):
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    ours, truth, plain = p.steps(fused), exact(p, make_problem, MIXES[mix]), plain_bf16(p)
    for name, value in ours.items():
        error, allowed = value.float() - truth[name], plain[name].float() - truth[name]
        tiny = 1e-6 * float(truth[name].abs().max()) + 1e-30
        assert error.isfinite().all(), name
        assert error.pow(2).mean().sqrt() <= 2 * allowed.pow(2).mean().sqrt() + tiny, name
        assert error.abs().max() <= 3 * allowed.abs().max() + 10 * tiny, name


@pytest.mark.parametrize("mix", ["ragged", "merged and dropout"])
def test_float32_is_float32(make_problem, mix):
    p = make_problem(**MIXES[mix], device="cuda")
    for (name, ours), truth in zip(p.steps(fused).items(), p.steps(reference).values(), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm(), name


@pytest.mark.parametrize("mix", ["mixed ranks and dropout", "merged and dropout", "two modules", "forty jobs", *SEVERAL_ITEMS])
def test_repetition_gives_the_same_bits(make_problem, mix):
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    first = p.steps(fused)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), p.steps(fused).values(), strict=True))


@pytest.mark.parametrize(("k", "n"), [(8192, (1024,)), (14336, (1024,)), (4096, (1024, 512))])
@pytest.mark.parametrize("length", [1024, 2048])
def test_long_rings_give_the_same_bits_two_hundred_times(make_problem, k, n, length):
    """At sizes where many blocks pass through every buffer, and two programs share a multiprocessor: seen wrong nine times of ten."""
    p = make_problem([length] * 4, [16] * 4, k=k, n=n, dropouts=[0.1] * 4, dtype=torch.bfloat16, device="cuda")
    steps = p.steps(fused)
    truth = p.steps(reference)
    for name, value in steps.items():
        assert (value.float() - truth[name].float()).norm() < 0.01 * truth[name].float().norm(), name
    s = fused.down(p.x, p.group, p.route)
    ds = fused.grad_s_and_b(p.dy, s, p.group, p.route)
    for i in range(200):
        p.zero_grads()
        fused.grad_a(p.x, ds, p.group, p.route)
        assert torch.equal(p.group.grad_a_RK, steps["da"]), f"dA, repetition {i}"
        assert torch.equal(fused.down(p.x, p.group, p.route), s), f"S, repetition {i}"


@pytest.mark.parametrize("mix", ["many tiles", "many tiles and dropout", "many tiles and ranks", *SEVERAL_ITEMS])
def test_starting_early_changes_no_bit(make_problem, monkeypatch, mix):
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(early_launch, "ENABLED", False)
    expected = p.steps(fused)
    monkeypatch.setattr(early_launch, "ENABLED", True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(expected.values(), p.steps(fused).values(), strict=True))


def test_masks_are_the_references(make_problem):
    """With A of ones, S counts kept features exactly: the kernel's bits are the reference's bits."""
    for n in ((16,), (16, 16, 16)):
        p = make_problem([300, 100], [16, 16], k=256, n=n, dropouts=[0.25, 0.5], scales=[0.75, 0.5], dtype=torch.bfloat16, device="cuda")
        p.x.fill_(1.0)
        p.group.a_RK.fill_(1.0)
        assert torch.equal(fused.down(p.x, p.group, p.route), reference.down(p.x, p.group, p.route))


def test_masks_of_dx_are_the_references(make_problem):
    """With W of zeros, A of ones and dS of ones, dX counts the ranks of the modules that keep a feature: bits equal to the reference's."""
    for n in ((64,), (64, 64, 64)):
        p = make_problem([300, 100, 77], [16, 16, 32], k=512, n=n, dropouts=[0.25, 0.5, 0.0], gaps=2, dtype=torch.bfloat16, device="cuda")
        p.weight.zero_()
        p.group.a_RK.fill_(1.0)
        ds = p.x.new_ones(p.route.num_rows, p.group.width)
        ours, theirs = (ops.grad_x(p.dy, p.weight, ds, p.group, p.route) for ops in (fused, reference))
        assert theirs.unique().numel() > 2 and torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["x", "dy", "a", "b"])
@pytest.mark.parametrize("dropouts", [None, [0.1, 0.2, 0.1]])
def test_nan_stays_with_its_job(make_problem, where, dropouts):
    mix = {"lengths": [60, 50, 90], "ranks": [4, 20, 16], "k": 128, "n": (192, 64), "dropouts": dropouts, "gaps": 1}
    clean, p = (make_problem(**mix, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    first, end, _ = p.route.segments[1]
    a0, b0 = p.group.a_rows[1][0], p.group.b_rows[1]
    if where in ("x", "dy"):
        getattr(p, where)[first:end] = float("nan")
    elif where == "a":
        p.group.a_RK[a0 : a0 + 64] = float("nan")
    else:
        for m in range(2):
            p.group.b_RN[m][b0[m] : b0[m] + 32] = float("nan")
    got, expected = p.steps(fused), clean.steps(fused)
    assert any(not value.isfinite().all() for value in got.values())
    for name, cut in {
        "y": (first, end),
        "dx": (first, end),
        "da": (a0, a0 + 64),
        "db0": (b0[0], b0[0] + 32),
        "db1": (b0[1], b0[1] + 32),
    }.items():
        others = torch.ones(len(got[name]), dtype=torch.bool, device="cuda")
        others[cut[0] : cut[1]] = False
        assert torch.equal(got[name][others], expected[name][others]), name


@pytest.mark.parametrize("mix", ["merged and dropout", "rank 64, several items"])
def test_under_a_cuda_graph(make_problem, mix):
    p = make_problem(**MIXES[mix], dtype=torch.bfloat16, device="cuda")
    expected = p.steps(fused)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.steps(fused)
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(captured[name], value) for name, value in expected.items())


def test_the_autograd_function_takes_the_kernels_on_cuda(make_problem):
    p = make_problem(**MIXES["merged and dropout"], dtype=torch.bfloat16, device="cuda")
    expected = p.steps(fused)
    p.zero_grads()
    x = p.x.clone().requires_grad_()
    y = multi_lora_linear(x, p.weight, None, p.group, p.route)
    y.backward(p.dy)
    assert all(torch.equal(a, b) for a, b in zip((y, x.grad, *p.grads), expected.values(), strict=True))


def test_a_thread_that_has_launched_nothing_goes_backward(make_problem):
    p = make_problem(**MIXES["merged and dropout"], dtype=torch.bfloat16, device="cuda")
    x = p.x.clone().requires_grad_()
    y = multi_lora_linear(x, p.weight, None, p.group, p.route)

    def backward():
        return type(y.grad_fn)._forward_cls.backward(y.grad_fn, p.dy)

    backward()  # leaves memory behind, so that the thread asks the driver for none
    expected, found = [grad.clone() for grad in p.grads], []
    p.zero_grads()
    thread = threading.Thread(target=lambda: found.append(backward()))
    thread.start()
    thread.join()
    assert found and all(torch.equal(ours, theirs) for ours, theirs in zip(p.grads, expected, strict=True))


def test_adamw_matches_its_reference():
    gen, size, states = torch.Generator().manual_seed(0), 50_000, []
    values = [
        torch.randn(size, generator=gen),
        torch.randn(size, generator=gen),
        torch.rand(size, generator=gen),
        torch.rand(size, generator=gen),
    ]
    chunks = make_chunks([(0, 9000, 0), (9001, 30_000, 1), (40_000, 5, 2)])
    common = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "clip_scale": 0.5}
    rows = [setting_row(lr=1e-2 * (j + 1), weight_decay=0.1 * j, step=3 + j, finite=j != 2, **common) for j in range(3)]
    for device, step in (("cpu", adamw_reference_), ("cuda", adamw_)):
        state = [v.clone().to(device) for v in values] + [values[0].bfloat16().to(device)]
        step(*state, chunks.to(device), torch.tensor(rows, device=device))
        states.append(state)
    for ours, theirs in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)
