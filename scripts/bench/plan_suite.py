"""Measures the planner: the ten-workload suite, other policies, rolling windows, fresh seeds and a hundred jobs; draws two charts.

Efficiency is the ideal time of the tokens / the predicted makespan under 1F1B, fill and drain included; every plan is replayed first.
Seconds are measured around a process of its own, interpreter start included. Appends to scripts/bench/results/: plans.jsonl (a line
per workload), plan_seeds.jsonl (a line per workload over ten seeds, lengths drawn from a log-normal fitted to each job's own),
plan_scale.jsonl (100 jobs x 100 steps x 32 samples); prints them as Markdown; draws gantt-flush.png and gantt-ours.png.

    python -m scripts.bench.plan_suite [--hardware "2 CPU cores"] [--parts suite seeds scale charts]
"""

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lora.planning.plan_picture import draw
from scheduling.plan_json import stream_from_json
from scheduling.planner import plan_stream
from scheduling.policies import POLICIES, Runs
from scheduling.simulate import simulate_runs
from scheduling.slot_cost import SlotCost, efficiency, slot_times
from scheduling.types import Lengths
from scheduling.validate import replay
from scheduling.windows import WindowPlanner
from scripts.bench.stamp import RESULTS, ROOT, append_line, stamp
from scripts.bench.workloads import SUITE
from scripts.one_line import OneLineParser

OTHERS = ("flush", "round-robin", "grouped", "greedy")
NUM_SEEDS, LONGEST = 10, 4096
HARD = "tiny-s8"  # the workload that gaps bind most


def runs_efficiency(runs: Runs, lengths: Lengths, num_stages: int) -> float:
    """Return ideal time of the tokens / summed makespans."""
    return 1 / sum(1 / efficiency(stream, lengths, num_stages) for stream in runs)


def planned(workload: dict, *options: str) -> dict:
    """Plan one workload in a process of its own, and replay the plan; returns its figures, with the seconds around the process."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "workload.json", Path(folder) / "plan.json"
        source.write_text(json.dumps({"it": workload}), encoding="utf-8")
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "scheduling", "plan", source, "-o", target, *options], check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        plan = json.loads(target.read_text(encoding="utf-8"))["it"]
    slots = plan["microbatches"]
    replay(stream_from_json(slots), workload["data"], workload["stages"], workload["capacity"])
    figures = {"slots": len(slots), "noops": sum(not slot for slot in slots), "ours": plan["efficiency"], "estimate": plan["estimate"]}
    return figures | {"seconds": round(seconds, 3), "first_window_s": plan.get("first_window_seconds")}


def suite(workloads: dict) -> list[dict]:
    """Ours, in one piece and in windows of 32 slots, and the other policies, on every workload."""
    lines = []
    for name, workload in workloads.items():
        lengths, num_stages, capacity = workload["data"], workload["stages"], workload["capacity"]
        windows = planned(workload, "--window", "32")
        line = {"case": name, **planned(workload), "windows": windows["ours"], "first_window_s": windows["first_window_s"]}
        for policy in OTHERS:
            line[policy] = round(runs_efficiency(POLICIES[policy](lengths, num_stages, capacity, SlotCost()), lengths, num_stages), 4)
        lines.append(line)
        print(json.dumps(line), flush=True)
    usual, harder = next(line for line in lines if line["case"] == HARD), planned(workloads[HARD], "--effort", "60")
    return [*lines, usual | {name: harder[name] for name in ("slots", "noops", "ours", "seconds")} | {"case": f"{HARD}, effort 60"}]


def drawing(steps: list, seed: int) -> Callable[[], int]:
    """Return what draws lengths from the log-normal with the mean and deviation of a job's logarithms."""
    logs, rng = [math.log(tokens) for batch in steps for tokens in batch], random.Random(seed)
    mean, deviation = statistics.mean(logs), statistics.stdev(logs)
    return lambda: max(1, min(LONGEST, round(rng.lognormvariate(mean, deviation))))


