"""The Triton kernels in Triton's interpreter, on the CPU: float32 and float16 (bf16 products are silently wrong there).

The interpreter is chosen by an environment variable that Triton reads when a kernel is defined, so these cases run in one subprocess.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "one token": {"lengths": [1], "ranks": [1], "k": 64, "n": [48]},
    "an empty segment, gaps, ranks to 256": {"lengths": [100, 0, 77, 140], "ranks": [1, 16, 256, 40], "gaps": 3, "k": 48, "n": [40]},
    "merged": {"lengths": [100, 40, 50], "ranks": [8, 33, 16], "k": 64, "n": [32, 16, 16], "missing": [[0, 1], [1, 0], [2, 1]]},
    "merged and dropout": {
        "lengths": [100, 40, 50], "ranks": [8, 33, 16], "k": 64, "n": [32, 16, 16], "dropouts": [0, 0.3, 0.1], "first_feature": 64
    },
    "rank 16 merged and dropout": {"lengths": [140, 100], "ranks": [16, 12], "k": 72, "n": [264, 40], "dropouts": [0.2, 0.1]},
    "sizes for which there is no TMA": {"lengths": [10, 20], "ranks": [8, 16], "k": 37, "n": [23, 19], "dropouts": [0.1, 0.0]},
    "rank 16, several tiles": {"lengths": [128, 260, 3], "ranks": [16, 8, 16], "k": 80, "n": [520]},
    "several items a job, a cut inner dimension": {"lengths": [1100, 70, 530], "ranks": [16, 40, 3], "k": 1032, "n": [24], "gaps": 2},
    "several items, merged and dropout": {"lengths": [1100, 530], "ranks": [16, 9], "k": 72, "n": [264, 40], "dropouts": [0.2, 0.1]},
    "half precision": {"lengths": [100, 200], "ranks": [8, 16], "k": 136, "n": [264], "dropouts": [0.1, 0.1], "half": True},
    "fp8": {"lengths": [100, 0, 77, 140], "ranks": [1, 16, 256, 40], "gaps": 3, "k": 272, "n": [264], "fp8": True},
    "fp8 merged and dropout": {
        "lengths": [100, 40, 50], "ranks": [8, 33, 16], "k": 64, "n": [32, 16, 16], "dropouts": [0, 0.3, 0.1], "fp8": True
    },
    "fp8, sizes for which there is no TMA": {"lengths": [10, 20], "ranks": [8, 16], "k": 37, "n": [23, 19], "fp8": True},
    "fp8, rank 16, several tiles": {"lengths": [128, 260, 3], "ranks": [16, 8, 16], "k": 80, "n": [528], "fp8": True},
    "forty jobs": {"lengths": [i % 9 for i in range(40)], "ranks": [1 + i % 20 for i in range(40)], "k": 24, "n": [24]},
}  # fmt: skip

PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch
from conftest import build_problem
from fused_ops.lora import fused, reference
from fused_ops.lora.fp8 import quantise_rows, quantise_weight
from kernel_tools import setting_row
from fused_ops.elementwise.adamw import adamw_, make_chunks

torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
torch.utils.deterministic.fill_uninitialized_memory = True
fused.quantise_rows = lambda x, backend, factors: quantise_rows(x, "reference", factors)  # the interpreter rounds to fp8 wrongly

results = {}
for name, case in json.loads(sys.stdin.read()).items():
    half, fp8 = case.pop("half", False), case.pop("fp8", False)
    case["missing"] = {tuple(pair) for pair in case.get("missing", ())}
    p = build_problem(**case, dtype=torch.float16 if half else torch.float32)
    p.weight = quantise_weight(p.weight) if fp8 else p.weight
    ours, theirs = p.steps(fused), p.steps(reference)
    results[name] = {k: float((ours[k] - theirs[k]).norm() / (theirs[k].norm() + 1e-30)) for k in ours}
    if name in ("merged and dropout", "fp8 merged and dropout"):
        clean, (first, end, _) = ours, p.route.segments[1]
        p.x[first:end] = float("nan")
        p.dy[first:end] = float("nan")
        dirty = p.steps(fused)
        others = torch.ones(len(p.x), dtype=torch.bool)
        others[first:end] = False
        apart = all(torch.equal(clean[k][others], dirty[k][others]) for k in ("y", "dx"))
        results["isolation of " + name] = bool(apart and dirty["y"].isnan().any())
        rows = torch.ones(len(dirty["da"]), dtype=torch.bool)
        rows[p.group.a_rows[1][0] : p.group.a_rows[1][2] + 48] = False
        results["isolation of gradients of " + name] = bool(torch.equal(clean["da"][rows], dirty["da"][rows]) and dirty["da"].isnan().any())
gen = torch.Generator().manual_seed(0)
x = torch.randn(40, 300, generator=gen) * torch.logspace(-30, 30, 40)[:, None]
x[3], x[4], x[5, 7], x[6, 8] = 0.0, 448.0, float("nan"), float("inf")
ours, theirs = (quantise_rows(x, backend).scales for backend in ("triton", "reference"))
results["fp8 scales"] = torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0)) and int(ours.isnan().sum()) == 2
base = [torch.rand(9000, generator=gen) for _ in range(4)]
common = {'lr': 0.1, 'beta1': 0.9, 'beta2': 0.99, 'epsilon': 1e-8, 'weight_decay': 0.1, 'clip_scale': 0.5, 'step': 3}
rows = [setting_row(finite=ok, **common) for ok in (True, False)]
states = []
for backend in ("triton", "reference"):
    states.append([v.clone() for v in base] + [base[0].half()])
    adamw_(*states[-1], make_chunks([(0, 5000, 0), (5001, 3000, 1)]), torch.tensor(rows), backend=backend)
results["adamw"] = {"largest": max(float((a.float() - b.float()).abs().max()) for a, b in zip(*states, strict=True))}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    triton = pytest.importorskip("triton")
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) > (3, 6):
        pytest.skip("the interpreter of Triton 3.9 refuses scalar masks; checked on 3.6, which torch 2.11 brings")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROGRAM, str(root), str(Path(__file__).parent), str(root / "tests")]
    done = subprocess.run(
        command,
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*CASES, "adamw"])
def test_kernels_match_the_reference(results, case):
    limit = 4e-3 if CASES.get(case, {}).get("half") else 1e-5
    assert all(error <= limit for error in results[case].values()), results[case]


@pytest.mark.parametrize("case", ["merged and dropout", "fp8 merged and dropout"])
def test_nan_stays_with_its_job(results, case):
    assert results[f"isolation of {case}"] and results[f"isolation of gradients of {case}"]


def test_rounding_to_fp8_finds_the_scales_of_its_twin(results):
    assert results["fp8 scales"]
