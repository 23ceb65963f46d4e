"""Loss curves of the same jobs in bf16: the fused kernels, their reference, and transformers + peft, which runs several times.

    python scripts/fetch_model.py models/SmolLM2-135M-Instruct && python scripts/make_tasks.py data/quickstart
    python scripts/bench/loss_curves.py configs/quickstart.yaml [--fp8] [--processes 8]

All start from the same adapters (ours, exported as PEFT directories) and take the same samples in the same steps, without dropout. The
runs of peft differ only in the order of samples inside a global batch, and so in which of them share a padded microbatch: their
spread is what bf16 leaves open. One more run of peft, in float32, says who is right where they part. Appends a line to
scripts/bench/results/loss_curves.jsonl, with all losses, and draws them.
"""

import argparse
import dataclasses
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from e2e_base import Base  # noqa: E402
from e2e_run import execute  # noqa: E402
from hf_peft import PeftTrainer  # noqa: E402
from one_line import OneLineParser, output_file, whole  # noqa: E402
from plain_lora import use_adapters  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402

from megatron_lora.config.schema import ParallelConfig, RunConfig, load_config  # noqa: E402
from megatron_lora.data.steps import target_share  # noqa: E402
from megatron_lora.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402
from megatron_lora.huggingface.adapter_files import write_adapter  # noqa: E402
from megatron_lora.huggingface.architecture import read_architecture  # noqa: E402
from megatron_lora.huggingface.hub import resolve_base_model  # noqa: E402
from megatron_lora.model.adapter_arena import Arena  # noqa: E402
from megatron_lora.parallel.process_groups import destroy_parallel  # noqa: E402
from megatron_lora.planning.plan_feed import PlanSettings  # noqa: E402
from megatron_lora.planning.predict import planner_cost  # noqa: E402
from megatron_lora.training.assemble import make_arena  # noqa: E402
from megatron_lora.training.jobs import TrainingJob, read_jobs  # noqa: E402
from megatron_lora.training.optimizer import JobOptimizer  # noqa: E402
from megatron_lora.training.saving import adapter_of  # noqa: E402
from megatron_lora.training.snapshots import join_shards  # noqa: E402

Curves = dict[str, list[list[float]]]  # name of the run -> [job][step]


def alone(config: RunConfig, num_steps: int) -> RunConfig:
    """Return a config for one process, its jobs without dropout and of so many steps."""
    jobs = tuple(dataclasses.replace(job, lora_dropout=0.0, max_steps=num_steps) for job in config.jobs)
    return dataclasses.replace(config, parallel=ParallelConfig(), recompute="cheap", jobs=jobs)


def ours(base: Base, config: RunConfig, jobs: Sequence[TrainingJob], adapters: str, begun: Path | None = None) -> list[list[float]]:
    """Train by this project; return losses [job][step]. The adapters that it begins with go to the directory `begun`, if any."""
    base.build(config)
    use_adapters(base.stage, adapters)
    arena = make_arena(base.stage, base.parallel, [job.adapter() for job in jobs])
    for slot, job in enumerate(jobs):
        arena.initialise(slot, job.step_samples.seed)
        if begun is not None:
            export(arena, slot, job, config, begun / job.config.name)
    share = target_share((job.step_samples.samples, job.step_samples.steps) for job in jobs)
    cost = planner_cost(config, base.architecture, base.model, share)
    settings = PlanSettings(num_stages=1, num_replicas=1, capacity=int(config.microbatch_tokens), delay=0, cost=cost)
    optimizers = [JobOptimizer(arena, slot, job.optimizer()) for slot, job in enumerate(jobs)]
    outcome = execute(base, jobs, optimizers, "ours", settings, cost)
    losses = [[0.0] * job.num_steps for job in jobs]
    for job, step, loss in outcome.losses:
        losses[job][step] = loss
    return losses


def export(arena: Arena, slot: int, job: TrainingJob, config: RunConfig, directory: Path) -> None:
    """Write a job's adapter as it is now as a PEFT directory."""
    flat = torch.cat([arena.view(factor, arena.master).reshape(-1) for factor in arena.factors[slot]]).cpu()
    write_adapter(directory, adapter_of(job.config, join_shards([arena.factors[slot]], [flat])), config.base_model)


