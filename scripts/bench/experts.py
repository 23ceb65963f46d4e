"""Time the experts of one layer of Qwen3-30B-A3B: grouped products against cuBLAS at equal work, and every piece, under CUDA graphs.

The layer is timed frozen, and with adapters of four jobs of r = EXPERT_R on every expert, each of a quarter of the tokens.

    python -m scripts.bench.experts            evenly chosen experts, and a router whose favourites have four times the mean

Equal work: one dense product of as many rows, by a weight of an expert's size. torch._grouped_mm has the same rows and experts. The
fraction of cuBLAS is taken in each round. Appends one JSON line per case to scripts/bench/results/experts.jsonl.
"""

import torch

from fused_ops.experts import fused
from fused_ops.experts.adapters import ExpertGroup, Lora
from fused_ops.experts.layer import ExpertWeights, expert_mlp
from fused_ops.experts.rows_by_job import rows_by_job
from fused_ops.launch.timing import spread, time_rounds
from fused_ops.lora.adapters import AdapterTable
from fused_ops.lora.route import make_route
from scripts.bench import rig

EXPERT_R, JOBS = 4, 4
HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 2048, 768, 128, 8, 8192
PRODUCTS = {"up": (False, "up"), "down": (False, "down"), "d down": (True, "down"), "d up": (True, "up")}  # name: transposed, weight


