"""Measures the runs that need several GPUs (several_runs.py), one launch of end_to_end.py after another.

    python scripts/bench/several_gpus.py [--gpus 2] [--only 32b] [--dry-run] [-- --hardware "2 x H100" --commit abc]

Each run is first tried at each of its token budgets for a few steps (lines in results/budgets.jsonl), then measured at the fastest for at
least a minute, calibrated and with a timeline for Perfetto (a line in results/end_to_end.jsonl). A budget that does not fit ends its
launch; the smaller ones before it count. At the end the ratios between runs of this commit go to results/several_gpus.jsonl, and the
losses of runs of one shape are compared. What follows `--` goes to end_to_end.py as it is. Ends with 1 where a run was not measured.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from e2e_options import layout_name, read_options  # noqa: E402
from one_line import OneLineParser, folder, json_lines, positive, whole  # noqa: E402
from several_runs import RUNS, Run, check_runs, chosen, machine, ratios  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402

TRIED_STEPS = 4  # of every job, at each budget


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="several_gpus.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--gpus", type=whole, help="measure the runs of a machine of so many; default: the GPUs that are visible")
    found.add_argument("--only", type=chosen, default="", help="runs whose names begin so: 32b,8b-tp2")
    found.add_argument("--seconds", type=positive, default=60.0, help="length of each measured run")
    found.add_argument("--results", type=folder, default=RESULTS, help="folder of the lines")
    found.add_argument("--traces", type=folder, default=ROOT / "runs" / "several_gpus", help="folder of timelines and losses")
    found.add_argument("--dry-run", action="store_true", help="print the commands; FASTEST stands for the budget that the first one finds")
    found.add_argument("passed", nargs="*", help="after --: options of end_to_end.py")
    return found


def launch(run: Run, passed: list[str], *words: str) -> list[str]:
    """Return the command that runs end_to_end.py on as many ranks as a run needs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.gpus)]
    return [*torchrun, str(Path(__file__).with_name("end_to_end.py")), *run.options(), *words, *passed]


def started(command: list[str]) -> int:
    """Run a launch to its end; return its exit status."""
    return subprocess.run(command, check=False).returncode


def trial(run: Run, options: Namespace, output: Path) -> list[str]:
    """Return the command that tries a run's budgets, the smallest first."""
    cases = [word for budget in run.budgets for word in ("--case", f"budget={budget} steps={TRIED_STEPS}")]
    return launch(run, options.passed, "--output", str(output), *cases)


def measurement(run: Run, options: Namespace, budget: int | str) -> list[str]:
    """Return the command that measures a run at its budget."""
    files = {"output": options.results / "end_to_end.jsonl", "losses": losses_of(run, options), "timeline": options.traces}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return launch(run, options.passed, *words, "--budget", str(budget), "--warm-seconds", f"{options.seconds:g}", "--calibrate")


def losses_of(run: Run, options: Namespace) -> Path:
    """Return the file of the losses of a shape's runs over one workload."""
    return options.traces / f"losses-{run.shape}-{run.workload}.jsonl"


def lines(path: Path) -> list[dict]:
    """Read a file of results; none where there is no file."""
    return json_lines(path) if path.exists() else []


def fastest_budget(run: Run, options: Namespace) -> int | None:
    """Try a run's budgets, keep the lines; None where not even the smallest could be run."""
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / "budgets.jsonl"
        started(trial(run, options, tried))
        found = [line for line in lines(tried) if "error" not in line["results"]]
    for line in found:
        append_line(options.results / "budgets.jsonl", line | {"run": run.name})
    return max(found, key=lambda line: line["results"]["tokens_per_s"])["settings"]["budget"] if found else None


def measure(run: Run, options: Namespace) -> bool:
    """Measure a run at its best budget; say and return whether that went well."""
    budget = fastest_budget(run, options)
    if budget is None:
        print(f"several_gpus.py: {run.name}: no budget could be run", flush=True)
        return False
    print(f"{run.name}: {budget} tokens per microbatch are fastest", flush=True)
    path, before = options.results / "end_to_end.jsonl", len(lines(options.results / "end_to_end.jsonl"))
    done = started(measurement(run, options, budget)) == 0
    done = done and any("tokens_per_s" in line["results"] for line in lines(path)[before:])  # it may have run out of memory
    if not done:
        print(f"several_gpus.py: {run.name}: could not be measured", flush=True)
    elif run.goal:
        print(f"{run.name}: the goal is {run.goal}", flush=True)
    return done


def rates(measured: list[dict], commit: str, hardware: str) -> dict[str, float]:
    """Return tokens per second of the runs that lines of a commit and of such GPUs tell of, the newest of each, by the runs' names."""

    def gpu(words: str) -> str:
        return words.partition(" x ")[2]  # how many there are differs from run to run

    found = {}
    of_commit = [line for line in measured if line["commit"] == commit and gpu(line["hardware"]) == gpu(hardware)]
    for run in RUNS:
        launched, (case,) = read_options(run.options())
        wanted = {name: getattr(case, name) for name in ("policy", "adapters", "workload", "recompute", "base_weights")}
        wanted |= {"shape": run.shape, "layout": layout_name(launched), "jobs": json.loads(json.dumps(asdict(case.jobs)))}
        of_run = [line for line in of_commit if wanted.items() <= line["settings"].items()]
        if of_run and "tokens_per_s" in of_run[-1]["results"]:
            found[run.name] = of_run[-1]["results"]["tokens_per_s"]
    return found


def compare(options: Namespace) -> None:
    """Keep and print the ratios between runs of this commit, and compare the losses of runs of a shape."""
    launched, _ = read_options(options.passed)
    mark = stamp(launched.hardware, launched.commit)
    for found in ratios(rates(lines(options.results / "end_to_end.jsonl"), mark["commit"], mark["hardware"])):
        print(f"{found['fast']} over {found['slow']}: {found['ratio']:.3f} {found['goal']}", flush=True)
        append_line(options.results / "several_gpus.jsonl", {"case": f"{found['fast']} over {found['slow']}"} | mark | found)
    for file in sorted({losses_of(run, options) for run in options.only if losses_of(run, options).exists()}):
        subprocess.run([sys.executable, str(Path(__file__).with_name("compare_losses.py")), str(file)], check=True)


def main(arguments: list[str]) -> int:
    """Measure the chosen runs of a machine."""
    options = parser().parse_args(arguments)
    runs = machine(options.only, options.gpus)
    if not runs:
        parser().error("--gpus: none of the runs that are asked for is of a machine of so many GPUs")
    try:
        check_runs(runs, options.passed)
    except UserError as error:
        parser().error(str(error))
    options.only = runs
    if options.dry_run:
        for run in runs:
            commands = trial(run, options, Path("TRIED.jsonl")), measurement(run, options, "FASTEST")
            print(f"# {run.name}{f': {run.goal}' if run.goal else ''}", *map(shlex.join, commands), sep="\n")
        return 0
    measured = [measure(run, options) for run in runs]
    compare(options)
    return 0 if all(measured) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
