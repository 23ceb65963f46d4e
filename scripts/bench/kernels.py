"""Time the fused kernels against the frozen linear and against plain torch, under CUDA graphs, in interleaved rounds.

    python -m scripts.bench.kernels                      the table: six shapes, p = 0 and 0.1, then mixes of ranks, jobs and lengths
    python -m scripts.bench.kernels --baselines          also plain torch (one adapter, a loop), torch.compile of it, torch._grouped_mm

The timed region holds everything from X and dY to Y, dX and dA, dB added into the float32 arena. The floor is X W^T and dY W alone,
each by the faster of cuBLAS and our own GEMM without LoRA. Every candidate is replayed once per round, in an order drawn anew; a ratio is
taken in each round, since the chip's clock moves from one to the next. Pieces are timed alone, dA too, which runs beside dX in the whole.
Medians, with the 10th and 90th percentiles. Appends one JSON line per case to scripts/bench/results/kernels.jsonl; refuses to run when the
kernels disagree with their reference.
"""

import torch

from fused_ops.launch.timing import spread, time_rounds
from fused_ops.lora import fused, reference
from fused_ops.lora.triton.gemm import gemm
from scripts.bench import rig
from scripts.bench.plain_lora import expression
from tests.fused_ops.conftest import build_problem

SHAPES = {  # name: K, columns of each module, targets of the ratio at p = 0 and 0.1
    "4096->4096": (4096, (4096,), 1.17, 1.24),
    "4096->6144": (4096, (4096, 1024, 1024), 1.14, 1.20),
    "4096->28672": (4096, (14336, 14336), 1.07, 1.10),
    "14336->4096": (14336, (4096,), 1.10, 1.15),
    "5120->5120": (5120, (5120,), 1.09, 1.14),
    "8192->8192": (8192, (8192,), 1.06, 1.09),
}
MIXES = {  # name: ranks, lengths (None: equal shares)
    "ranks 8 16 32 64": ((8, 16, 32, 64), None),
    "32 jobs": ((16,) * 32, None),
    "random lengths": ((16,) * 4, (1337, 3011, 2500, 1344)),
    "rank 128": ((128,) * 4, None),
}


