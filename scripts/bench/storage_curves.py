"""Loss curves of the same jobs over a base in 16, 8 and 4 bits, and by bitsandbytes + peft (QLoRA) on the same samples.

    python scripts/fetch_model.py models/SmolLM2-135M-Instruct && python scripts/make_tasks.py data/quickstart
    pip install bitsandbytes && python -m scripts.bench.storage_curves configs/quickstart.yaml [--steps 30]

All start from the same adapters and take the same samples in the same steps, without dropout, by the same optimizer and schedule. Two runs
are not ours: transformers + peft over the weights as they are, and over weights that bitsandbytes quantises (NF4, blocks of 64, double
quantisation). So what the arithmetic changes and what the storage changes are seen apart. On a CPU products are in float32, since
16 bits are slow there, and bitsandbytes runs its torch code, whose numbers are those of its CUDA code (its compiled CPU code rounds some
absmax otherwise). Appends a line for each run to scripts/bench/results/storage_curves.jsonl, and draws them.
"""

import argparse
import ctypes
import dataclasses
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from megatron_lora.config.rules import BASE_WEIGHTS
from megatron_lora.config.schema import load_config
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.parallel.process_groups import destroy_parallel
from megatron_lora.training.jobs import read_jobs
from scripts.bench.loss_curves import Curves, alone, begin, ours, peft_losses, picture
from scripts.bench.stamp import ROOT, append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, output_file, whole

PEFT, QLORA = "peft", "bitsandbytes + peft"
LAST = 5  # steps over which a curve's end is averaged


def import_bitsandbytes(device: torch.device) -> None:
    """Import it, on a CPU without its compiled code; UserError where it is not installed."""
    torch._dynamo.config.disable = device.type == "cpu"
    absent = mock.patch.object(ctypes.cdll, "LoadLibrary", side_effect=OSError("left out"))
    try:
        with absent if device.type == "cpu" else nullcontext():
            import bitsandbytes.functional  # noqa: F401
    except ImportError:
        raise UserError("bitsandbytes is not installed; pip install bitsandbytes") from None


def figures(curves: Curves, names: list[str]) -> dict[str, dict]:
    """Return, per run, each job's mean loss of its last steps, and its largest distances in any step: from native, peft and QLoRA."""
    found = {}
    for run, losses in curves.items():
        ends = {name: sum(of_job[-LAST:]) / len(of_job[-LAST:]) for name, of_job in zip(names, losses, strict=True)}
        apart = {}
        for key, other in (("native", "native"), ("peft", PEFT), ("qlora", QLORA)):
            pairs = zip(losses, curves[other], strict=True)
            apart[key] = max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
        found[run] = {"last": ends, "apart_from": apart}
    return found


def draw(curves: Curves, names: list[str], path: Path) -> None:
    """Draw two panels a job: the curves, and their distances from native."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(names), 6), dpi=110, layout="constrained")
    for job, (name, axes) in enumerate(zip(names, figure.subplots(2, len(names), squeeze=False).T, strict=True)):
        for (run, losses), style in zip(curves.items(), ("-", "-", "-", ":", ":"), strict=False):
            steps = range(1, len(losses[job]) + 1)
            axes[0].plot(steps, losses[job], style, linewidth=1.4, label=run)
            axes[1].plot(steps, [a - b for a, b in zip(losses[job], curves["native"][job], strict=True)], style, linewidth=1.4)
        axes[0].set(title=name, ylabel="loss" if job == 0 else "")
        axes[1].set(xlabel="step", ylabel="loss - native's" if job == 0 else "")
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run(options: argparse.Namespace) -> None:
    """Train everything; keep the lines and the figure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import_bitsandbytes(device)
    overrides = [
        f"microbatch_tokens={options.budget}",
        "defaults.val_set_size=0",
        *([f"base_model={options.model}"] if options.model else []),
    ]
    given = load_config(options.config, overrides)
    model_dir = resolve_base_model(given.base_model)
    precision, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    names, curves = [job.name for job in given.jobs], {}
    kept = json.loads(options.kept.read_text()) if options.kept and options.kept.exists() else {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        config = alone(given, options.steps, precision, folder)
        begin(model_dir, config.jobs, folder)
        jobs = list(read_jobs(config.jobs, load_tokenizer(model_dir), None, read_architecture(model_dir).vocab_size).values())
        for kind in ("native", *options.bases, PEFT, QLORA):
            done = kept.setdefault(kind, {})
            if kind not in (PEFT, QLORA):
                if done.keys() != set(names):
                    base = dataclasses.replace(config, base_weights=kind)
                    done |= dict(zip(names, ours(base, "fused", folder / "run"), strict=True))
            else:
                for name, job in zip(names, jobs, strict=True):
                    if name not in done:
                        done[name] = peft_losses(model_dir, folder / name, job, device, dtype, options.batch, 0, kind == QLORA)
            curves[kind] = [done[name] for name in names]
            if options.kept:
                options.kept.write_text(json.dumps(kept))
            print(f"  {kind}: last losses {[round(losses[-1], 4) for losses in curves[kind]]}", flush=True)
    about = stamp(options.hardware, options.commit) | {"computed_in": precision, "jobs": names}
    about |= {"settings": {"config": str(options.config), "steps": options.steps, "budget": options.budget, "batch": options.batch}}
    for kind, found in figures(curves, names).items():
        append_line(options.output, {"case": f"{kind}, computed in {precision}", **about, **found, "losses": curves[kind]})
        print(f"  {kind}: {found}", flush=True)
    draw(curves, names, options.figure)


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="storage_curves.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("config", type=Path, nargs="?", default=ROOT / "configs/quickstart.yaml")
    found.add_argument("--model", help="in place of the config's base_model")
    found.add_argument("--steps", type=whole, help="of each job; default: as the config has them")
    found.add_argument("--budget", type=whole, default=1024)
    found.add_argument("--batch", type=whole, default=8, help="samples of peft's microbatch")
    usual = ["fp8/bf16", "nf4/bf16"]
    found.add_argument("--bases", nargs="*", default=usual, choices=list(BASE_WEIGHTS.values()), help="base_weights; default: %(default)s")
    found.add_argument("--figure", type=picture, default=ROOT / "docs/storage.png")
    found.add_argument("--kept", type=output_file, help="curves that this file holds are not trained again; it is written after each run")
    result_options(found, "storage_curves.jsonl")
    return found


def main(arguments: list[str]) -> int:
    """Run the comparison; returns the exit status."""
    return ended(lambda: run(parser().parse_args(arguments)))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        destroy_parallel()
    sys.exit(status)
