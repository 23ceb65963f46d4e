"""Whole runs and pieces of attempts beside the way before them, in one process; goes when what won is the only way.

    python -m scripts.bench.try_speed --rows het-s4,2x4096 --ways before,both --rounds 5 --limit-s 200 [--pieces] [--profile]

The frozen model is built once for each kind of weights; every run has new adapters, the same data and plan. Rounds take ways in turns.
"""

import gc
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from scripts.bench import end_to_end  # first: it sets the allocator
from scripts.bench.end_to_end import PROFILED_TOKENS, config_of, during

import torch  # isort: skip

from fused_ops.elementwise import swiglu
from fused_ops.launch.timing import spread, time_rounds
from fused_ops.lora import fused
from fused_ops.lora.fp8 import quantise_rows, quantise_weight
from fused_ops.lora.hopper import gemm as hopper
from fused_ops.lora.route import make_route
from fused_ops.lora.triton import down as lora_down
from fused_ops.lora.triton import grad as lora_grad
from fused_ops.lora.triton.gemm import gemm
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model import linears, loss
from megatron_lora.parallel.process_groups import destroy_parallel
from megatron_lora.training import assemble, train
from scheduling import memory
from scripts.bench.cases import read_options
from scripts.bench.kernel_shares import Profiled
from scripts.bench.kernels import problem
from scripts.bench.stamp import append_line, stamp
from scripts.bench.trained import trained
from scripts.bench.workloads import head, read_workload, take
from scripts.one_line import OneLineParser, numbers, whole

ROWS = {
    "het-s4": "workload=het-s4 jobs=4 ranks=16 completion=1",
    "mixed": "workload=het-s4 jobs=4 ranks=8,16,32,64 dropouts=0,0,0.05,0.05 completion=0.25",
    "2x4096": "workload=16x4096 jobs=1 ranks=16 completion=1",
    "8x1024": "workload=64x1024 jobs=1 ranks=16 completion=1",
    "dropout": "workload=het-s4 jobs=4 ranks=16 dropouts=0.1 completion=0.25",
    "fp8": "workload=4x4096 jobs=4 ranks=16 completion=1 base-weights=fp8",
}
HOPPER = fused.down, fused.grad_a
WAYS = {  # SwiGLU forward and backward in linears, the residual too, LoRA's ranks in 8 bits as one step, bytes of a chunk of logits
    "before": (False, False, False, False, 300e6),
    "forward": (True, False, False, False, 300e6),
    "swiglu": (True, True, False, False, 300e6),
    "add": (False, False, True, False, 300e6),
    "all": (True, True, True, True, 300e6),
    "chunk": (True, True, True, True, 1.1e9),
    "plain": (False, False, False, False, 300e6),  # S and dA with dropout by plain Triton
    "whole": (False, False, False, True, 300e6),
}


def choose(way: str) -> None:
    fused.FORWARD, fused.BACKWARD, linears.ADD_INSIDE, hopper.WHOLE_IN_8_BITS, chunk = WAYS[way]
    memory.LOSS_CHUNK_BYTES = int(chunk)
    fused.down, fused.grad_a = (lora_down.down, lora_grad.grad_a) if way == "plain" else HOPPER


class Kept:
    """Builds a stage of each kind once, and warms up each row and way once."""

    def __init__(self):
        self.stages, self.backends, self.warm, self.now = {}, {}, set(), ("", "")
        self.build, self.choose, self.warm_up = assemble.build_stage, assemble.choose_backends, train.warm_up

    def build_stage(self, *arguments, **options):
        kind = options["base_weights"]
        if kind not in self.stages:
            self.stages[kind] = self.build(*arguments, **options)
        self.stages[kind].set_recompute(options["recompute"], options["activation_offloading"])
        return self.stages[kind]

    def choose_backends(self, config, *arguments):
        kind = config.base_weights
        if kind not in self.backends:
            self.backends[kind] = self.choose(config, *arguments)
        return self.backends[kind]

    def warm_once(self, *arguments, **options):
        if self.now not in self.warm:
            self.warm.add(self.now)
            self.warm_up(*arguments, **options)


