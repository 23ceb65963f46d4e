"""Runs one case of end_to_end.py and keeps what it found: a line of results, the losses, a trace."""

import argparse
import dataclasses
import gc
import json
import os
import re

import torch
from e2e_base import Base
from e2e_case import WARM_AGAIN, CaseRun
from e2e_figures import mfu
from e2e_options import HF_PEFT, Case, layout_name, policies_in_runs, policies_in_words
from layer_table import read_stages, table_name
from stamp import append_line, stamp

from megatron_lora.config.schema import RunConfig
from scheduling.types import Lengths


def run_case(base: Base, options: argparse.Namespace, case: Case, config: RunConfig, workload: Lengths, turn: int) -> None:
    """Measure a case, for the `turn`-th time, and append its line; on one rank a case that runs out of memory is a line that says so."""
    try:
        results = (
            _hf_peft(base, case, options, workload) if case.policy == HF_PEFT else _trainer(base, case, options, config, workload, turn)
        )
    except torch.cuda.OutOfMemoryError as error:
        if base.world_size > 1:
            raise
        results = {"error": str(error).split(". ")[0]}
        torch.cuda.empty_cache()
    if base.rank > 0:
        return
    append_line(options.output, line(options, case, config) | {"round": turn, "results": results})
    base.say(f"  {summary(results)}")


def summary(results: dict) -> str:
    """Say the figures that matter in one line."""
    if "error" in results:
        return results["error"]
    words = [f"{results['tokens_per_s']:,.0f} tokens/s", f"MFU {results['mfu']:.1%}", f"{results['seconds']:.1f} s"]
    words.append(f"peak {max(results['memory']['peak_bytes']) / 1e9:.2f} GB")
    if "prediction" in results:
        ratios = results["memory"]["predicted_over_peak"]
        words[-1] += f" (predicted {', '.join(f'{ratio:.1%}' for ratio in ratios)})" if ratios else ""
        words += [f"bubble {results['bubble']:.1%}", f"exposed hops {results['exposed_communication']:.2%}"]
        found = results["prediction"]
        words.append(f"predicted / real {found['predicted_over_real']:.3f}, replayed / real {found['replayed_over_real']:.3f}")
    if "profile" in results:
        words.append("; ".join(" ".join(f"{kind} {share:.3f}" for kind, share in shares.items()) for shares in results["profile"]))
    return ", ".join(words)


def line(options: argparse.Namespace, case: Case, config: RunConfig) -> dict:
    """Return what a line of results says besides the results."""
    settings = dataclasses.asdict(case) | {
        "shape": options.shape,
        "num_layers": options.num_layers,
        "layout": layout_name(options),
        "parallel": dataclasses.asdict(config.parallel),
        "microbatch_tokens": config.microbatch_tokens,
        "settled_recompute": policies_in_words(config.recompute),
        "layer_recompute": policies_in_runs(config.recompute),
        "memory_gb": options.memory_gb,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    return {"case": case.name, **stamp(options.hardware, options.commit), "settings": settings}


def _trainer(base: Base, case: Case, options: argparse.Namespace, config: RunConfig, workload: Lengths, turn: int) -> dict:
    layers = config.parallel.layers_per_stage or ()
    adapters = "unfused" if case.adapters == "unfused" else "fused"
    table = table_name(options.shape, case.base_weights, config.parallel.tensor, adapters)
    cost = read_stages(options.cost, layers, config.recompute, table) if options.cost else None
    run = CaseRun(base, case, config, workload, cost)
    try:
        run.prepare()
        speed = run.warm_up() if turn == 1 else run.warm_up(**WARM_AGAIN)
        if case.calibrate:
            run.calibrate(broadly=options.save_cost is not None)
            if options.save_cost and base.rank == 0:
                options.save_cost.write_text(json.dumps(run.cost.to_json(), indent=1) + "\n", encoding="utf-8")
        trace = options.timeline and options.timeline / f"{re.sub('[^A-Za-z0-9.]+', '-', case.name)}.json"
        results, outcome = run.measure(run.timed_lengths(speed), trace)
        if base.rank == 0:
            results["attention"] = base.stage.attention
            results["mfu"] = mfu(base.architecture, results["tokens_per_s"], options.peak_tflops * 1e12 * base.world_size)
            if options.losses is not None:
                append_line(options.losses, {"case": case.name, "layout": layout_name(options), "losses": outcome.losses})
        if case.profile:
            results |= run.profile()
        return results
    finally:
        run.close()


def _hf_peft(base: Base, case: Case, options: argparse.Namespace, workload: Lengths) -> dict:
    from hf_peft import measure

    base.release()  # or its weights would leave too little memory: near the limit the allocator slows everything down
    try:
        return measure(base, case, options, workload)
    finally:
        gc.collect()
        if base.cuda:
            torch.cuda.empty_cache()
