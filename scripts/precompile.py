"""Compiles, without a GPU, the LoRA kernels that benchmarks and GPU tests run on a Hopper GPU, and leaves them in Triton's cache.

    TRITON_CACHE_DIR=cache python -m scripts.precompile [kernels] [end_to_end] [experts] [tests]

Carried to the GPU machine (the same Triton and Python there; of each kernel the .json and .cubin files are enough), the cache saves minutes
of compilation. What a benchmark launches is launched here on CPU tensors of the same shapes, which nobody fills, against a driver that
only compiles.
"""

import ast
import contextlib
import time
from pathlib import Path
from unittest import mock

import torch

from fused_ops.launch import early_launch
from fused_ops.lora import fused
from fused_ops.lora.adapters import AdapterTable
from fused_ops.lora.fp8 import DTYPE, quantise_rows, quantise_weight
from fused_ops.lora.nf4 import quantise_nf4
from fused_ops.lora.route import make_route
from fused_ops.lora.triton.gemm import gemm
from fused_ops.lora.triton.unpack import unpack
from scripts.bench.kernels import MIXES, SHAPES
from scripts.one_line import OneLineParser
from tests.fused_ops.conftest import build_problem
from tests.stand_in_gpu import compiling

ROOT = Path(__file__).resolve().parents[1]

ROWS = 8192
LAYERS = {"llama-3.1-8b": [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]}
LAYERS["qwen2.5-32b"] = [(5120, (5120, 1024, 1024)), (5120, (5120,)), (5120, (27648, 27648)), (27648, (5120,))]
LAYERS["llama-3.1-8b, tensor 2"] = [(4096, (2048, 512, 512)), (2048, (4096,)), (4096, (7168, 7168)), (7168, (4096,))]
LAYERS["qwen3-30b-a3b"] = [(2048, (4096, 512, 512)), (4096, (2048,))]  # attention
LAYERS["smollm2"] = [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]
JOBS = [((16,) * 4, (0.0,) * 4), ((8, 16, 32, 64), (0.0, 0.0, 0.05, 0.05)), ((4, 8, 16, 32), (0.0,) * 4)]  # ranks, dropouts


def launch(problem, weight=None) -> None:
    """Launch every operator of a linear, forward and backward; that of dA also as it is where something lies between dX and it."""
    problem.steps(fused, weight)
    fused.grad_a(problem.x, problem.x.new_empty(problem.route.num_rows, problem.group.width), problem.group, problem.route)


