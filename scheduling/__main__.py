"""Plan bare length workloads: python -m scheduling plan WORKLOAD.json -o PLAN.json [--only NAME].

Workload: {"<name>": {"stages": 4, "capacity": 6144, "data": [job][step][sample] = tokens}, ...}.
Plan:     {"<name>": {"microbatches": [[[job, step, sample, tokens], ...], ...], "seconds": 0.01}, ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from scheduling.plan_json import stream_to_json
from scheduling.planner import plan_stream
from scheduling.types import PlanError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="python -m scheduling")
    plan = parser.add_subparsers(dest="command", required=True).add_parser("plan", help="plan the workloads of a JSON file")
    plan.add_argument("workload")
    plan.add_argument("-o", "--output", required=True, help="the plan file to write")
    plan.add_argument("--only", help="plan this workload alone")
    args = parser.parse_args(argv)
    try:
        with open(args.workload) as file:
            workloads = json.load(file)
        if args.only is not None and args.only not in workloads:
            raise PlanError(f"--only {args.only}: no such workload; the file has {', '.join(sorted(workloads))}")
        names = list(workloads) if args.only is None else [args.only]
        plans = {name: _plan(workloads[name]) for name in names}
        with open(args.output, "w") as file:
            json.dump(plans, file)
    except (OSError, PlanError, json.JSONDecodeError) as error:
        print(f"scheduling: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(workload: dict) -> dict:
    start = time.perf_counter()
    stream = plan_stream(workload["data"], workload["stages"], workload["capacity"])
    return {"microbatches": stream_to_json(stream, workload["data"]), "seconds": round(time.perf_counter() - start, 4)}


if __name__ == "__main__":
    sys.exit(main())
