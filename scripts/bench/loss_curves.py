"""Loss curves of the same jobs in bf16: the fused kernels, their reference, and transformers + peft, which runs several times.

    python scripts/fetch_model.py models/SmolLM2-135M-Instruct && python scripts/make_tasks.py data/quickstart
    python -m scripts.bench.loss_curves configs/quickstart.yaml [--processes 8]

All start from the same adapters (peft's, as directories that jobs begin with) and take the same samples in the same steps, without
dropout. The runs of peft differ only in the order of samples inside a global batch, and so in which of them share a padded microbatch:
their spread is what bf16 leaves open. One more run of peft, in float32, says who is right where they part. Appends a line to
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

import torch

from megatron_lora.config.schema import JobConfig, ParallelConfig, RunConfig, load_config
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.parallel.process_groups import destroy_parallel
from megatron_lora.planning.targets import targeted
from megatron_lora.training.jobs import Job, read_jobs
from scripts.bench.hf_peft import PeftTrainer, fresh_adapter
from scripts.bench.stamp import RESULTS, ROOT, append_line, result_options, stamp
from scripts.bench.trained import trained
from scripts.one_line import OneLineParser, ended, output_file, whole

Curves = dict[str, list[list[float]]]  # name of the run -> [job][step]


def alone(config: RunConfig, num_steps: int | None, precision: str, folder: Path) -> RunConfig:
    """Return a config for one process, its jobs without dropout, of `num_steps` steps or their own, beginning with adapters in a folder."""
    changes = {"lora_dropout": 0.0} | ({"max_steps": num_steps} if num_steps else {})
    jobs = tuple(dataclasses.replace(job, **changes, init_adapter=str(folder / job.name)) for job in config.jobs)
    return dataclasses.replace(config, parallel=ParallelConfig(), recompute="cheap", precision=precision, jobs=jobs)


def begin(model_dir: Path, jobs: Sequence[JobConfig], folder: Path) -> None:
    """Write the adapter that each job begins with, as peft makes it from the job's seed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=False, dtype=torch.float32)
    for job in jobs:
        torch.manual_seed(job.seed or 0)
        adapted = fresh_adapter(model, job, False)
        adapted.save_pretrained(folder / job.name)
        model = adapted.unload()


def ours(config: RunConfig, adapters: str, folder: Path) -> list[list[float]]:
    """Train by this project; return losses [job][step]."""
    run = trained(dataclasses.replace(config, output_dir=str(folder)), adapters=adapters)
    assert run is not None
    return [[row["loss"] for row in run.steps if row["job"] == job.name] for job in config.jobs]


def peft_losses(
    model_dir: Path, adapter: Path, job: Job, device: torch.device, dtype: torch.dtype, batch: int, seed: int, nf4: bool = False
) -> list[float]:
    """Train one job by transformers + peft from an adapter, samples of a global batch in an order of `seed`; return each step's loss.

    `nf4`: the base is quantised by bitsandbytes, as QLoRA has it.
    """
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given: dict = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": device}}
    if nf4:
        how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        given["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **how)
    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=False, **given)
    if nf4:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
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
    """Return work(*each) of all arguments, in `processes` processes: small models leave a GPU idle between launches."""
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
            others = {"from_peft": means, "from_reference": curves["reference"], "from_exact": exact}
            line = {key: max(abs(a - b) for a, b in zip(losses[job], other[job], strict=True)) for key, other in others.items()}
            within = max(line["from_reference"], line["from_exact"]) <= 2 * spread
            found.setdefault(run, {})[name] = line | {"spread": spread, "within": within}
    return found


def draw(curves: Curves, theirs: list[list[list[float]]], exact: list[list[float]], names: Sequence[str], path: Path) -> None:
    """Draw a panel per job: the band of peft's runs, the exact curve, and ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    for job, (name, axes) in enumerate(zip(names, figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat, strict=False)):
        steps = range(1, len(theirs[0][job]) + 1)
        every = list(zip(*(repeat[job] for repeat in theirs), strict=True))
        axes.fill_between(steps, [min(s) for s in every], [max(s) for s in every], color="0.8", label=f"peft, {len(theirs)} orders")
        axes.plot(steps, exact[job], color="black", linestyle=":", linewidth=1.8, label="peft in float32")
        for run, losses in curves.items():
            axes.plot(steps, losses[job], linewidth=1.2, label=run)
        axes.set(title=name, xlabel="step", ylabel="loss")
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
    found.add_argument("--figure", type=picture, default=RESULTS / "loss_curves.png")
    result_options(found, "loss_curves.jsonl")
    return found


def run(options) -> None:
    """Train everything; keep the line and the figure."""
    overrides = [f"microbatch_tokens={options.budget}", *([f"base_model={options.model}"] if options.model else [])]
    given = load_config(options.config, overrides)
    model_dir = resolve_base_model(given.base_model)
    given = targeted(given, read_architecture(model_dir))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, curves = [job.name for job in given.jobs], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = alone(given, options.steps, options.dtype, folder)
        begin(model_dir, config.jobs, folder)
        for kind in ("fused", "reference"):
            curves[kind] = ours(config, kind, folder / "run")
            print(f"  {kind}: last losses {[round(losses[-1], 4) for losses in curves[kind]]}", flush=True)
        vocab_size = read_architecture(model_dir).vocab_size
        jobs = list(read_jobs(config.jobs, load_tokenizer(model_dir), None, vocab_size).values())
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        kinds = [(dtype, seed) for seed in range(options.orders)] + [(torch.float32, 0)]
        runs = [(model_dir, folder / job.config.name, job, device, kind, options.batch, seed) for kind, seed in kinds for job in jobs]
        losses = side_by_side(peft_losses, runs, options.processes)
        *theirs, exact = [losses[first : first + len(jobs)] for first in range(0, len(losses), len(jobs))]
    for (kind, seed), found in zip(kinds, [*theirs, exact], strict=True):
        print(f"  peft, {kind}, order {seed}: last losses {[round(of_job[-1], 4) for of_job in found]}", flush=True)
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


def main(arguments: list[str]) -> int:
    """Run the comparison; returns the exit status."""
    return ended(lambda: run(parser().parse_args(arguments)))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        destroy_parallel()
    sys.exit(status)