def pieces(output: Path, rounds: int, commit: str | None) -> None:
    """Time what the attempts change, under CUDA graphs."""
    found = {}
    up, down = problem("4096->28672", 0.0), problem("14336->4096", 0.0)
    for mix in ((2048,) * 4, (1337, 3011, 2500, 1344)):
        ends = [sum(mix[:job]) for job in range(5)]
        route = make_route(8192, [(ends[job], ends[job + 1], job) for job in range(4)], up.route.row_keys, "cuda")
        up, down = replace(up, route=route), replace(down, route=route)
        s, ds = fused.down(up.x, up.group, up.route), fused.down(down.x, down.group, down.route)
        term, last = (s, up.group, up.route), (ds, down.group, down.route)
        gate_up, y = up.x.new_empty(8192, 28672).normal_(), up.x.new_empty(8192, 14336)

        def forward(together, up=up, term=term, y=y):
            out = hopper.hopper_gemm(up.x, up.weight, None, *term, backward=False, y_TF=y if together else None)
            return out if together else swiglu.forward(out)

        def backward(together, down=down, last=last, gate_up=gate_up):
            dx = hopper.hopper_gemm(down.dy, down.weight, None, *last, backward=True, gate_up=gate_up if together else None)
            return dx if together else swiglu.backward(dx, gate_up, False, d_gate_up=gate_up, y=dx)

        candidates = {
            "gate up, then SwiGLU": lambda run=forward: run(False),
            "gate up with SwiGLU": lambda run=forward: run(True),
            "dX, then SwiGLU": lambda run=backward: run(False),
            "dX with SwiGLU": lambda run=backward: run(True),
            "gate up": lambda up=up, term=term: hopper.hopper_gemm(up.x, up.weight, None, *term, backward=False),
            "dX": lambda down=down, last=last: hopper.hopper_gemm(down.dy, down.weight, None, *last, backward=True),
        }
        found[f"SwiGLU {mix}"] = measured(candidates, rounds)
        del candidates, forward, backward, gate_up, y
        if mix == (2048,) * 4:
            for name, q, kept in (("4096->28672", up, s), ("14336->4096", down, ds)):
                found[f"fp8 {name}"] = measured(in_8_bits(q, kept), rounds)
        torch.cuda.empty_cache()
    del up, down, s, ds, term, last
    found["loss"] = measured(losses(), rounds)
    append_line(output, stamp(None, commit) | {"pieces": found, "rounds": rounds})


def measured(candidates: dict, rounds: int) -> dict:
    """Return {name: (median, 10th, 90th percentile) in us}, and print the medians."""
    times = {name: tuple(round(1000 * t, 1) for t in spread(each)) for name, each in time_rounds(candidates, rounds, 2).items()}
    print("; ".join(f"{name} {us[0]:,.0f}" for name, us in times.items()), flush=True)
    return times


def in_8_bits(q, s) -> dict:
    """Return Y and dX in 8 bits, LoRA's ranks a quarter at a time and as one step."""
    weight, x, dy = quantise_weight(q.weight), quantise_rows(q.x), quantise_rows(q.dy)

    def run(whole, backward):
        hopper.WHOLE_IN_8_BITS = whole
        rows, copy = (dy, weight.by_input) if backward else (x, weight.by_output)
        return hopper.hopper_gemm(rows, copy, None, s, q.group, q.route, backward=backward)

    for backward in (False, True):
        errors = [run(whole, backward).float() for whole in (False, True)]
        error = float((errors[0] - errors[1]).norm() / errors[0].norm())
        print(f"8 bits, {'dX' if backward else 'Y'}: one step and quarters differ by {error:.2g}", flush=True)
    return {
        f"{'dX' if backward else 'Y'}, {'one step' if whole else 'quarters'}": lambda whole=whole, backward=backward: run(whole, backward)
        for backward in (False, True)
        for whole in (False, True)
    }


def losses() -> dict:
    """Return the loss over 8192 rows in chunks of several heights, and its products alone."""
    weight = torch.randn(128256, 4096, device="cuda").mul_(0.02).bfloat16()
    hidden, labels = torch.randn(8192, 4096, device="cuda").bfloat16(), torch.randint(0, 128256, (8192,), device="cuda")
    one = SimpleNamespace(size=lambda: 1)
    whole_head = loss.Head(weight_VH=weight, first_token=0, widest=128256, group=one, sequence_parallel=False)  # type: ignore[arg-type]
    found = {}
    for rows in (1024, 2048, 4096, 8192):
        logits = hidden.new_empty(rows, 128256).normal_()
        found[f"loss, chunks of {rows}"] = lambda rows=rows: loss._in_chunks(hidden, labels, None, whole_head, rows, with_grad=True)
        found[f"logits of {rows}"] = lambda rows=rows, logits=logits: torch.mm(hidden[:rows], weight.t(), out=logits)
        found[f"dh of {rows}"] = lambda logits=logits: torch.mm(logits, weight)
        if rows in (1024, 4096):
            found[f"logits of {rows}, own"] = lambda rows=rows: gemm(hidden[:rows], weight, None, None, None, None, backward=False)
            found[f"dh of {rows}, own"] = lambda logits=logits: gemm(logits, weight, None, None, None, None, backward=True)
    return found


