"""Time the experts of one layer of Qwen3-30B-A3B: grouped products against cuBLAS at equal work, and every piece, under CUDA graphs.

    python -m scripts.bench.experts            evenly chosen experts, and a router whose favourites have four times the mean

Equal work: one dense product of as many rows, by a weight of an expert's size. torch._grouped_mm has the same rows and experts. The
fraction of cuBLAS is taken in each round. Appends one JSON line per case to scripts/bench/results/experts.jsonl.
"""

import torch

from fused_ops.experts import fused
from fused_ops.experts.layer import ExpertWeights, expert_mlp
from fused_ops.launch.timing import spread, time_rounds
from scripts.bench import rig

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


def case(skew: float, tokens: int, rounds: int) -> dict:
    """Time one router."""
    x, weights, logits = problem(skew, tokens)
    _, route = fused.choose(logits, TOP_K, True)
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
    return {
        "case": f"{tokens} tokens, skew {skew:g}", "tokens": tokens, "skew": skew, "rows_mean": float(counts.float().mean()),
        "rows_largest": int(counts.max()), "fraction_of_cublas": {name: round(value[0], 4) for name, value in fractions.items()},
        "times_ms": rig.rounded({name: spread(each) for name, each in by_round.items()}), "rounds": rounds,
    }  # fmt: skip


def main():
    options = rig.options(rig.parser(__doc__, "experts.jsonl", 20))
    for skew in (0.0, 2.0):
        row = case(skew, TOKENS, options.rounds)
        told = f"{row['case']}: mean {row['rows_mean']:.0f}, largest {row['rows_largest']} rows; of cuBLAS {row['fraction_of_cublas']}"
        rig.keep(options, row, f"{told}\n    {rig.pieces(row)}")


if __name__ == "__main__":
    main()