def peft_losses(
    model_dir: Path, adapter: Path, job: TrainingJob, device: torch.device, dtype: torch.dtype, batch: int, seed: int
) -> list[float]:
    """Train one job by transformers + peft from an adapter, samples of a global batch in an order of `seed`; return each step's loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").to(device)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainer = PeftTrainer(model, job.config, device, job.num_steps, autocast=dtype == torch.bfloat16)
    order, losses = random.Random(seed), []
    for step in job.step_samples.steps:
        samples = [job.step_samples.samples[index] for _, index in step]
        if seed:
            order.shuffle(samples)
        losses.append(trainer.step([samples[first : first + batch] for first in range(0, len(samples), batch)]))
    return torch.stack(losses).tolist()


def side_by_side(work: Callable, arguments: Sequence[tuple], processes: int) -> list:
    """Return work(*each) of all arguments, in so many processes: small models leave a GPU idle between launches."""
    if processes == 1:
        return [work(*each) for each in arguments]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, *zip(*arguments, strict=True)))


def compare(curves: Curves, theirs: list[list[list[float]]], exact: list[list[float]], names: Sequence[str]) -> dict:
    """Return, per run and job, its largest distances: from the mean of peft's runs, from ours by the reference, from the exact curve.

    Beside them stands the largest spread of peft's runs in any step. `within`: the last two are at most twice that; where peft in bf16 is
    farther from float32 than its own orders are from one another, it is no measure. `peft` is the mean of its runs.
    """
    means = [[sum(step) / len(step) for step in zip(*(repeat[job] for repeat in theirs), strict=True)] for job in range(len(names))]
    found: dict[str, dict] = {}
    for run, losses in (curves | {"peft": means}).items():
        for job, name in enumerate(names):
            spread = max(max(step) - min(step) for step in zip(*(repeat[job] for repeat in theirs), strict=True))
            from_peft, from_reference, from_exact = (farthest(losses[job], other[job]) for other in (means, curves["reference"], exact))
            found.setdefault(run, {})[name] = {
                "from_peft": from_peft,
                "from_reference": from_reference,
                "from_exact": from_exact,
                "spread": spread,
                "within": max(from_reference, from_exact) <= 2 * spread,
            }
    return found


def farthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest distance of two curves in any step."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def draw(curves: Curves, theirs: list[list[list[float]]], exact: list[list[float]], names: Sequence[str], path: Path) -> None:
    """Draw a panel per job: the band of peft's runs, the exact curve, and ours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for job, (name, axes) in enumerate(zip(names, figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat, strict=False)):
        steps = range(1, len(theirs[0][job]) + 1)
        every = list(zip(*(repeat[job] for repeat in theirs), strict=True))
        axes.fill_between(steps, [min(s) for s in every], [max(s) for s in every], color="0.8", label=f"peft, {len(theirs)} orders")
        axes.plot(steps, exact[job], color="black", linestyle=":", linewidth=1.8, label="peft in float32")
        for run, losses in curves.items():
            axes.plot(steps, losses[job], linewidth=1.2, label=run)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def picture(text: str) -> Path:
    """Read the path of a figure."""
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} ends in none of .png, .svg, .pdf")
    return output_file(text)


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="loss_curves.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("config", type=Path, nargs="?", default=ROOT / "configs/quickstart.yaml")
    found.add_argument("--model", help="in place of the config's base_model")
    found.add_argument("--steps", type=whole, default=30)
    found.add_argument("--budget", type=whole, default=2048)
    found.add_argument("--orders", type=whole, default=3, help="runs of peft")
    found.add_argument("--batch", type=whole, default=4, help="samples of peft's microbatch")
    found.add_argument("--processes", type=whole, default=1, help="in which runs of peft go side by side")
    found.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    found.add_argument("--fp8", action="store_true", help="also over a base in 8 bits")
    found.add_argument("--output", type=output_file, default=RESULTS / "loss_curves.jsonl")
    found.add_argument("--figure", type=picture, default=RESULTS / "loss_curves.png")
    found.add_argument("--hardware")
    found.add_argument("--commit")
    return found


def run(options) -> dict:
    """Train everything; keep the line and the figure."""
    overrides = [f"microbatch_tokens={options.budget}", *([f"base_model={options.model}"] if options.model else [])]
    config = alone(load_config(options.config, overrides), options.steps)
    model_dir = resolve_base_model(config.base_model)
    architecture = read_architecture(model_dir)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    base = Base(architecture, config.parallel, model_dir=model_dir, dtype=dtype)
    jobs = read_jobs(config.jobs, load_tokenizer(model_dir), None, architecture.vocab_size)
    share = target_share((job.step_samples.samples, job.step_samples.steps) for job in jobs)
    (config,) = base.resolve([config], [[job.step_samples.lengths() for job in jobs]], [share])
    names, curves = [job.config.name for job in jobs], {}
    with tempfile.TemporaryDirectory() as folder:
        for adapters in ("fused", "reference"):
            curves[adapters] = ours(base, config, jobs, adapters, Path(folder))
            print(f"  {adapters}: last losses {[round(losses[-1], 4) for losses in curves[adapters]]}", flush=True)
        if options.fp8:
            curves["fused, fp8 base"] = ours(base, dataclasses.replace(config, base_weights="fp8"), jobs, "fused")

        kinds = [(base.dtype, seed) for seed in range(options.orders)] + [(torch.float32, 0)]
        runs = [
            (model_dir, Path(folder) / job.config.name, job, base.device, dtype, options.batch, seed)
            for dtype, seed in kinds
            for job in jobs
        ]
        losses = side_by_side(peft_losses, runs, options.processes)
        *theirs, exact = [losses[first : first + len(jobs)] for first in range(0, len(losses), len(jobs))]
    for (dtype, seed), found in zip(kinds, [*theirs, exact], strict=True):
        print(f"  peft, {dtype}, order {seed}: last losses {[round(of_job[-1], 4) for of_job in found]}", flush=True)
    found = compare(curves, theirs, exact, names)
    settings = {"config": str(options.config), "steps": options.steps, "budget": options.budget, "batch": options.batch}
    line = {"case": f"{options.dtype}, {options.steps} steps", **stamp(options.hardware, options.commit), "dtype": options.dtype}
    line |= {"settings": settings, "jobs": names, "compared": found, "ours": curves, "peft": theirs, "exact": exact}
    append_line(options.output, line)
    draw(curves, theirs, exact, names, options.figure)
    for name, of_jobs in found.items():
        print(f"  {name}: largest distances from peft (its spread), the reference, peft in float32:", flush=True)
        for job, v in of_jobs.items():
            print(f"    {job}: {v['from_peft']:.2g} ({v['spread']:.2g}), {v['from_reference']:.2g}, {v['from_exact']:.2g}", flush=True)
    return found


def main(arguments: list[str]) -> int:
    """Run the comparison; returns the exit status."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        print(f"loss_curves.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        destroy_parallel()
    sys.exit(status)