def problem(shape, p, ranks=(16,) * 4, lengths=None, rows=8192):
    k, columns, *_ = SHAPES[shape]
    lengths = lengths or [rows // len(ranks)] * len(ranks)
    return build_problem(list(lengths), list(ranks), k=k, n=columns, dropouts=[p] * len(ranks), dtype=torch.bfloat16, device="cuda")


def steps(ops, q):
    s = ops.down(q.x, q.group, q.route)
    y = ops.up(q.x, q.weight, None, s, q.group, q.route)
    ds = ops.grad_s_and_b(q.dy, s, q.group, q.route)
    dx = ops.grad_x(q.dy, q.weight, ds, q.group, q.route)
    ops.grad_a(q.x, ds, q.group, q.route, after_dx=True)
    return y, dx


def check(q):
    """Stop unless the kernels agree with their reference on this very problem."""
    outs = []
    for ops in (fused, reference):
        q.zero_grads()
        outs.append([*steps(ops, q), *[g.clone() for g in q.grads]])
    for ours, theirs in zip(*outs, strict=True):
        error = rig.relative_error(ours, theirs)
        assert error < 0.02, f"the kernels are off by {error:.3g} relative: fix them before timing them"


def plain(q, segments):
    """Return PEFT's forward and backward in bf16 for the given (first, end, slot), with torch's own dropout; and the forward alone."""
    group, made = q.group, {}
    for _, _, slot in segments:
        for m, (a_row, b_row) in enumerate(zip(group.a_rows[slot], group.b_rows[slot], strict=True)):
            rows = (group.a_RK[a_row:], group.b_RN[m][b_row:])
            made[slot, m] = [each[: group.adapters.ranks[slot]].clone().requires_grad_() for each in rows]

    def forward(x):
        return expression(x, q.weight, None, group, segments, lambda slot, m: made[slot, m])

    def run(fn=forward):
        x = q.x.detach().requires_grad_()
        return torch.autograd.grad(fn(x), [x, *(factor for pair in made.values() for factor in pair)], q.dy)

    return run, forward


def grouped(q):
    """Return a torch._grouped_mm formulation of one module without dropout: three grouped products over the packed rows."""
    group, jobs = q.group, len(q.route.segments)
    r = group.adapters.ranks[0]
    ends = torch.tensor([end for _, end, _ in q.route.segments], dtype=torch.int32, device="cuda")
    a_JRK, b_JRN = group.a_RK.view(jobs, r, -1), group.b_RN[0].view(jobs, r, -1)
    scale = group.adapters.scales[0]

    def run():
        s = torch._grouped_mm(q.x, a_JRK.transpose(1, 2), offs=ends) * scale
        y = (q.x @ q.weight.T) + torch._grouped_mm(s, b_JRN, offs=ends)
        ds = torch._grouped_mm(q.dy, b_JRN.transpose(1, 2), offs=ends) * scale
        db = torch._grouped_mm(s.T, q.dy, offs=ends)
        dx = (q.dy @ q.weight) + torch._grouped_mm(ds, a_JRK, offs=ends)
        return y, dx, db, torch._grouped_mm(ds.T, q.x, offs=ends)

    return run


def candidates(q, baselines):
    s = fused.down(q.x, q.group, q.route)
    ds = fused.grad_s_and_b(q.dy, s, q.group, q.route)
    found = {
        "cublas forward": lambda: q.x @ q.weight.T,
        "cublas dx": lambda: q.dy @ q.weight,
        "own forward": lambda: gemm(q.x, q.weight, None, None, None, None, backward=False),
        "own dx": lambda: gemm(q.dy, q.weight, None, None, None, None, backward=True),
        "fused": lambda: steps(fused, q),
        "piece S": lambda: fused.down(q.x, q.group, q.route),
        "piece Y": lambda: fused.up(q.x, q.weight, None, s, q.group, q.route),
        "piece dS dB": lambda: fused.grad_s_and_b(q.dy, s, q.group, q.route),
        "piece dX": lambda: fused.grad_x(q.dy, q.weight, ds, q.group, q.route),
        "piece dA": lambda: fused.grad_a(q.x, ds, q.group, q.route),
    }
    if baselines:
        one, _ = plain(q, [(0, q.route.num_rows, 0)])
        loop, forward = plain(q, q.route.segments)
        compiled = torch.compile(forward)
        found |= {"torch one adapter": one, "torch loop": loop, "torch.compile loop": lambda: loop(compiled)}
        if len(q.group.columns) == 1 and not q.group.has_dropout:
            found["torch._grouped_mm"] = grouped(q)
    return found


def case(shape, p, mix, baselines, rounds):
    ranks, lengths = MIXES.get(mix, ((16,) * 4, None))
    q = problem(shape, p, ranks, lengths)
    check(q)
    by_round = time_rounds(candidates(q, baselines), rounds)
    times = {name: spread(each) for name, each in by_round.items()}
    fastest = [min((f"cublas {d}", f"own {d}"), key=lambda name: times[name][0]) for d in ("forward", "dx")]
    floors = [sum(pair) for pair in zip(*(by_round[name] for name in fastest), strict=True)]
    ratios = {name: spread([t / f for t, f in zip(each, floors, strict=True)]) for name, each in by_round.items()}
    return {
        "case": f"{shape}, p = {p:g}" + ("" if mix == "equal" else f", {mix}"),
        "shape": shape, "p": p, "mix": mix, "rows": q.route.num_rows, "ranks": ranks, "lengths": lengths, "floor_ms": spread(floors)[0],
        "ratio": ratios["fused"][0], "ratio_low": ratios["fused"][1], "ratio_high": ratios["fused"][2], "rounds": rounds,
        "target": SHAPES[shape][2 if p == 0 else 3] if mix == "equal" else None,
        "ratios": {name: ratio[0] for name, ratio in ratios.items() if name.startswith("torch")},
        "times_ms": rig.rounded(times),
    }  # fmt: skip


def main():
    parser = rig.parser(__doc__, "kernels.jsonl", 40)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--mixes", nargs="*", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--baselines", action="store_true")
    options = rig.options(parser)
    wanted = [(shape, p, "equal", options.baselines) for shape in options.shapes for p in (0.0, 0.1)]
    wanted += [("4096->4096", 0.0, mix, False) for mix in options.mixes]
    for shape, p, mix, baselines in wanted:
        row = {"dtype": "bfloat16", **case(shape, p, mix, baselines, options.rounds)}
        target = f" (target {row['target']})" if row["target"] else ""
        others = " ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        low_high = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        told = f"{shape:12s} p={p} {mix:17s} floor {row['floor_ms']:.3f} ms ratio {row['ratio']:.3f} {low_high}{target} {others}"
        rig.keep(options, row, f"{told}\n    {rig.pieces(row)}")


if __name__ == "__main__":
    main()
