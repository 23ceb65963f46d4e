"""Ends real runs of `megatron-lora train` half-way, and checks that each says why in one line and leaves nothing behind.

    python -m scripts.bench.endings --shape qwen2.5-32b --pipeline 2 [--ways killed,failing,still]
    python -m scripts.bench.endings --ways terminated,lost,out-of-memory                              # each resumed, to its end

Random weights and lengths. A rank is killed once steps are taken, raises in a backward, or is stopped: then another loses patience after
PATIENCE_S, and torchrun gives the stopped one 30 s. Runs that are resumed (RESUMED, on one rank too) are asked to stop, lose a rank, or
run out of memory for once; their steps and losses are compared with those of an unbroken run. A line each in results/endings.jsonl, with
all of the run's standard error; ends with 1 where a run ended otherwise than it should.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench.model_shapes import SHAPES, write_config
from scripts.bench.stamp import append_line, result_options, stamp
from scripts.bench.workloads import job_configs
from scripts.one_line import OneLineParser, numbers, whole
from tests.living_run import FAILED, HUNG, KILLED, LivingRun

PATIENCE_S = 60
LIMITS_S = {"killed": 60.0, "failing": 900.0, "still": PATIENCE_S + 60.0}  # a failing run's is from its start, the others' from the blow
VICTIM = 1
RESUMED = ("terminated", "lost", "out-of-memory")
NUM_STEPS, MOST_OFF = 24, 0.01  # of a run that is resumed, and by how much a loss may differ: in bf16 sums have an order of their own
LINES = {"killed": KILLED.format(VICTIM), "failing": FAILED, "still": HUNG.format(VICTIM)}


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="endings.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    found.add_argument("--num-layers", type=whole, help="cut the model short")
    for name in ("pipeline", "tensor", "data"):
        found.add_argument(f"--{name}", type=whole, default=1)
    found.add_argument("--ways", type=numbers(str), default=tuple(LIMITS_S))
    found.add_argument("--longest", type=whole, default=2048, help="tokens of a sample, at most")
    result_options(found, "endings.jsonl")
    return found


def config_of(options: argparse.Namespace, folder: Path, num_steps: int = 100_000) -> dict:
    """Write a model without weights and its rows; return the config of two jobs that train it for a long time."""
    (folder / "model").mkdir(exist_ok=True)
    write_config(options.shape, folder / "model", options.num_layers)
    lengths = [[[max(2, options.longest >> k) for k in range(4)]], [[max(2, options.longest // 3)] * 4]]
    parallel = {name: getattr(options, name) for name in ("pipeline", "tensor", "data")} | {"sequence": options.tensor > 1}
    config = {"base_model": str(folder / "model"), "load_weights": False, "parallel": parallel, "microbatch_tokens": options.longest}
    jobs = job_configs(lengths, num_steps, folder, ranks=(16,))
    return config | {"jobs": jobs}


def ended(options: argparse.Namespace, way: str) -> dict:
    """Start a run and end it in a way; return what it said, and whether that is what it should say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patience = {"MEGATRON_LORA_TIMEOUT_S": str(PATIENCE_S)}
        living = LivingRun(folder, config_of(options, folder), patience, failing=way == "failing")
        try:
            if way != "failing":
                living.train(seconds=900)
                os.kill(living.rank(VICTIM), signal.SIGKILL if way == "killed" else signal.SIGSTOP)
            start = time.monotonic()
            status, error = living.end(LIMITS_S[way])
            return {"seconds": time.monotonic() - start} | verdict(way, status, error)
        except (AssertionError, subprocess.TimeoutExpired) as failure:
            return {"seconds": None, "good": False, "status": None, "says": str(failure), "error": living.error()}
        finally:
            living.close()


