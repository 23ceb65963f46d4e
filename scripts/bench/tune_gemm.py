"""Measure how to cut each GEMM on this GPU and write the winners to fused_ops/gemm_choices.json (or --output).

    python scripts/bench/tune_gemm.py --rows 8192

Candidates are timed in interleaved rounds under CUDA graphs; see fused_ops/gemm_config.py for what the file means.
"""

import argparse
import json
from dataclasses import asdict

import torch
from kernels import SHAPES, measure, problem
from one_line import OneLineParser, need_gpus, output_file, whole

from fused_ops.gemm_config import CHOICES, GemmConfig, choice_key
from fused_ops.lora_gemm import gemm

FLAT = {"stages": 3, "persistent": True, "flatten": True}
CANDIDATES = [{}, {"stages": 3}, FLAT, {**FLAT, "group": 16}]


def cases(shape, rows):
    """Yield (key, run) of both directions of a shape, without LoRA: with it, hopper_gemm.py has nothing to choose."""
    q = problem(shape, 0.0, rows=rows)
    for backward in (False, True):
        value, cols = (q.dy, q.weight.shape[1]) if backward else (q.x, q.weight.shape[0])

        def run(config, value=value, backward=backward):
            return gemm(value, q.weight, None, None, None, None, backward, config)

        yield choice_key(*value.shape, cols, backward, 0, False), run


def tune(key, run, rounds):
    """Return the fields of the fastest candidate, and print all of them."""
    found = {}
    for fields in CANDIDATES:
        config = GemmConfig(**fields)
        found[json.dumps(fields)] = lambda config=config: run(config)
    times = measure(found, rounds, repeats=3)
    best = min(times, key=lambda name: times[name][0])
    print(key, {name: round(t[0] * 1000) for name, t in times.items()}, flush=True)
    return {name: value for name, value in asdict(GemmConfig(**json.loads(best))).items() if value != getattr(GemmConfig(), name)}


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole, default=8192)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=whole, default=8)
    parser.add_argument("--output", type=output_file, default=CHOICES)
    args = parser.parse_args()
    need_gpus(parser)
    choices = json.loads(args.output.read_text()) if args.output.exists() else {}
    mine = choices.setdefault(torch.cuda.get_device_name(), {})
    for shape in args.shapes:
        for key, run in cases(shape, args.rows):
            mine[key] = tune(key, run, args.rounds)
        torch.cuda.empty_cache()
    args.output.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
