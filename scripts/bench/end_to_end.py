"""Real tokens per second of whole runs: the trainer's executor, optimizers, messages and plans over a frozen model of random weights.

    python scripts/bench/end_to_end.py --ranks 8,16,32,64 --dropouts 0,0,0.05,0.05 --case "" --case "adapters=none" --case "policy=flush"
    torchrun --nproc-per-node 2 scripts/bench/end_to_end.py --shape qwen2.5-32b --pipeline 2 --workload het-s2 --budget 4096 --calibrate

One launch builds the base once and runs its cases one after another (--rounds: over and over); each appends a JSON line to
scripts/bench/results/end_to_end.jsonl as soon as it is done. Real tokens: padding is not counted; fill, drain and optimizer are.
Warm-up is outside the timed region. MFU: 4 FLOPs per token and parameter (all but the embedding), of the devices' dense peak. A bubble
is the share of a run in which a stage does no work, by CUDA events; exposed communication the share in which it waits for a message
that was already sent.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from megatron_lora.environment import allocator_settings  # noqa: E402

os.environ.update(allocator_settings(os.environ))  # before anything imports torch

from e2e_options import Case, check, layout_name, parallel_of, read_options  # noqa: E402
from model_shapes import architecture_of  # noqa: E402
from synthetic_jobs import read_workload  # noqa: E402

from megatron_lora.config.schema import ParallelConfig  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run all cases; returns the exit status."""
    try:
        options, cases = read_options(arguments)
        parallel = parallel_of(options)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != parallel.world_size:
            raise UserError(f"the layout {layout_name(options)} needs {parallel.world_size} ranks, {started} were started; use torchrun")
        launch(options, cases, parallel)
        from megatron_lora.parallel.process_groups import destroy_parallel

        destroy_parallel()
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"end_to_end.py: {error}", file=sys.stderr)
        return 2


def launch(options: Namespace, cases: list[Case], parallel: ParallelConfig) -> None:
    """Build the base and run the cases on it, as one rank of the layout."""
    from e2e_base import Base
    from e2e_report import run_case

    architecture = architecture_of(options.shape, options.num_layers)
    workloads = [read_workload(options.lengths, case.workload) for case in cases]
    check(options, cases, workloads)
    base = Base(architecture, parallel, memory_gb=options.memory_gb)
    shares = [case.jobs.completion for case in cases]
    configs = base.resolve([case.config(options.shape, parallel) for case in cases], workloads, shares)
    each = list(enumerate(zip(cases, configs, workloads, strict=True), 1))
    for turn in range(1, options.rounds + 1):
        for number, (case, config, workload) in each:
            base.say(f"case {number} of {len(cases)}{f', round {turn}' if options.rounds > 1 else ''}: {case.name}")
            run_case(base, options, case, config, workload, turn)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
