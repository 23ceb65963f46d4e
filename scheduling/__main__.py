"""Plan bare length workloads: python -m scheduling plan WORKLOAD.json -o PLAN.json [--only NAME] [--effort N] [--window SLOTS].

Workload: {"<name>": {"stages": 4, "capacity": 6144, "data": [job][step][sample] = tokens}, ...}.
Plan:     {"<name>": {"microbatches": [[[job, step, sample, tokens], ...], ...], "seconds": 0.01, "efficiency": 0.95,
           "estimate": 0.96}, ...}; efficiency is the predicted one, estimate that of perfectly even slots; with --window, also
          "first_window_seconds".
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from scheduling.plan_json import stream_to_json
from scheduling.planner import plan_stream
from scheduling.slot_cost import efficiency, even_slot_estimate
from scheduling.types import PlanError
from scheduling.windows import WindowPlanner


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="python -m scheduling")
    plan = parser.add_subparsers(dest="command", required=True).add_parser("plan", help="plan the workloads of a JSON file")
    plan.add_argument("workload")
    plan.add_argument("-o", "--output", required=True, help="the plan file to write")
    plan.add_argument("--only", help="plan this workload alone")
    plan.add_argument("--effort", type=int, default=1, help="multiply the work of the local search (counted in proposals)")
    plan.add_argument("--window", type=int, metavar="SLOTS", help="plan in rolling windows of this number of slots, as a run does")
    args = parser.parse_args(argv)
    try:
        with open(args.workload) as file:
            workloads = json.load(file)
        if args.only is not None and args.only not in workloads:
            raise PlanError(f"--only {args.only}: no such workload; the file has {', '.join(sorted(workloads))}")
        if args.effort < 0 or (args.window is not None and args.window < 1):
            raise PlanError(f"--effort {args.effort} --window {args.window}: effort is 0 or more, a window has at least 1 slot")
        names = list(workloads) if args.only is None else [args.only]
        plans = {name: _plan(workloads[name], args.effort, args.window) for name in names}
        with open(args.output, "w") as file:
            json.dump(plans, file)
    except (OSError, PlanError, json.JSONDecodeError) as error:
        print(f"scheduling: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(workload: dict, effort: int, window: int | None) -> dict:
    start = time.perf_counter()
    lengths, num_stages, capacity = workload["data"], workload["stages"], workload["capacity"]
    times = {}
    if window is None:
        stream = plan_stream(lengths, num_stages, capacity, effort=effort)
    else:
        stream = ()
        for planned in WindowPlanner(num_stages, capacity, window, effort=effort).plan_all(lengths):
            times.setdefault("first_window_seconds", round(time.perf_counter() - start, 4))
            stream += planned
    times["seconds"] = round(time.perf_counter() - start, 4)
    return {
        "microbatches": stream_to_json(stream, lengths),
        "efficiency": round(efficiency(stream, lengths, num_stages), 4),
        "estimate": round(even_slot_estimate(lengths, num_stages, capacity), 4),
        **times,
    }


if __name__ == "__main__":
    sys.exit(main())