def one_run(options, case, kept: Kept, row: str, way: str, profile: bool = False) -> dict:
    """Train one row one way; return its figures."""
    choose(way)
    kept.now = row, way
    lengths = take(read_workload(options.lengths, case.workload), case.jobs)
    if profile:
        config, profiled = config_of(options, case, head(lengths, PROFILED_TOKENS), 1, "-profile"), Profiled()
        trained(config, around=profiled)
        return {"shares": profiled.shares, "kernels": profiled.kernels}
    config, gauges = config_of(options, case, lengths), {}
    run = trained(config, around=during(gauges))
    peaks = [torch.cuda.max_memory_allocated()]
    found = end_to_end.figures(run, read_architecture(config.base_model), case.adapters, peaks, 989e12)
    keys = ("tokens", "seconds", "tokens_per_s", "ms_per_8192_tokens", "first_loss", "last_loss", "finite", "memory")
    steps = [{key: step.get(key) for key in ("job", "loss", "grad_norm")} for step in run.steps]
    return {key: found[key] for key in keys} | {"gauges": gauges, "steps": steps}


def main() -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=numbers(str), default=("het-s4",))
    parser.add_argument("--ways", type=numbers(str), default=("before", "forward", "swiglu", "all", "chunk"))
    parser.add_argument("--fp8-ways", type=numbers(str), default=("before", "whole", "all"))
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--limit-s", type=float, default=200.0)
    parser.add_argument("--output", type=Path, default=Path("speed.jsonl"))
    parser.add_argument("--commit")
    parser.add_argument("--runs", default="/tmp/speed_runs")
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    start = time.monotonic()
    if chosen.pieces:
        try:
            pieces(chosen.output, 10, chosen.commit)
        except Exception:  # the runs are wanted all the same
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()
        print(f"pieces: {time.monotonic() - start:.0f} s", flush=True)
    words = ["--steps", "1", "--recompute", "none", "--runs", chosen.runs, *(w for row in chosen.rows for w in ("--case", ROWS[row]))]
    options, cases = read_options(words)
    kept, rates, longest = Kept(), {}, 0.0
    torch.cuda.set_device(0)
    parts = mock.patch.multiple(assemble, build_stage=kept.build_stage, choose_backends=kept.choose_backends)
    with parts, mock.patch.object(train, "warm_up", kept.warm_once):
        for i in range(chosen.rounds + 1):  # the first is not counted
            for row, case in zip(chosen.rows, cases, strict=True):
                ways = chosen.fp8_ways if row == "fp8" else chosen.ways
                for way in ways if i % 2 else reversed(ways):
                    if time.monotonic() - start + longest > chosen.limit_s:
                        continue
                    begun = time.monotonic()
                    found = one_run(options, case, kept, row, way)
                    gc.collect()
                    took = time.monotonic() - begun
                    longest = took if i else 0.0
                    if i:
                        rates.setdefault((row, way), []).append(found["tokens_per_s"])
                    append_line(chosen.output, stamp(None, chosen.commit) | {"row": row, "way": way, "round": i} | found)
                    print(f"{i} {row} {way}: {found['tokens_per_s']:,.0f} tokens/s, {took:.1f} s, loss {found['first_loss']}", flush=True)
        if chosen.profile:
            row, case = chosen.rows[0], cases[0]
            ways = chosen.fp8_ways if row == "fp8" else chosen.ways
            for way in (ways[0], ways[-1]):
                found = one_run(options, case, kept, row, way, profile=True)
                append_line(chosen.output, stamp(None, chosen.commit) | {"row": row, "way": way, "profile": found})
                print(way, {kind: round(share, 4) for kind, share in found["shares"].items()}, flush=True)
    for (row, way), each in rates.items():
        middle, first = statistics.median(each), statistics.median(rates[row, next(w for r, w in rates if r == row)])
        told = f"{min(each):,.0f} to {max(each):,.0f}, {len(each)} rounds"
        before = statistics.median(rates.get((row, "before"), [first]))
        print(f"{row:8s} {way:12s} {middle:,.0f} ({told}) {middle / before - 1:+.2%}", flush=True)
    destroy_parallel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
