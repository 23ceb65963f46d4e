"""What `megatron-lora verify` does: train a job alone and among the others for a few steps, and measure whether that is the same.

Two runs in a temporary directory, of the config's own ranks and data: the largest relative difference of
the job's losses, and the relative distances of all A and of all B (Frobenius). In fp32 they stay
within LOSSES and FACTORS after 20 steps at learning rates up to 1e-3. So both runs are in fp32,
unless the command line says otherwise; bf16 rounds each addition to three digits, and shows more. Adam
divides by the gradient's size, so that an element whose gradient is rounding noise goes either way: in
few steps that shows in the adapter where `adam_epsilon` is far below the gradients.
"""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_lora.commands import launch
from megatron_lora.commands.stop_signals import StopSignals
from megatron_lora.config.rules import base_weights, storage_and_compute, suggest
from megatron_lora.config.schema import RunConfig, dump_config, load_config
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_files import read_adapter
from megatron_lora.output.metrics import METRICS_FILE, read_metrics
from megatron_lora.output.observers import WANDB_PROJECT
from megatron_lora.output.run_directory import job_states
from megatron_lora.training.references import REFERENCE_FILES

LOSSES, FACTORS = 1e-5, 1e-4  # bounds in fp32
DONE, DIFFERS = 0, 1


def main(config_path: str, overrides: list[str], name: str, num_steps: int, signals: StopSignals) -> int:
    """Train a job twice and print how far the results lie apart; returns 0 within the bounds, 1 beyond them or where a run crashed."""
    config = load_config(config_path, overrides)
    names = [job.name for job in config.jobs]
    if name not in names:
        raise UserError(f"--job: no job is called {name!r}{suggest(name, names)}; the jobs are {', '.join(names)}")
    if len(names) == 1:
        raise UserError(f"--job: {name!r} is the config's only job, and nothing can change it; add the jobs that it trains among")
    if num_steps < 1:
        raise UserError(f"--steps: {num_steps} trains nothing; use a whole number of at least 1")
    given = any(override.startswith("precision=") for override in overrides)
    config = in_steps(config, name, num_steps, config.precision if given else "fp32")
    os.environ.pop(WANDB_PROJECT, None)  # neither run is worth keeping
    with tempfile.TemporaryDirectory(prefix="megatron-lora-verify-") as folder:
        jobs = {"alone": config.jobs[:1], f"among {len(names) - 1} others": config.jobs}
        found, known = [], {*cache_dir().glob(REFERENCE_FILES)}
        for how, chosen in jobs.items():
            print(f"megatron-lora: {name} {how}, {num_steps} steps in {config.precision}", flush=True)
            run = Path(folder) / how.partition(" ")[0]
            file = run.with_suffix(".yaml")
            file.write_text(dump_config(dataclasses.replace(config, output_dir=str(run), jobs=chosen)), encoding="utf-8")
            status = launch.train(str(file), [], signals)
            if signals.received:
                print("megatron-lora: stopped; nothing is kept, the same command begins again", file=sys.stderr, flush=True)
                return 128 + signals.received[0]
            if not run.is_dir() or job_states(run)[name] != "done":
                return status or DIFFERS
            found.append(run / "jobs" / name)
            for references in {*cache_dir().glob(REFERENCE_FILES)} - known:
                references.unlink()  # the other run is to compute its own
        losses, (a, b, *magnitudes) = loss_difference(*found), factor_differences(*found)
    print(f"{name}: alone and among {len(config.jobs) - 1} others, {num_steps} steps in {config.precision}")
    print(f"  losses differ by at most {losses:.1e} of their value (bound {LOSSES:.0e})")
    print(f"  A differs by {a:.1e} of its norm, B by {b:.1e} (bound {FACTORS:.0e})")
    for m in magnitudes:
        print(f"  magnitudes differ by {m:.1e} of their norm (bound {FACTORS:.0e})")
    same = losses <= LOSSES and max(a, b, *magnitudes) <= FACTORS
    print("  the job trains among the others as it does alone" if same else "  beyond the bounds, which hold in fp32", flush=True)
    return DONE if same else DIFFERS


def in_steps(config: RunConfig, name: str, num_steps: int, precision: str) -> RunConfig:
    """Return a config whose jobs train for `num_steps` steps to their ends, the job `name` first."""
    ends = {
        "max_steps": num_steps,
        "save_steps": 0,
        "keep": "last",
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
        "point": None,
    }
    ends |= {"loss_watchdog_threshold": None, "eval_watchdog_patience": None, "export": "peft", "export_dtype": "fp32"}
    jobs = [dataclasses.replace(job, **ends) for job in config.jobs]
    weights = base_weights("", {"storage": storage_and_compute(config.base_weights)[0]}) if precision == "fp32" else config.base_weights
    ordered = tuple(sorted(jobs, key=lambda job: job.name != name))
    return dataclasses.replace(config, jobs=ordered, precision=precision, base_weights=weights, on_save=())


def loss_difference(alone: Path, together: Path) -> float:
    """Return the largest relative difference of the losses in two jobs' directories; infinite where one is not finite."""
    logged = [[line["loss"] for line in read_metrics(job / METRICS_FILE)] for job in (alone, together)]
    assert len(logged[0]) == len(logged[1]) > 0, logged
    if any(loss is None for losses in logged for loss in losses):
        return math.inf
    return max(abs(one - other) / abs(one or 1.0) for one, other in zip(*logged, strict=True))


def factor_differences(alone: Path, together: Path) -> tuple[float, ...]:
    """Return the relative distances of all A, of all B and with DoRA of all magnitudes of the adapters in two jobs' directories."""
    mine, other = (read_adapter(job).factors for job in (alone, together))
    assert mine.keys() == other.keys()

    def norm(differences: Iterable[Tensor]) -> float:
        return math.sqrt(sum(float(difference.double().square().sum()) for difference in differences))

    kinds = range(len(next(iter(mine.values()))))
    apart = [norm(mine[path][factor] - other[path][factor] for path in mine) for factor in kinds]
    size = [norm(factors[factor] for factors in mine.values()) for factor in kinds]
    return tuple(distance / (whole or 1.0) for distance, whole in zip(apart, size, strict=True))
