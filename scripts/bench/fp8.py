"""Time the frozen linear with LoRA over 8-bit operands against the one in bf16, forward and dX, dA and dB included.

    python -m scripts.bench.fp8                      six shapes, p = 0 and 0.1: four jobs of rank 16, 8192 rows

Shapes, problems and timing are those of kernels.py (CUDA graphs, candidates in turn, medians with the 10th and 90th percentiles). The
timed region holds everything, the rounding of X and dY too; the floors are the two products alone, by cuBLAS in bf16 and by
torch._scaled_mm (a scale per row and column, fast accumulation) over operands that are in 8 bits already. `speedup` is bf16 / fp8.
Appends one JSON line per case to scripts/bench/results/fp8.jsonl, with how far Y and dX are from those in bf16; refuses to run when the
kernels disagree with their reference. `megatron-lora tune` first, on a kind of GPU that is new.
"""

from dataclasses import replace

import torch

from fused_ops.launch.timing import measure
from fused_ops.lora import fused
from fused_ops.lora.fp8 import Fp8Matrix, quantise_rows, quantise_weight
from fused_ops.lora.hopper.gemm import hopper_gemm
from fused_ops.lora.triton.gemm import gemm
from scripts.bench import rig
from scripts.bench.kernels import SHAPES, check, problem, steps


def scaled_mm(rows: Fp8Matrix, weight: Fp8Matrix):
    """Return what computes rows weight^T with torch._scaled_mm."""
    scales = rows.scales[:, None].contiguous(), weight.scales[None, :].contiguous()
    return lambda: torch._scaled_mm(rows.values, weight.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def candidates(q, narrow):
    """Return {name: what to time} of one problem in bf16 and in 8 bits."""
    x, dy, weight = quantise_rows(q.x), quantise_rows(q.dy), narrow.weight
    s = fused.down(q.x, q.group, q.route)
    ds = fused.grad_s_and_b(q.dy, s, q.group, q.route)
    term, last = (s, q.group, q.route), (ds, q.group, q.route)
    return {
        "bf16": lambda: steps(fused, q),
        "fp8": lambda: steps(fused, narrow),
        "floor bf16 forward": lambda: q.x @ q.weight.T,
        "floor bf16 dx": lambda: q.dy @ q.weight,
        "floor fp8 forward": scaled_mm(x, weight.by_output),
        "floor fp8 dx": scaled_mm(dy, weight.by_input),
        "piece round X": lambda: quantise_rows(q.x),
        "piece round dY": lambda: quantise_rows(q.dy),
        "piece Y": lambda: hopper_gemm(x, weight.by_output, None, *term, backward=False),
        "piece dX": lambda: hopper_gemm(dy, weight.by_input, None, *last, backward=True),
        "piece Y in plain Triton": lambda: gemm(x, weight.by_output, None, *term, backward=False, dtype=torch.bfloat16),
        "piece dX in plain Triton": lambda: gemm(dy, weight.by_input, None, *last, backward=True, dtype=torch.bfloat16),
        "piece Y without LoRA": lambda: gemm(x, weight.by_output, None, None, None, None, backward=False, dtype=torch.bfloat16),
        "piece dX without LoRA": lambda: gemm(dy, weight.by_input, None, None, None, None, backward=True, dtype=torch.bfloat16),
    }


def case(shape, p, rounds):
    q = problem(shape, p)
    narrow = replace(q, weight=quantise_weight(q.weight))  # the same problem over a weight in 8 bits
    check(narrow)
    errors = [rig.relative_error(a, b) for a, b in zip(steps(fused, narrow), steps(fused, q), strict=True)]
    times = measure(candidates(q, narrow), rounds)
    floors = {kind: times[f"floor {kind} forward"][0] + times[f"floor {kind} dx"][0] for kind in ("bf16", "fp8")}
    return {
        "case": f"{shape}, p = {p:g}", "shape": shape, "p": p, "rows": q.route.num_rows,
        "bf16_ms": times["bf16"][0], "fp8_ms": times["fp8"][0], "speedup": times["bf16"][0] / times["fp8"][0],
        "floor_bf16_ms": floors["bf16"], "floor_fp8_ms": floors["fp8"], "ratio": times["fp8"][0] / floors["fp8"],
        "error_y": errors[0], "error_dx": errors[1],
        "times_ms": rig.rounded(times),
    }  # fmt: skip


def main():
    parser = rig.parser(__doc__, "fp8.jsonl", 20)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = rig.options(parser)
    for shape in options.shapes:
        for p in (0.0, 0.1):
            row = case(shape, p, options.rounds)
            told = f"{shape:12s} p={p} bf16 {row['bf16_ms']:.3f} ms fp8 {row['fp8_ms']:.3f} ms speedup {row['speedup']:.2f} "
            told += f"over the fp8 floor {row['ratio']:.2f} errors {row['error_y']:.3f} {row['error_dx']:.3f}"
            rig.keep(options, row, f"{told}\n    {rig.pieces(row)}")


if __name__ == "__main__":
    main()