def stretched(k, columns, ranks, dropouts, rows=ROWS, lengths=None):
    """Return a problem whose activations have `rows` rows that nobody fills, of equal shares or of the given lengths."""
    problem = build_problem([16] * len(ranks), list(ranks), k=k, n=columns, dropouts=list(dropouts), dtype=torch.bfloat16)
    ends = [sum((lengths or [rows // len(ranks)] * len(ranks))[:job]) for job in range(len(ranks) + 1)]
    segments = [(first, end, job) for job, (first, end) in enumerate(zip(ends, ends[1:], strict=False))]
    problem.x, problem.dy = torch.empty(rows, k, dtype=torch.bfloat16), torch.empty(rows, sum(columns), dtype=torch.bfloat16)
    problem.route = make_route(rows, segments, torch.zeros(rows, dtype=torch.int32), "cpu")
    return problem


def kernels() -> None:
    """What kernels.py launches."""
    for k, columns, *_ in SHAPES.values():
        for p in (0.0, 0.1):
            problem = stretched(k, columns, (16,) * 4, (p,) * 4)
            launch(problem)
            for value, backward in ((problem.x, False), (problem.dy, True)):
                gemm(value, problem.weight, None, None, None, None, backward=backward)
    for ranks, lengths in MIXES.values():
        launch(stretched(4096, (4096,), ranks, (0.0,) * len(ranks), lengths=lengths))


def end_to_end() -> None:
    """What end_to_end.py and loss_curves.py launch, in 16 bits and over a base in 8 bits."""
    for layers in LAYERS.values():
        for ranks, dropouts in JOBS:
            for k, columns in layers:
                problem = stretched(k, columns, ranks, dropouts)
                launch(problem)
                launch(problem, quantise_weight(problem.weight, "reference"))
    for matrix in (quantise_nf4(torch.zeros(256, 256)), quantise_rows(torch.zeros(256, 256), "reference")):
        for dtype, transposed in ((torch.bfloat16, False), (DTYPE, False), (DTYPE, True)):
            for factors in (None, torch.ones(256)):
                unpack(matrix, factors, torch.empty(256, 256, dtype=dtype), transposed)


def experts() -> None:
    """What adapters on the experts of a Qwen3-30B-A3B launch, of few experts and rows."""
    from fused_ops.experts import fused as of_experts
    from fused_ops.experts.adapters import ExpertGroup, Lora
    from fused_ops.experts.route import ExpertRoute
    from fused_ops.experts.rows_by_job import RowsByJob

    def zeros(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    num, rows, hidden, width = 4, 128, 2048, 768
    places, table = zeros(64, 2, dtype=torch.int32), zeros(num, 1, 2, dtype=torch.int32)
    route = ExpertRoute(weight_R=places, place_Tk=places, first_E=places, tiles=places)
    by_job = RowsByJob(bounds=table, keys_R=table.new_zeros(rows), segments=table.new_zeros(1, 4), adapters=(0,))
    for r, p in ((4, 0.0), (4, 0.1), (16, 0.0), (16, 0.1)):
        for num_in, columns in ((hidden, ((0, width), (width, 2 * width))), (width, ((0, hidden),))):
            a, b = zeros(num, len(columns) * r, num_in), tuple(zeros(num, r, stop - start) for start, stop in columns)
            group = ExpertGroup(
                a_ERK=a,
                b_ERN=b,
                grad_a_ERK=a.float(),
                grad_b_ERN=tuple(each.float() for each in b),
                columns=columns,
                a_rows=(tuple(r * module for module in range(len(columns))),),
                b_rows=((0,) * len(columns),),
                adapters=AdapterTable(ranks=(r,), scales=(1.0,), dropouts=(p,)),
            )
            x, dy = zeros(rows, num_in), zeros(rows, columns[-1][1])
            weight = zeros(num, dy.shape[1], num_in)
            lora = Lora(of_experts.down(x, group, by_job), group, by_job)
            of_experts.grouped(x, weight, route, lora=lora)
            of_experts.grouped(dy, weight, route, True, lora._replace(s_RW=of_experts.grad_s_and_b(dy, *lora)))
            of_experts.grad_a(x, *lora)


def tests() -> None:
    """What tests/fused_ops/gpu/test_kernels.py launches for its mixes."""
    tree = ast.parse((ROOT / "tests/fused_ops/gpu/test_kernels.py").read_text())
    values = next(node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MIXES")
    for mix in eval(compile(ast.Expression(values), "MIXES", "eval")).values():
        launch(build_problem(**mix, dtype=torch.bfloat16))


def main() -> None:
    """Compile what is named on the command line, else everything."""
    known = {"kernels": kernels, "end_to_end": end_to_end, "experts": experts, "tests": tests}
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(known)}; default: all")
    chosen = parser.parse_args().what or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no {unknown[0]!r}; choose among {', '.join(known)}")
    on_a_gpu = (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: "a Hopper GPU"),
        mock.patch.object(early_launch, "starts_early", lambda device: True),
    )
    with contextlib.ExitStack() as stack:
        for patch in on_a_gpu:
            stack.enter_context(patch)
        compiled = stack.enter_context(compiling())
        for name in chosen:
            start = time.perf_counter()
            known[name]()
            print(f"{name}: {len(compiled)} kernels so far, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
