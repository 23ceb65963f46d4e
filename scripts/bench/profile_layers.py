"""Measures what the cost and memory models speak of: seconds and bytes of one layer and of the head, on this device, for a shape.

    python scripts/bench/profile_layers.py --shape qwen2.5-32b --budgets 2048,4096
    python scripts/bench/profile_layers.py --shape llama-3.1-70b --num-layers 4 --stages 18,21,21,20 --cost cost.json
    python scripts/bench/profile_layers.py --shape llama-3.1-8b --tensor 2 --ranks 16,16,16,16

A model of few layers and random weights runs microbatches that differ in tokens, sample lengths and ranks, under every recomputation
policy; a layer's cost is the layers' time over their number. Appends a line to scripts/bench/results/layers.jsonl, which
`end_to_end.py --cost` reads; with --stages also writes the stages' cost model as `megatron-lora plan --cost` takes it. Bytes kept per token
and layer are what is allocated between a forward and its backward. With --tensor N the layers are as narrow as on one of N tensor ranks:
its GEMMs, attention and LoRA kernels, without messages; norms run over all rows, which with sequence parallelism are shared out.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from e2e_base import Base  # noqa: E402
from e2e_options import recompute  # noqa: E402
from gauges import gauged  # noqa: E402
from layer_table import as_plain, fit_error, stages_of, table_name  # noqa: E402
from model_shapes import SHAPES, architecture_of  # noqa: E402
from one_line import OneLineParser, new_file, numbers, output_file, whole  # noqa: E402
from pass_times import features, measure_parts, probe_slots  # noqa: E402
from plain_lora import use_adapters  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402
from synthetic_jobs import SUITE, JobSpecs, make_jobs, read_workload, take  # noqa: E402

from megatron_lora.config.schema import RECOMPUTE, ParallelConfig, RunConfig  # noqa: E402
from megatron_lora.data.collate import collate  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402
from megatron_lora.parallel.process_groups import destroy_parallel  # noqa: E402
from megatron_lora.planning.predict import shape_of  # noqa: E402
from megatron_lora.training.assemble import make_arena  # noqa: E402
from scheduling.cost import CostModel, Device, ModelShape, StageCost, analytic_cost, refine  # noqa: E402

LAYER, HEAD = 0, 1  # "stages" of the fit


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="profile_layers.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    found.add_argument("--num-layers", type=whole, default=4)
    found.add_argument("--tensor", type=whole, default=1, help="measure what one of so many tensor ranks computes")
    found.add_argument("--adapters", default="fused", choices=["fused", "unfused"])
    found.add_argument("--policies", type=numbers(str), default=RECOMPUTE, help="of recomputation: none,cheap,full")
    found.add_argument("--budgets", type=numbers(whole), default=(4096, 8192), help="tokens of the full microbatches that are timed")
    found.add_argument("--ranks", type=numbers(whole), default=(8, 16, 32, 64))
    found.add_argument("--workload", default="het-s4")
    found.add_argument("--lengths", type=Path, default=SUITE)
    found.add_argument("--repeats", type=whole, default=5)
    found.add_argument("--output", type=output_file, default=RESULTS / "layers.jsonl")
    found.add_argument("--stages", type=numbers(whole), help="layers of each stage, for --cost")
    found.add_argument("--recompute", type=recompute, default="cheap", help="of those stages")
    found.add_argument("--cost", type=new_file, help="write the stages' cost model here")
    found.add_argument("--base-weights", default="native", choices=["native", "fp8"])
    found.add_argument("--hardware")
    found.add_argument("--commit")
    return found


def measure(options) -> dict:
    """Return the table of a shape, with the measurements it was fitted to."""
    architecture = architecture_of(options.shape, options.num_layers, options.tensor)
    lengths = take(read_workload(options.lengths, options.workload), len(options.ranks), 1)
    longest = max(tokens for steps in lengths for tokens in steps[0])
    if longest > max(options.budgets):
        raise UserError(f"--budgets: {max(options.budgets)} tokens do not hold the longest sample, which has {longest}")
    specs = JobSpecs(count=len(options.ranks), ranks=options.ranks, dropouts=(0.0,))
    parallel = ParallelConfig(layers_per_stage=(options.num_layers,))
    base = Base(architecture, parallel)
    base.build(_config(options, parallel, specs))
    use_adapters(base.stage, options.adapters)
    jobs = make_jobs(lengths, specs.configs(), architecture.vocab_size, specs.completion)
    arena = make_arena(base.stage, parallel, [job.adapter() for job in jobs])
    for slot, job in enumerate(jobs):
        arena.initialise(slot, job.step_samples.seed)
    slots = [slot for budget in options.budgets for slot in probe_slots(lengths, budget)]
    load = partial(collate, jobs=[job.step_samples for job in jobs], multiple=1, device=base.device)
    shape = shape_of(architecture)
    layers, heads, kept, listed = {}, [], {}, []
    for policy in options.policies:
        base.stage.set_recompute(policy)
        body, head, bytes_per_token = measure_parts(
            base.stage, slots, load, lambda slot: features(slot, lengths, options.ranks), options.repeats
        )
        model = CostModel(analytic_cost(shape, base.model, (1, 0), recompute=policy).stages)
        layers[policy] = as_plain(refine(model, body).stages[LAYER])
        heads += head
        kept[policy] = bytes_per_token
        listed += [[policy, m.stage, m.backward, m.tokens, m.squares, m.rank_tokens, m.seconds] for m in body + head]
        print(f"  {policy}: " + ", ".join(f"{m.tokens:.0f} tokens {m.seconds * 1e3:.3f} ms" for m in body[:4]), flush=True)
    head_cost = refine(_head_guess(shape, base.model), heads).stages[HEAD]
    return {"layer": layers, "head": as_plain(head_cost), "kept_bytes_per_token": kept, "measurements": listed}


def _head_guess(shape: ModelShape, device: Device) -> CostModel:
    """Return the analytic cost with terms for all that a head may take: launches too, and something in its backward."""
    body, head = analytic_cost(shape, device, (1, 0)).stages
    forward = dataclasses.replace(head.forward, fixed=device.layer_launch_s)
    backward = dataclasses.replace(forward, per_token=0.02 * forward.per_token)
    return CostModel((body, StageCost(forward, backward)))


def _config(options, parallel: ParallelConfig, specs: JobSpecs) -> RunConfig:
    return RunConfig(
        base_model=options.shape,
        output_dir=".",
        parallel=parallel,
        microbatch_tokens=max(options.budgets),
        recompute="none",
        base_weights=options.base_weights,
        load_weights=False,
        jobs=specs.configs(),
    )


def main(arguments: list[str]) -> int:
    """Measure a shape, keep the table, and write the stages' cost model where it is asked for."""
    options = parser().parse_args(arguments)
    if (options.stages is None) != (options.cost is None):
        parser().error("--stages and --cost go together")
    if options.stages and not isinstance(options.recompute, str) and len(options.recompute) != sum(options.stages):
        parser().error(f"--recompute: is of {len(options.recompute)} layers, --stages of {sum(options.stages)}")
    heads = SHAPES[options.shape]["num_key_value_heads"]
    if heads % options.tensor:
        parser().error(f"--tensor: {options.shape} has {heads} heads of keys and values, which {options.tensor} ranks cannot share")
    if unknown := set(options.policies) - set(RECOMPUTE):
        parser().error(f"--policies: {unknown.pop()!r} is none of {', '.join(RECOMPUTE)}")
    try:
        with gauged(torch.cuda.is_available()) as gauges:
            table = measure(options)
    except UserError as error:
        print(f"profile_layers.py: {error}", file=sys.stderr)
        return 2
    print(f"  the fitted costs are {fit_error(table):.1%} off the timings, on average", flush=True)
    kind = {name: getattr(options, name) for name in ("shape", "base_weights", "tensor", "adapters")}
    names = {"case": table_name(**kind), **kind, "num_layers": options.num_layers}
    settings = {"budgets": options.budgets, "ranks": options.ranks, "workload": options.workload, "repeats": options.repeats}
    append_line(options.output, names | stamp(options.hardware, options.commit) | {"settings": settings, "gauges": gauges} | table)
    if options.cost is not None:
        model = stages_of(table, options.stages, options.recompute)
        options.cost.write_text(json.dumps(model.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        destroy_parallel()
    sys.exit(status)
