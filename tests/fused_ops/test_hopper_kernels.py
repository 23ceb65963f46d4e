"""The Gluon kernels on the CPU, thread by thread (tests/gluon_on_cpu.py): what the reference computes, no deadlock, no neighbour's NaN."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from gluon_on_cpu import gluon_on_cpu  # noqa: E402
from kernel_tools import interpreted  # noqa: E402

from fused_ops.lora import reference  # noqa: E402
from fused_ops.lora.fp8 import quantise_rows, quantise_weight  # noqa: E402

CASES = {
    "one token": {"lengths": [1], "ranks": [1], "k": 64, "n": (64,)},
    "tiles of one job": {"lengths": [256, 128], "ranks": [16, 40], "k": 192, "n": (512,)},
    "boundaries inside tiles": {"lengths": [100, 0, 77, 140], "ranks": [16, 8, 3, 12], "gaps": 3, "k": 72, "n": (328,)},
    "ranks to 256": {"lengths": [130, 70, 64], "ranks": [1, 256, 40], "k": 136, "n": (200,), "gaps": 1},
    "merged": {"lengths": [150, 90], "ranks": [8, 33], "k": 128, "n": (512, 256, 256), "missing": {(0, 1), (1, 0)}},
    "dropout": {"lengths": [200, 133, 90], "ranks": [16, 8, 100], "k": 256, "n": (256,), "dropouts": [0.1, 0.0, 0.7], "gaps": 1},
    "merged and dropout": {"lengths": [150, 260, 90], "ranks": [8, 33, 16], "k": 320, "n": (192, 64, 64), "dropouts": [0.1, 0.3, 0.0]},
    "two modules and dropout": {"lengths": [256, 130], "ranks": [16, 80], "k": 512, "n": (256, 256), "dropouts": [0.2, 0.1]},
    "not all modules, and dropout": {
        "lengths": [128, 140], "ranks": [16, 16], "k": 256, "n": (64, 64, 64), "dropouts": [0.2, 0.1], "missing": {(0, 1), (1, 0), (1, 2)},
    },
}  # fmt: skip

GRADIENTS = {  # of dS and dB alone: blocks of 64 rows, tiles of 256 columns, two a program
    "rank 16, several items": {"lengths": [700, 256, 64, 333], "ranks": [16, 9, 1, 16], "n": (1104,), "gaps": 5},
    "rank 32, several items": {"lengths": [513, 128, 31], "ranks": [32, 16, 20], "n": (520,), "gaps": 1},
    "rank 64, several items": {"lengths": [600, 300, 130], "ranks": [64, 8, 40], "n": (840,), "gaps": 3},
    "modules that begin anywhere": {"lengths": [300, 70], "ranks": [16, 3], "n": (328, 72, 520), "missing": {(1, 1)}},
    "modules of ranks to 64": {"lengths": [400, 90, 300], "ranks": [50, 8, 16], "n": (264, 520, 8), "missing": {(0, 0), (2, 1), (2, 2)}},
    "a module that nobody targets": {"lengths": [65], "ranks": [16], "n": (256, 256), "missing": {(0, 0)}},
    "one item": {"lengths": [256], "ranks": [64], "n": (512,)},
    "forty jobs": {"lengths": [7 * i % 61 for i in range(40)], "ranks": [1 + 5 * i % 64 for i in range(40)], "n": (136,)},
}


@pytest.fixture(scope="module")
def ops():
    """Return the operators with every kernel that Hopper has of its own, on the CPU; each GEMM has two programs for all its tiles."""
    with gluon_on_cpu():
        from fused_ops.lora.hopper import gemm as hopper_gemm
        from fused_ops.lora.hopper import grad_sb as hopper_grad_sb
        from fused_ops.lora.triton import grad_sb_sums
    hopper_gemm.num_processors = lambda device: 2

    def grad_s_and_b(dy, s, group, route):
        fits = group.max_padded_rank <= hopper_grad_sb.MAX_HOPPER_RANK
        return (hopper_grad_sb.hopper_grad_s_and_b if fits else reference.grad_s_and_b)(dy, s, group, route)

    with interpreted(grad_sb_sums):
        yield SimpleNamespace(
            down=reference.down,
            up=lambda x, weight, bias, s, group, route: hopper_gemm.hopper_gemm(x, weight, bias, s, group, route, backward=False),
            grad_s_and_b=grad_s_and_b,
            grad_x=lambda dy, weight, ds, group, route: hopper_gemm.hopper_gemm(dy, weight, None, ds, group, route, backward=True),
            grad_a=reference.grad_a,
            gemm=hopper_gemm.hopper_gemm,
        )


@contextlib.contextmanager
def poisoned():
    """Fill every torch.empty with NaN, so that an element that a kernel forgets, or should not read, is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_what_the_reference_computes(make_problem, ops, case):
    p = make_problem(**CASES[case])
    expected = p.steps(reference)
    with poisoned():
        found = p.steps(ops)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 2e-6 * value.norm(), name


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_from_one_read(make_problem, ops, case):
    """dS where a job has ranks, and nothing elsewhere; dB added to what is there, all jobs in any number of items."""
    p = make_problem(**GRADIENTS[case], k=16)
    s, before = torch.full((p.route.num_rows, p.group.width), float("nan")), torch.randn(3, 1)
    mine = torch.zeros_like(s, dtype=torch.bool)
    for first, end, adapter in p.route.segments:
        mine[first:end, : p.group.widths[adapter]] = True
    s[mine] = torch.randn(int(mine.sum()))
    found = []
    for grad_s_and_b in (ops.grad_s_and_b, reference.grad_s_and_b):
        for grad, value in zip(p.group.grad_b_RN, before, strict=False):
            grad.fill_(float(value))
        with poisoned():
            found.append((grad_s_and_b(p.dy, s, p.group, p.route), [grad.clone() for grad in p.group.grad_b_RN]))
    (ds, db), (expected_ds, expected_db) = found
    assert ds[~mine].isnan().all()
    torch.testing.assert_close(ds[mine], expected_ds[mine], rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(db, expected_db, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_products_in_8_bits(make_problem, ops, case):
    """Y and dX over the same rounded operands, and LoRA's terms in full."""
    p = make_problem(**CASES[case])
    weight = quantise_weight(p.weight)
    s = reference.down(p.x, p.group, p.route)
    ds = reference.grad_s_and_b(p.dy, s, p.group, p.route)
    for x, copy, term, backward in ((p.x, weight.by_output, s, False), (p.dy, weight.by_input, ds, True)):
        rows = quantise_rows(x)
        with poisoned():
            found = ops.gemm(rows, copy, None, term, p.group, p.route, backward=backward)
        if backward:
            expected = reference.grad_x(rows.float(), copy.float().T.contiguous(), term, p.group, p.route)
        else:
            expected = reference.up(rows.float(), copy.float(), None, term, p.group, p.route)
        assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_a_bias_is_added_once(make_problem, ops):
    p = make_problem(**CASES["tiles of one job"])
    bias, s = torch.randn(p.weight.shape[0]), reference.down(p.x, p.group, p.route)
    torch.testing.assert_close(
        ops.up(p.x, p.weight, bias, s, p.group, p.route), reference.up(p.x, p.weight, bias, s, p.group, p.route), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", ["boundaries inside tiles", "merged and dropout"])
def test_nan_stays_with_its_job(make_problem, ops, case):
    clean, p = (make_problem(**CASES[case]) for _ in range(2))
    first, end, adapter = p.route.segments[1]
    p.x[first:end] = p.dy[first:end] = float("nan")
    expected, found = clean.steps(ops), p.steps(ops)
    rows = torch.ones(p.route.num_rows, dtype=torch.bool)
    rows[first:end] = False
    mine = torch.zeros(len(p.group.a_RK), dtype=torch.bool)
    for row in p.group.a_rows[adapter]:
        mine[row : row + -(-p.group.adapters.ranks[adapter] // 16) * 16] = True
    assert found["y"].isnan().any() and found["da"][mine].isnan().any()
    assert all(torch.equal(found[name][rows], expected[name][rows]) for name in ("y", "dx"))
    assert torch.equal(found["da"][~mine], expected["da"][~mine])
    for m, b_rows in enumerate(zip(*p.group.b_rows, strict=True)):
        b_row, others = b_rows[adapter], torch.ones(len(p.group.b_RN[m]), dtype=torch.bool)
        others[b_row : b_row + -(-p.group.adapters.ranks[adapter] // 16) * 16] = b_row < 0
        assert found[f"db{m}"].isnan().any() == (b_row >= 0)
        assert torch.equal(found[f"db{m}"][others], expected[f"db{m}"][others])


def test_a_step_that_nobody_loads_is_a_deadlock(ops, make_problem, monkeypatch):
    """The emulation itself: a loading warp that leaves a step out is found."""
    import gluon_on_cpu as emulation

    monkeypatch.setattr(emulation, "PATIENCE_S", 0.2)
    p = make_problem(**CASES["tiles of one job"])
    s = reference.down(p.x, p.group, p.route)
    loads = iter(range(1_000_000))
    globals_of_kernel = ops.up.__closure__[0].cell_contents._loader.fn.__globals__
    real = globals_of_kernel["async_load"]
    monkeypatch.setitem(globals_of_kernel, "async_load", lambda *args, **more: next(loads) == 9 or real(*args, **more))
    with pytest.raises(AssertionError, match="nobody arrives"):
        ops.up(p.x, p.weight, None, s, p.group, p.route)
