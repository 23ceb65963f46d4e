"""Time the frozen linear with LoRA over 8-bit operands against the one in bf16, forward and dX, dA and dB included.

    python scripts/bench/fp8.py                      six shapes, p = 0 and 0.1: four jobs of rank 16, 8192 rows
    python scripts/bench/fp8.py --tune               first measures how to cut the products, into fused_ops/gemm_choices.json

Shapes, problems and timing are those of kernels.py (CUDA graphs, candidates in turn, medians with the 10th and 90th percentiles). The
timed region holds everything, the rounding of X and dY too; the floors are the two products alone, by cuBLAS in bf16 and by
torch._scaled_mm (a scale per row and column, fast accumulation) over operands that are in 8 bits already. `speedup` is bf16 / fp8.
Appends one JSON line per case to scripts/bench/results/fp8.jsonl, with how far Y and dX are from those in bf16; refuses to run when the
kernels disagree with their reference.
"""

import argparse
import json
from dataclasses import asdict, replace

import torch
from kernels import ROOT, SHAPES, check, measure, problem, steps
from one_line import OneLineParser, need_gpus, output_file, whole
from stamp import append_line, stamp

from fused_ops import triton_ops
from fused_ops.fp8 import Fp8Matrix, quantise_rows, quantise_weight
from fused_ops.fp8_gemm import fp8_gemm
from fused_ops.gemm_config import CHOICES, GemmConfig, _choices, choice_key

TALL, FLAT = {"inner": 128}, {"inner": 128, "stages": 3, "persistent": True, "flatten": True}
SMALL = {"inner": 128, "columns": 128, "warps": 4, "stages": 3}  # two of them on a multiprocessor: one stores while the other multiplies
CANDIDATES = {  # kind of LoRA term: how the products may be cut
    "none": [FLAT, {**FLAT, "group": 16}, TALL, SMALL],
    "narrow": [TALL, {**TALL, "stages": 3}, {**TALL, "group": 16}, {**TALL, "parts": 4}, SMALL, {**SMALL, "group": 16}],
    "wide": [TALL, {**TALL, "stages": 3}, {**TALL, "group": 16}, {**TALL, "parts": 4}, SMALL, {**SMALL, "group": 16}],
    "dropout": [TALL, {**TALL, "parts": 4}, SMALL, {**SMALL, "group": 16}],
}


def in_8_bits(q):
    """Return the same problem over a weight in 8 bits."""
    return replace(q, weight=quantise_weight(q.weight))


def scaled_mm(rows: Fp8Matrix, weight: Fp8Matrix):
    """Return what computes rows weight^T with torch._scaled_mm."""
    scales = rows.scales[:, None].contiguous(), weight.scales[None, :].contiguous()
    return lambda: torch._scaled_mm(rows.values, weight.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def candidates(q, narrow):
    """Return {name: what to time} of one problem in bf16 and in 8 bits."""
    x, dy, weight = quantise_rows(q.x), quantise_rows(q.dy), narrow.weight
    s = triton_ops.down(q.x, q.group, q.route)
    ds = triton_ops.grad_s_and_b(q.dy, s, q.group, q.route)
    term, last = (s, q.group, q.route), (ds, q.group, q.route)
    return {
        "bf16": lambda: steps(triton_ops, q),
        "fp8": lambda: steps(triton_ops, narrow),
        "floor bf16 forward": lambda: q.x @ q.weight.T,
        "floor bf16 dx": lambda: q.dy @ q.weight,
        "floor fp8 forward": scaled_mm(x, weight.by_output),
        "floor fp8 dx": scaled_mm(dy, weight.by_input),
        "piece round X": lambda: quantise_rows(q.x),
        "piece round dY": lambda: quantise_rows(q.dy),
        "piece Y": lambda: fp8_gemm(x, weight.by_output, None, *term, backward=False, dtype=torch.bfloat16),
        "piece dX": lambda: fp8_gemm(dy, weight.by_input, None, *last, backward=True, dtype=torch.bfloat16),
        "piece Y without LoRA": lambda: fp8_gemm(x, weight.by_output, None, None, None, None, backward=False, dtype=torch.bfloat16),
        "piece dX without LoRA": lambda: fp8_gemm(dy, weight.by_input, None, None, None, None, backward=True, dtype=torch.bfloat16),
    }


def case(shape, p, rounds):
    q = problem(shape, p)
    narrow = in_8_bits(q)
    check(narrow)
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(steps(triton_ops, narrow), steps(triton_ops, q), strict=True)
    ]
    times = measure(candidates(q, narrow), rounds)
    floors = {kind: times[f"floor {kind} forward"][0] + times[f"floor {kind} dx"][0] for kind in ("bf16", "fp8")}
    return {
        "case": f"{shape}, p = {p:g}", "shape": shape, "p": p, "rows": q.route.num_rows,
        "bf16_ms": times["bf16"][0], "fp8_ms": times["fp8"][0], "speedup": times["bf16"][0] / times["fp8"][0],
        "floor_bf16_ms": floors["bf16"], "floor_fp8_ms": floors["fp8"], "ratio": times["fp8"][0] / floors["fp8"],
        "error_y": errors[0], "error_dx": errors[1],
        "times_ms": {name: [round(v, 5) for v in t] for name, t in times.items()},
    }  # fmt: skip