def redrawn(lengths: list, seed: int) -> list:
    """Draw a workload of the same shape, each job's lengths like its own."""
    draws = [drawing(steps, 1000 * seed + job) for job, steps in enumerate(lengths)]
    return [[[draw() for _ in batch] for batch in steps] for draw, steps in zip(draws, lengths, strict=True)]


def seeds(workloads: dict) -> list[dict]:
    """Spread over fresh seeds, and the smallest lead over the greedy."""
    lines = []
    for name, workload in workloads.items():
        ours, leads = [], []
        for seed in range(NUM_SEEDS):
            lengths = redrawn(workload["data"], seed)
            stream = plan_stream(lengths, workload["stages"], workload["capacity"])
            replay(stream, lengths, workload["stages"], workload["capacity"])
            ours.append(efficiency(stream, lengths, workload["stages"]))
            plain = POLICIES["greedy"](lengths, workload["stages"], workload["capacity"], SlotCost())
            leads.append(ours[-1] - runs_efficiency(plain, lengths, workload["stages"]))
        numbers = {"least": min(ours), "median": statistics.median(ours), "most": max(ours), "least_lead": min(leads)}
        lines.append({"case": name, "seeds": NUM_SEEDS, **{key: round(value, 4) for key, value in numbers.items()}})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def scale(workloads: dict) -> list[dict]:
    """A hundred jobs, whole and the first window; lengths like those of cnn-s4."""
    draw = drawing([batch for steps in workloads["cnn-s4"]["data"] for batch in steps], 0)
    lengths = [[[draw() for _ in range(32)] for _ in range(100)] for _ in range(100)]
    line = {"case": "100 jobs x 100 steps x 32 samples", **planned({"stages": 8, "capacity": 8192, "data": lengths})}
    start = time.perf_counter()
    next(WindowPlanner(8, 8192).plan_all(lengths))
    line["first_window_s"] = round(time.perf_counter() - start, 3)
    return [line | {"share": round(line["ours"] / line["estimate"], 4)}]


def charts(workloads: dict) -> None:
    """Draw the first steps of one workload under the flush baseline and as planned."""
    workload = workloads["small-s4"]
    lengths, num_stages, capacity = [steps[:4] for steps in workload["data"]], workload["stages"], workload["capacity"]
    for name in ("flush", "ours"):
        runs = POLICIES[name](lengths, num_stages, capacity, SlotCost())
        times = [[slot_times(stream, lengths, SlotCost())] * num_stages for stream in runs]
        stream, timeline = simulate_runs(list(zip(runs, times, times, strict=True)))
        draw(str(RESULTS / f"gantt-{name}.png"), [("predicted", timeline)], stream, [f"job {job}" for job in range(len(lengths))])
        print(f"gantt-{name}.png: {timeline.makespan_s:.0f} token times, {1 - timeline.bubble(0):.1%} busy")


def keep(file: str, lines: list[dict], mark: dict) -> None:
    """Append lines to a result file, and print them as a Markdown table."""
    for line in lines:
        append_line(RESULTS / file, line | mark)
    print(f"\n| {' | '.join(lines[0])} |\n|{' --- |' * len(lines[0])}")
    for line in lines:
        print(f"| {' | '.join(str(value) for value in line.values())} |")


def main() -> None:
    """Run the parts that are asked for."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", default="2 CPU cores")
    parts = {"suite": (suite, "plans.jsonl"), "seeds": (seeds, "plan_seeds.jsonl"), "scale": (scale, "plan_scale.jsonl")}
    parser.add_argument("--parts", nargs="+", default=[*parts, "charts"], choices=[*parts, "charts"])
    arguments = parser.parse_args()
    workloads = json.loads(SUITE.read_text(encoding="utf-8"))
    mark = stamp(arguments.hardware)  # before the results make the tree another one
    for part, (measure, file) in parts.items():
        if part in arguments.parts:
            keep(file, measure(workloads), mark)
    if "charts" in arguments.parts:
        charts(workloads)


if __name__ == "__main__":
    main()
