"""Real tokens per second of whole runs: `megatron-lora train` itself, over a frozen model of random weights and data of given lengths.

    python -m scripts.bench.end_to_end --ranks 8,16,32,64 --dropouts 0,0,0.05,0.05 --case "" --case "adapters=none" --case "policy=flush"
    torchrun --nproc-per-node 2 -m scripts.bench.end_to_end --shape qwen2.5-32b --pipeline 2 --workload het-s2 --budget 4096 --calibrate

One launch runs its cases one after another; each leaves its run's directory and appends a JSON line to
scripts/bench/results/end_to_end.jsonl. Real tokens: padding is not counted; fill, drain and optimizer are. MFU: 4 FLOPs per token and
parameter (all but the embedding), of the devices' dense peak. A bubble is the share of a run in which a stage does no work, by CUDA
events; exposed communication the share in which it waits for a message that was already sent.
"""

import dataclasses
import gc
import json
import math
import os
import re
import statistics
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

from megatron_lora.environment import allocator_settings

os.environ.update(allocator_settings(os.environ))  # before anything imports torch

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_lora.commands.finished_run import FinishedRun  # noqa: E402
from megatron_lora.config.schema import RunConfig, load_config  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402
from megatron_lora.huggingface.architecture import Architecture, read_architecture  # noqa: E402
from megatron_lora.parallel.process_groups import destroy_parallel  # noqa: E402
from megatron_lora.planning.devices import this_device  # noqa: E402
from megatron_lora.planning.predict import cost_of, memory_of, shape_of  # noqa: E402
from megatron_lora.planning.resolve import resolve  # noqa: E402
from megatron_lora.planning.targets import targeted  # noqa: E402
from scheduling.memory import tokens_in_flight  # noqa: E402
from scripts.bench.cases import HF_PEFT, Case, check, layout_name, policies_in_words, read_options  # noqa: E402
from scripts.bench.gauges import gauged  # noqa: E402
from scripts.bench.kernel_shares import Profiled  # noqa: E402
from scripts.bench.model_shapes import write_config  # noqa: E402
from scripts.bench.stamp import append_line, stamp  # noqa: E402
from scripts.bench.trained import trained  # noqa: E402
from scripts.bench.workloads import head, job_configs, read_workload, take  # noqa: E402

PROFILED_TOKENS = 4 * 8192


def main(arguments: list[str]) -> int:
    """Run all cases; returns the exit status."""
    try:
        options, cases = read_options(arguments)
        started, needed = int(os.environ.get("WORLD_SIZE", "1")), options.pipeline * options.tensor * options.data
        if started != needed:
            raise UserError(f"the layout {layout_name(options)} needs {needed} ranks, {started} were started; use torchrun")
        launch(options, cases)
        if dist.is_initialized():
            destroy_parallel()
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"end_to_end.py: {error}", file=sys.stderr)
        return 2


def launch(options: Namespace, cases: list[Case]) -> None:
    """Run the cases as one rank of the layout; on one rank a case that runs out of memory is a line that says so."""
    workloads = [read_workload(options.lengths, case.workload) for case in cases]
    for case, workload in zip(cases, workloads, strict=True):
        check(options, case, workload)
    os.environ["MEGATRON_LORA_CACHE"] = str(options.runs / "cache")  # calibrations of these runs alone
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before anything asks for its memory
    for number, (case, workload) in enumerate(zip(cases, workloads, strict=True), 1):
        if os.environ.get("RANK", "0") == "0":
            print(f"case {number} of {len(cases)}: {case.name}", flush=True)
        lengths = take(workload, case.jobs)
        config = config_of(options, case, lengths)
        try:
            results = measure(options, case, config, lengths)
        except torch.cuda.OutOfMemoryError as error:
            if config.parallel.world_size > 1:
                raise
            results = {"error": str(error).split(". ")[0]}
        gc.collect()
        torch.cuda.empty_cache()
        if results is not None:
            append_line(options.output, line(options, case, config) | {"results": results})
            print(f"  {summary(results)}", flush=True)