def losses_of(run: LivingRun) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and losses of each job, as its metrics have them."""
    files = sorted(run.output.glob("jobs/*/metrics.jsonl"))
    lines = {file.parent.name: map(json.loads, file.read_text(encoding="utf-8").splitlines()) for file in files}
    return {job: [(line["step"], line["loss"]) for line in of] for job, of in lines.items()}


def start(options: argparse.Namespace, folder: Path, way: str) -> LivingRun:
    """Start a run of a few steps with checkpoints, or resume it; it runs out of memory for once where that is the way."""
    config = config_of(options, folder, NUM_STEPS)
    config["jobs"] = [job | {"save_steps": 4} for job in config["jobs"]]
    once = {"FAIL_RANK": "0", "FAIL_ONCE": str(folder / "failed")} if way == "out-of-memory" else {}
    quiet = {"PYTHONWARNINGS": "ignore"}  # of packages that are compiled for the first time
    return LivingRun(folder, config, once | quiet, *(["--max-restarts", "1"] if once else []), failing=bool(once))


def unbroken(options: argparse.Namespace) -> dict:
    """Return the losses of a run that nothing ends."""
    with tempfile.TemporaryDirectory() as root:
        run = start(options, Path(root), "")
        try:
            status, error = run.end(900)
            assert status == 0, error
            return losses_of(run)
        finally:
            run.close()


def resumed(options: argparse.Namespace, way: str, whole: dict) -> dict:
    """End a run in a way and let it resume to its end; return whether each step is there once, and how far losses are from `whole`."""
    with tempfile.TemporaryDirectory() as root:
        folder, first, seconds = Path(root), "", None
        run = start(options, folder, way)
        try:
            if way != "out-of-memory":
                run.train(seconds=600, num_steps=6)
                os.kill(*(run.process.pid, signal.SIGTERM) if way == "terminated" else (run.rank(0), signal.SIGKILL))
                first = "status {}: {}".format(*run.end(120))
                begun, taken = time.monotonic(), len(losses_of(run)[run.first_job])
                run = start(options, folder, way)
                run.train(seconds=600, num_steps=taken + 1)
                seconds = time.monotonic() - begun
            status, error = run.end(900)
            found = losses_of(run)
        finally:
            run.close()
    ordered = all([step for step, _ in of] == list(range(1, NUM_STEPS + 1)) for of in found.values())
    off = max(
        (abs(a - b) / abs(b) for job, of in whole.items() for (_, b), (_, a) in zip(of, found.get(job, []), strict=False)), default=1.0
    )
    said = {"terminated": "status 75: ", "lost": f"status 1: {KILLED.format(0)}", "out-of-memory": ""}[way]
    good = status == 0 and ordered and whole.keys() == found.keys() and off < MOST_OFF and first == said
    good &= way != "out-of-memory" or "restart 1 of at most 1" in error
    return {
        "seconds": seconds,
        "good": good,
        "status": status,
        "says": f"losses within {off:.1e}",
        "largest_off": off,
        "error": first + error,
    }


def verdict(way: str, status: int, error: str) -> dict:
    """Return how a run ended, and whether its last line says what it should."""
    last = error.splitlines(keepends=True)[-1] if error else ""
    return {"good": status == 1 and last.startswith(LINES[way]), "status": status, "says": last.strip(), "error": error}


def main(arguments: list[str]) -> int:
    """End a run in the chosen ways."""
    options = parser().parse_args(arguments)
    if unknown := set(options.ways) - {*LIMITS_S, *RESUMED}:
        parser().error(f"--ways: {unknown.pop()!r} is none of {', '.join((*LIMITS_S, *RESUMED))}")
    if options.pipeline * options.tensor * options.data < 2 and set(options.ways) - set(RESUMED):
        parser().error("--pipeline, --tensor, --data: a rank is ended beside another; use two ranks at least")
    bad, whole = 0, unbroken(options) if set(options.ways) & set(RESUMED) else {}
    for way in options.ways:
        found = resumed(options, way, whole) if way in RESUMED else ended(options, way)
        bad += not found["good"]
        took = "" if found["seconds"] is None else f" after {found['seconds']:.0f} s"
        layers = f" {options.num_layers} layers" if options.num_layers else ""
        name = f"{options.shape}{layers} PP{options.pipeline} TP{options.tensor} DP{options.data}, {way}"
        print(f"{name}: {'as it should' if found['good'] else 'WRONG'}{took}: {found['says']}", flush=True)
        append_line(options.output, {"case": name} | stamp(options.hardware, options.commit) | found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