def problem(skew: float, tokens: int):
    """Return X, the weights, and the choice of a router by whose favour the largest expert has about `skew` times the mean (0: none)."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").mul_(0.02).bfloat16()

    x = random(tokens, HIDDEN) * 50
    weights = ExpertWeights(
        router_EH=random(EXPERTS, HIDDEN), up_EFH=random(EXPERTS, 2 * WIDTH, HIDDEN), down_EHF=random(EXPERTS, HIDDEN, WIDTH),
        top_k=TOP_K, normalised=True,
    )  # fmt: skip
    logits = x @ weights.router_EH.T + torch.linspace(skew, 0, EXPERTS, device="cuda").bfloat16()
    return x, weights, logits


def adapters(dropout: float) -> tuple[ExpertGroup, ExpertGroup]:
    """Return adapters of all jobs on gate and up, and on down."""
    table = AdapterTable(ranks=(EXPERT_R,) * JOBS, scales=(2.0,) * JOBS, dropouts=(dropout,) * JOBS)

    def group(num_in: int, columns: tuple[tuple[int, int], ...]) -> ExpertGroup:
        m = len(columns)
        a = torch.randn(EXPERTS, JOBS * m * EXPERT_R, num_in, device="cuda").mul_(0.02).bfloat16()
        b = [torch.randn(EXPERTS, JOBS * EXPERT_R, stop - start, device="cuda").mul_(0.02).bfloat16() for start, stop in columns]
        return ExpertGroup(
            a_ERK=a,
            b_ERN=tuple(b),
            grad_a_ERK=torch.zeros_like(a, dtype=torch.float32),
            grad_b_ERN=tuple(torch.zeros_like(each, dtype=torch.float32) for each in b),
            columns=columns,
            a_rows=tuple(tuple((job * m + module) * EXPERT_R for module in range(m)) for job in range(JOBS)),
            b_rows=tuple((job * EXPERT_R,) * m for job in range(JOBS)),
            adapters=table,
        )

    return group(HIDDEN, ((0, WIDTH), (WIDTH, 2 * WIDTH))), group(WIDTH, ((0, HIDDEN),))


def case(skew: float, tokens: int, rounds: int) -> dict:
    """Time one router."""
    x, weights, logits = problem(skew, tokens)
    choice, route = fused.choose(logits, TOP_K, True)
    counts, ends = route.first_E.diff(), route.first_E[1:].clone()
    x_RH = fused.gather(x, route)
    gate_up = fused.grouped(x_RH, weights.up_EFH, route)
    a = fused.weighted_swiglu(gate_up, route)
    inputs = {"up": x_RH, "down": a, "d down": x_RH, "d up": gate_up}
    leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)
    candidates = {
        "choose": lambda: fused.choose(logits, TOP_K, True),
        "gather": lambda: fused.gather(x, route),
        "swiglu": lambda: fused.weighted_swiglu(gate_up, route),
        "swiglu backward": lambda: fused.weighted_swiglu_backward(gate_up.clone(), a, route),
        "combine": lambda: fused.combine(x_RH, route),
        "layer": lambda: torch.autograd.grad(expert_mlp(leaf, weights), leaf, dy),
    }
    segments = [(tokens * job // JOBS, tokens * (job + 1) // JOBS, job) for job in range(JOBS)]
    by_job = make_route(tokens, segments, torch.zeros(tokens, dtype=torch.int32), "cuda")
    for name, p in (("adapted layer", 0.0), ("adapted layer, dropout", 0.1)):
        groups = adapters(p)
        candidates[name] = lambda groups=groups: torch.autograd.grad(expert_mlp(leaf, weights, groups=groups, segments=by_job), leaf, dy)
    candidates |= adapted_pieces(choice, route, by_job, x_RH, gate_up, a, weights)
    for name, (transposed, which) in PRODUCTS.items():
        weight, rows = (weights.up_EFH if which == "up" else weights.down_EHF), inputs[name]
        one, each = (weight[0], weight) if transposed else (weight[0].T, weight.transpose(1, 2))
        candidates |= {
            f"{name} grouped": lambda rows=rows, weight=weight, transposed=transposed: fused.grouped(rows, weight, route, transposed),
            f"{name} cublas": lambda rows=rows, one=one: rows @ one,
            f"{name} torch._grouped_mm": lambda rows=rows, each=each: torch._grouped_mm(rows, each, offs=ends),
        }
        ours, theirs = candidates[f"{name} grouped"](), candidates[f"{name} torch._grouped_mm"]()
        error = rig.relative_error(ours, theirs)
        assert error < 0.01, f"{name}: the kernel is off by {error:.3g} relative: fix it before timing it"
    by_round = time_rounds(candidates, rounds)
    fractions = {
        name: spread([dense / ours for dense, ours in zip(by_round[f"{name} cublas"], by_round[f"{name} grouped"], strict=True)])
        for name in PRODUCTS
    }
    ratios = spread([adapted / frozen for adapted, frozen in zip(by_round["adapted layer"], by_round["layer"], strict=True)])
    return {
        "case": f"{tokens} tokens, skew {skew:g}", "tokens": tokens, "skew": skew, "rows_mean": float(counts.float().mean()),
        "rows_largest": int(counts.max()), "expert_r": EXPERT_R,
        "adapted_over_frozen": round(ratios[0], 4), "fraction_of_cublas": {name: round(value[0], 4) for name, value in fractions.items()},
        "times_ms": rig.rounded({name: spread(each) for name, each in by_round.items()}), "rounds": rounds,
    }  # fmt: skip


def adapted_pieces(choice, route, by_job, x_RH, gate_up, a, weights) -> dict:
    """Return every operator that adapters add, and the products with their terms, to be timed."""
    rows, (up, down) = rows_by_job(route, choice.expert_Tk, by_job), adapters(0.0)
    of_up, of_down = Lora(fused.down(x_RH, up, rows), up, rows), Lora(fused.down(a, down, rows), down, rows)
    return {
        "rows by job": lambda: rows_by_job(route, choice.expert_Tk, by_job),
        "S of up": lambda: fused.down(x_RH, up, rows),
        "S of down": lambda: fused.down(a, down, rows),
        "dS, dB of up": lambda: fused.grad_s_and_b(gate_up, *of_up),
        "dS, dB of down": lambda: fused.grad_s_and_b(x_RH, *of_down),
        "dA of up": lambda: fused.grad_a(x_RH, *of_up),
        "dA of down": lambda: fused.grad_a(a, *of_down),
        "up with adapters": lambda: fused.grouped(x_RH, weights.up_EFH, route, lora=of_up),
        "down with adapters": lambda: fused.grouped(a, weights.down_EHF, route, lora=of_down),
        "d down with adapters": lambda: fused.grouped(x_RH, weights.down_EHF, route, True, of_down),
        "d up with adapters": lambda: fused.grouped(gate_up, weights.up_EFH, route, True, of_up),
    }


def main():
    options = rig.options(rig.parser(__doc__, "experts.jsonl", 20))
    for skew in (0.0, 2.0):
        row = case(skew, TOKENS, options.rounds)
        told = f"{row['case']}: mean {row['rows_mean']:.0f}, largest {row['rows_largest']} rows; of cuBLAS {row['fraction_of_cublas']}"
        told += f"; adapted {row['adapted_over_frozen']} of the frozen layer"
        rig.keep(options, row, f"{told}\n    {rig.pieces(row)}")


if __name__ == "__main__":
    main()