def config_of(options: Namespace, case: Case, lengths, steps: int | None = None, kind: str = "") -> RunConfig:
    """Write a case's model, data and config below the folder of runs, on every rank alike; return the config."""
    folder = options.runs / (re.sub("[^A-Za-z0-9.]+", "-", case.name)[:120] + kind)
    own = folder / f"rank-{os.environ.get('RANK', '0')}"
    (own / "model").mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(case.name, encoding="utf-8")
    write_config(options.shape, own / "model", options.num_layers)
    parallel = {name: getattr(options, name) for name in ("pipeline", "tensor", "expert", "data", "sequence")}
    tree = {
        "base_model": str(own / "model"),
        "output_dir": str(folder / "run"),
        "load_weights": False,
        "parallel": parallel | {"layers_per_stage": options.layers and list(options.layers)},
        "microbatch_tokens": case.budget,
        "recompute": case.recompute if isinstance(case.recompute, str) else list(case.recompute),
        "activation_offloading": case.activation_offloading,
        "deterministic": case.deterministic,
        "base_weights": case.base_weights,
        "backend": case.backend,
        "jobs": job_configs(lengths, 1, own, case.ranks, case.dropouts, case.completion, case.expert_r, case.dpo),
    }
    architecture = read_architecture(own / "model")
    if steps is None:
        steps = case.steps or steps_for(case, lengths, targeted(load(own, tree), architecture), architecture)
    shared = {"max_steps": steps, "save_steps": case.save_steps}
    jobs = [job | shared | ({"adapter": "dora"} if len(tree["jobs"]) - at <= case.dora else {}) for at, job in enumerate(tree["jobs"])]
    return targeted(load(own, tree | {"jobs": jobs}), architecture)


def load(folder: Path, tree: dict) -> RunConfig:
    """Write a config as JSON, which is YAML, and read it as train does."""
    (folder / "config.yaml").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return load_config(folder / "config.yaml")


def steps_for(case: Case, lengths, config: RunConfig, architecture: Architecture) -> int:
    """Return how many steps of every job fill the time, by the table's figures and a pipeline that never waits."""
    device = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size)))
    resolved = resolve(config, architecture, lengths, device, case.completion)
    mean_rank = statistics.fmean(job.lora_rank for job in config.jobs)
    token_s = cost_of(resolved, architecture, device, case.completion).token_seconds(mean_rank) / config.parallel.data
    per_step = statistics.fmean(sum(sum(steps[k % len(steps)]) for steps in lengths) for k in range(len(lengths[0])))
    return max(1, math.ceil(case.seconds / (per_step * token_s)))


def measure(options: Namespace, case: Case, config: RunConfig, lengths) -> dict | None:
    """Return a case's figures on the first rank, None on the others."""
    architecture = read_architecture(config.base_model)
    peak_flops = options.peak_tflops * 1e12 * config.parallel.world_size
    if case.policy == HF_PEFT:
        from scripts.bench.hf_peft import measure as measure_peft

        found = measure_peft(options, case, config)
        return found | {"mfu": flops_per_token(architecture) * found["tokens_per_s"] / peak_flops}
    gauges: dict = {}
    run = trained(config, policy=case.policy, adapters=case.adapters, around=during(gauges), calibrated=case.calibrate)
    peaks: list = [None] * config.parallel.world_size
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
    found = None if run is None else figures(run, architecture, case.adapters, peaks, peak_flops) | {"gauges": gauges}
    if case.profile:
        few = config_of(options, case, head(lengths, PROFILED_TOKENS), 1, "-profile")
        profiled = Profiled()
        trained(few, policy=case.policy, adapters=case.adapters, around=profiled)
        shares: list = [None] * config.parallel.world_size
        dist.all_gather_object(shares, (profiled.shares, profiled.kernels))
        if found is not None:
            found |= {"profile": [each for each, _ in shares], "profile_kernels": [each for _, each in shares]}
    return found


