"""Time RMSNorm, rotary embedding and SwiGLU as GB/s beside a copy of as many bytes, and beside their references, eager and compiled.

    python -m scripts.bench.elementwise                      all shapes at 8192 rows
    python -m scripts.bench.elementwise --models 8B --rows 2048 4096

Bytes are those that must move (the kernels' headers count them): what a reference moves beyond them lowers its GB/s. `both` is forward
and backward; `refill` is a backward that also makes the output again. Everything runs in bf16 under CUDA graphs, in interleaved rounds;
medians, with the 10th and 90th percentiles. Appends one JSON line per case to scripts/bench/results/elementwise.jsonl; refuses to run
when a kernel disagrees with its reference.
"""

from dataclasses import dataclass

import torch

from fused_ops.elementwise import rms_norm, rope, swiglu
from fused_ops.launch.timing import measure
from scripts.bench import rig
from scripts.one_line import whole

EPS = 1e-5
MODELS = {  # hidden size, feed-forward size, query heads, key and value heads, head size, head norms
    "135M": (576, 1536, 9, 3, 64, False),
    "8B": (4096, 14336, 32, 8, 128, False),
    "8B with head norms": (4096, 12288, 32, 8, 128, True),
    "32B": (5120, 27648, 40, 8, 128, False),
    "70B": (8192, 28672, 64, 8, 128, False),
}


@dataclass(frozen=True)
class Case:
    """One operator on one shape: its launchers on fixed tensors, its twin for autograd, and the numbers that each must move."""

    forward: object  # () -> tensors
    backward: object  # (refill: bool) -> tensors, the input's gradient first
    reference: object  # inputs -> outputs
    inputs: tuple
    upstream: tuple
    moved: dict  # candidate -> numbers read and written
    can_refill: bool


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def norm_case(rows, hidden, with_residual):
    x, residual, weight = random(rows, hidden), random(rows, hidden) if with_residual else None, random(hidden)
    dy, dtotal = random(rows, hidden), random(rows, hidden)
    _, total, rstd = rms_norm.forward(x, residual, weight, EPS)
    forward = rows * hidden * (4 if with_residual else 2)
    return Case(
        forward=lambda: rms_norm.forward(x, residual, weight, EPS),
        backward=lambda refill: rms_norm.backward(dy, dtotal, total, weight, rstd, refill),
        reference=lambda x, residual=None: rms_norm.rms_norm_reference(x, weight.to(x.dtype), EPS, residual),
        inputs=(x, residual) if with_residual else (x,),
        upstream=(dy, dtotal),
        moved={"forward": forward, "backward": 4 * rows * hidden, "refill": 5 * rows * hidden},
        can_refill=True,
    )