def tune(shape, rounds):
    """Yield (key, the fields of the fastest cut that differ from GemmConfig's) of each product of a shape."""
    for p in (0.0, 0.1):
        q = problem(shape, p)
        weight, s = quantise_weight(q.weight), triton_ops.down(q.x, q.group, q.route)
        for backward, value, matrix in ((False, q.x, weight.by_output), (True, q.dy, weight.by_input)):
            dropout, rows = bool(p) and backward, quantise_rows(value)
            if p and not backward:
                continue
            width = q.group.width if backward and not dropout else q.group.max_padded_rank
            terms = [(width, dropout, (s, q.group, q.route))] + ([] if p else [(0, False, (None, None, None))])
            for term_width, drops, term in terms:
                key = choice_key(*value.shape, len(matrix.values), backward, term_width, drops)
                found = {}
                for fields in CANDIDATES[key.rsplit(", ", 1)[1]]:
                    config = GemmConfig(**fields)
                    found[json.dumps(fields)] = lambda c=config, r=rows, m=matrix, t=term, b=backward: fp8_gemm(
                        r, m, None, *t, b, torch.bfloat16, c
                    )
                times = measure(found, rounds, repeats=3)
                print(key, {name: round(t[0] * 1000) for name, t in times.items()}, flush=True)
                best = asdict(GemmConfig(**json.loads(min(times, key=lambda name: times[name][0]))))
                yield key + ", fp8", {name: value for name, value in best.items() if value != getattr(GemmConfig(), name)}


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rounds", type=whole, default=20)
    parser.add_argument("--commit", help="where the checkout cannot tell it")
    parser.add_argument("--choices", type=output_file, default=CHOICES, help="where --tune writes")
    parser.add_argument("--output", type=output_file, default=ROOT / "scripts/bench/results/fp8.jsonl")
    args = parser.parse_args()
    need_gpus(parser)
    if args.tune:
        choices = json.loads(args.choices.read_text()) if args.choices.exists() else {}
        mine = choices.setdefault(torch.cuda.get_device_name(), {})
        for shape in args.shapes:
            mine.update(tune(shape, max(4, args.rounds // 3)))
        args.choices.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        _choices.cache_clear()
    for shape in args.shapes:
        for p in (0.0, 0.1):
            row = {**stamp(code=args.commit), **case(shape, p, args.rounds)}
            append_line(args.output, row)
            print(
                f"{shape:12s} p={p} bf16 {row['bf16_ms']:.3f} ms fp8 {row['fp8_ms']:.3f} ms speedup {row['speedup']:.2f} "
                f"over the fp8 floor {row['ratio']:.2f} errors {row['error_y']:.3f} {row['error_dx']:.3f}"
            )
            print("    " + " ".join(f"{name.removeprefix('piece ')} {t[0] * 1000:.1f}" for name, t in row["times_ms"].items()), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
