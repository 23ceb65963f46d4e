"""Appends what a finished quickstart run measured to scripts/bench/results/quickstart.jsonl.

Training is from the first microbatch to the last optimizer step, as timeline.json has it; its tokens are those of metrics.jsonl.
The whole of the quickstart, set-up included, is what the shell measured: `time bash scripts/quickstart.sh`.

    python scripts/bench/record_quickstart.py runs/quickstart-1 --case "2 CPU cores" --total-s 430
"""

import datetime
import json
import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from one_line import OneLineParser, ended, finished_run, positive  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "quickstart.jsonl"


def measure(run: Path) -> dict:
    """Return tokens, seconds and final losses of a run, with the versions and the config."""
    events = json.loads((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    train_s = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") / 1e6
    jobs = {}
    for file in sorted(run.glob("jobs/*/metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        jobs[file.parent.name] = {"steps": len(rows), "tokens": sum(row["tokens"] for row in rows), "last_loss": rows[-1]["loss"]}
    tokens = sum(job["tokens"] for job in jobs.values())
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": environment["commit"],
        "tokens": tokens,
        "train_s": train_s,
        "tokens_per_s": tokens / train_s,
        "jobs": jobs,
        "environment": {key: environment[key] for key in ("python", "packages", "devices", "cores")},
        "config": config,
    }


def main() -> None:
    """Append one line for the run named on the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--case", required=True, help="where it ran, as the table shall say it")
    parser.add_argument("--total-s", type=positive, required=True, help="seconds of the whole script, set-up included")
    arguments = parser.parse_args()
    with finished_run(arguments.run):
        found = measure(arguments.run)
    if arguments.total_s < found["train_s"]:
        raise UserError(f"--total-s: {arguments.total_s:g} is less than the {found['train_s']:.0f} s that the training took")
    line = {"case": arguments.case, "hardware": arguments.case, "total_s": arguments.total_s, **found}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{RESULTS.name}: {line['tokens_per_s']:.0f} tokens/s over {line['train_s']:.0f} s")


if __name__ == "__main__":
    sys.exit(ended(main))