def rope_case(rows, heads, kv_heads, head_dim, with_norms):
    width = (heads + 2 * kv_heads) * head_dim
    qkv, dqkv = random(rows, width), [random(rows, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    angles = torch.rand(rows, head_dim // 2, device="cuda") * 6.28
    table = angles.cos().bfloat16(), angles.sin().bfloat16()
    norms = (random(head_dim), random(head_dim), EPS) if with_norms else None

    def reference(x):
        wide = norms and (norms[0].to(x.dtype), norms[1].to(x.dtype), EPS)
        return rope.rotate_qkv_reference(x, table, heads, kv_heads, wide)

    return Case(
        forward=lambda: rope.forward(qkv, table, heads, kv_heads, norms),
        backward=lambda refill: (rope.backward(*dqkv, qkv if with_norms else None, table, norms),),
        reference=reference,
        inputs=(qkv,),
        upstream=tuple(dqkv),
        moved={"forward": 2 * rows * width, "backward": (3 if with_norms else 2) * rows * width},
        can_refill=False,
    )


def swiglu_case(rows, ffn):
    gate_up, dy = random(rows, 2 * ffn), random(rows, ffn)
    d_gate_up, y = torch.empty_like(gate_up), torch.empty_like(dy)
    return Case(
        forward=lambda: (swiglu.forward(gate_up),),
        backward=lambda refill: (d_gate_up, swiglu.backward(dy, gate_up, refill, d_gate_up, y)),
        reference=lambda x: (swiglu.swiglu_reference(x),),
        inputs=(gate_up,),
        upstream=(dy,),
        moved={"forward": 3 * rows * ffn, "backward": 5 * rows * ffn, "refill": 6 * rows * ffn},
        can_refill=True,
    )


def cases(model, rows):
    """Yield (operator, Case) of a model's shapes."""
    hidden, ffn, heads, kv_heads, head_dim, with_norms = MODELS[model]
    yield "rms_norm", norm_case(rows, hidden, False)
    yield "rms_norm + residual", norm_case(rows, hidden, True)
    yield "rope of qkv", rope_case(rows, heads, kv_heads, head_dim, with_norms)
    yield "swiglu", swiglu_case(rows, ffn)


def both(function, case):
    """Return what runs a differentiable function forward and backward."""

    def run():
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        return torch.autograd.grad(function(*leaves), leaves, case.upstream)

    return run


def check(name, case):
    """Stop unless the kernels agree with their reference, evaluated in float32."""
    exact = [x.float().requires_grad_() for x in case.inputs]
    outputs = case.reference(*exact)
    grads = torch.autograd.grad(outputs, exact, [dy.float() for dy in case.upstream])
    for ours, theirs in [*zip(case.forward(), outputs, strict=False), (case.backward(False)[0], grads[0])]:
        error = rig.relative_error(ours, theirs)
        assert error < 0.01, f"{name}: the kernel is off by {error:.3g} relative: fix it before timing it"


def measure_case(name, case, rounds):
    """Return GB/s of every candidate as (median, low, high), and the milliseconds they come from."""
    check(name, case)
    moved = {**case.moved, "both": case.moved["forward"] + case.moved["backward"]}
    compiled = torch.compile(case.reference)
    candidates = {
        "forward": case.forward,
        "backward": lambda: case.backward(False),
        "both": lambda: (case.forward(), case.backward(False)),
        "eager both": both(case.reference, case),
        "compiled both": both(compiled, case),
        "eager forward": lambda: case.reference(*case.inputs),
        "compiled forward": lambda: compiled(*case.inputs),
    }
    if case.can_refill:
        candidates["refill"] = lambda: case.backward(True)
    for kind, numbers in moved.items():
        source, target = (torch.empty(numbers // 2, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        candidates[f"copy {kind}"] = lambda source=source, target=target: target.copy_(source)
    times = measure(candidates, rounds)
    rates = {}
    for candidate, (median, low, high) in times.items():
        size = 2 * moved[candidate.split()[-1]]
        rates[candidate] = tuple(round(size / ms / 1e6, 1) for ms in (median, high, low))
    return {
        "gb_per_s": rates,
        "share_of_copy": {kind: round(rates[kind][0] / rates[f"copy {kind}"][0], 3) for kind in moved},
        "times_ms": rig.rounded(times),
    }


def main():
    """Measure the chosen models and append a line per operator."""
    parser = rig.parser(__doc__, "elementwise.jsonl", 20)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="*", type=whole, default=[8192])
    options = rig.options(parser)
    for model in options.models:
        for rows in options.rows:
            for name, case in cases(model, rows):
                line = {"case": f"{name}, {model}, {rows} rows", "operator": name, "model": model, "rows": rows}
                line |= measure_case(name, case, options.rounds)
                shown = " ".join(f"{candidate} {rate:.0f}" for candidate, (rate, *_) in line["gb_per_s"].items())
                rig.keep(options, line, f"{line['case']}: of a copy {line['share_of_copy']}\n    GB/s: {shown}")
                torch.compiler.reset()


if __name__ == "__main__":
    main()