@contextmanager
def during(found: dict):
    """Put clock and power of the GPUs while something runs into a dict, and count peak memory from there on."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with gauged(cuda and dist.get_rank() == 0) as gauges:
        yield
        if cuda:
            torch.cuda.synchronize()
    found |= gauges


def flops_per_token(architecture: Architecture) -> int:
    """Return 4 FLOPs for every parameter that computes: all but the embedding; forward and input gradient of a frozen model."""
    shape = shape_of(architecture)
    return 4 * (shape.layer_params * shape.num_layers + shape.head_params)


def figures(run: FinishedRun, architecture: Architecture, adapters: str, peaks: list[int], peak_flops: float) -> dict:
    """Return what a run's directory says of it, with the peaks of memory that the ranks had."""
    seconds, stages = run.makespan_s, range(run.num_stages)
    busy, hops, losses = sum(map(bool, run.slots)), run.exposed_hops(), [row["loss"] for row in run.steps]
    predicted, replayed = run.predicted(), run.replayed()
    return {
        "tokens": run.tokens,
        "seconds": seconds,
        "tokens_per_s": run.tokens / seconds,
        "ms_per_8192_tokens": 8192e3 * seconds / run.tokens,
        "mfu": flops_per_token(architecture) * run.tokens / seconds / peak_flops,
        "steps": max(row["step"] for row in run.steps),
        "slots": len(run.slots),
        "noops": len(run.slots) - busy,
        "fill": run.tokens / (busy * int(run.config.microbatch_tokens) * run.config.parallel.data),
        "bubble": statistics.fmean(map(run.bubble, stages)),
        "bubbles": list(map(run.bubble, stages)),
        "exposed_communication": max(hops.values(), default=0.0),
        "exposed_hops": hops,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": None not in losses,
        "memory": memory(run, architecture, adapters, peaks),
        "prediction": {
            "predicted_s": predicted.makespan_s,
            "replayed_s": replayed.makespan_s,
            "real_s": seconds,
            "predicted_over_real": predicted.makespan_s / seconds,
            "replayed_over_real": replayed.makespan_s / seconds,
            "predicted_bubbles": list(map(predicted.bubble, stages)),
            "cost_from": "calibration" if "calibration" in run.cost["basis"] else "table figures",
        },
    }


def memory(run: FinishedRun, architecture: Architecture, adapters: str, peaks: list[int]) -> dict:
    """Return every rank's peak beside what the memory model says; it knows of fused adapters, or of none."""
    present = run.config if adapters != "none" else dataclasses.replace(run.config, jobs=())
    models, largest = memory_of(present, architecture, this_device(len(peaks))), max(slot.num_tokens for slot in run.stream)
    in_flight = [tokens_in_flight(run.stream, stage, run.num_stages) for stage in range(run.num_stages)]
    predicted = [models[stage].total(in_flight[stage], largest) for stage in run.stages.values()]
    known = adapters in ("fused", "none")
    ratios = [p / peak for p, peak in zip(predicted, peaks, strict=True) if peak] if known else []
    return {"peak_bytes": peaks, "predicted_bytes": predicted if known else None, "predicted_over_peak": ratios}


def line(options: Namespace, case: Case, config: RunConfig) -> dict:
    """Return what a line of results says besides the results."""
    resolved = Path(config.output_dir) / "config.yaml"
    done = load_config(resolved) if resolved.exists() else config
    settings = dataclasses.asdict(case) | {
        "shape": options.shape,
        "num_layers": options.num_layers,
        "layout": layout_name(options),
        "parallel": dataclasses.asdict(done.parallel),
        "microbatch_tokens": done.microbatch_tokens,
        "resolved_recompute": policies_in_words(done.recompute),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    return {"case": case.name, **stamp(options.hardware, options.commit), "settings": settings}


def summary(results: dict) -> str:
    """Say the figures that matter in one line."""
    if "error" in results:
        return results["error"]
    words = [f"{results['tokens_per_s']:,.0f} tokens/s", f"MFU {results['mfu']:.1%}", f"{results['seconds']:.1f} s"]
    words.append(f"peak {max(results['memory']['peak_bytes']) / 1e9:.2f} GB")
    if "prediction" in results:
        ratios, found = results["memory"]["predicted_over_peak"], results["prediction"]
        words[-1] += f" (predicted {', '.join(f'{ratio:.1%}' for ratio in ratios)})" if ratios else ""
        words += [f"bubble {results['bubble']:.1%}", f"exposed hops {results['exposed_communication']:.2%}"]
        words.append(f"predicted / real {found['predicted_over_real']:.3f}, replayed / real {found['replayed_over_real']:.3f}")
    if "profile" in results:
        words.append("; ".join(" ".join(f"{kind} {share:.3f}" for kind, share in shares.items()) for shares in results["profile"]))
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
