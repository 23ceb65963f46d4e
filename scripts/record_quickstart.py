"""Appends what a finished quickstart run measured to scripts/bench/results/quickstart.jsonl.

Training is from the first microbatch to the last optimizer step, as the run's timeline has it; its tokens are those of metrics.jsonl.
The whole of the quickstart, set-up included, is what the shell measured: `time bash scripts/quickstart.sh`.

    python -m scripts.record_quickstart runs/quickstart-1 --case "2 CPU cores" --total-s 430
"""

import dataclasses
import datetime
import sys
from collections import defaultdict
from pathlib import Path

from megatron_lora.commands.finished_run import FinishedRun
from megatron_lora.errors import UserError
from scripts.bench.stamp import RESULTS, append_line
from scripts.one_line import OneLineParser, ended, positive


def measure(run: FinishedRun) -> dict:
    """Return tokens, seconds and final losses of a run, with the versions and the config."""
    jobs: dict[str, list[dict]] = defaultdict(list)
    for row in run.steps:
        jobs[row["job"]].append(row)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": run.environment["commit"],
        "tokens": run.tokens,
        "train_s": run.makespan_s,
        "tokens_per_s": run.tokens / run.makespan_s,
        "jobs": {
            name: {"steps": len(rows), "tokens": sum(row["tokens"] for row in rows), "last_loss": rows[-1]["loss"]}
            for name, rows in jobs.items()
        },
        "environment": {key: run.environment[key] for key in ("python", "packages", "devices", "cores")},
        "config": dataclasses.asdict(run.config),
    }


def main() -> None:
    """Append one line for the run named on the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--case", required=True, help="where it ran, as the table shall say it")
    parser.add_argument("--total-s", type=positive, required=True, help="seconds of the whole script, set-up included")
    arguments = parser.parse_args()
    found = measure(FinishedRun.read(arguments.run))
    if arguments.total_s < found["train_s"]:
        raise UserError(f"--total-s: {arguments.total_s:g} is less than the {found['train_s']:.0f} s that the training took")
    append_line(RESULTS / "quickstart.jsonl", {"case": arguments.case, "hardware": arguments.case, "total_s": arguments.total_s, **found})
    print(f"quickstart.jsonl: {found['tokens_per_s']:.0f} tokens/s over {found['train_s']:.0f} s")


if __name__ == "__main__":
    sys.exit(ended(main))
