"""Measures the planner's windows in a long run: 1,000 jobs x 100 steps x 32 samples, 64 of them resident at a time, on 4 stages.

Talks to the planning process as a run does (scheduling.serve). Before every window a few jobs leave: enough that nearly all jobs have
been resident by the last window; others join in their places. Each window is checked by a Follower. Appends a JSON line to
scripts/bench/results/plan_windows.jsonl: milliseconds per slot of the windows, from request to answer and of the process's own CPU time
(median, 95th percentile, first), and the memory of the planning process after the 10th and the last window.

    python -m scripts.bench.plan_windows [--windows 100] [--hardware "2 CPU cores"]          from the root of the repository; Linux
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from scheduling.follow import Follower
from scheduling.plan_json import stream_from_json
from scripts.bench.stamp import RESULTS, append_line, stamp
from scripts.one_line import OneLineParser, whole

JOBS, STEPS, SAMPLES, RESIDENT = 1000, 100, 32, 64
LENGTHS = {"mu": 6.0, "sigma": 0.8, "longest": 4096}  # log-normal, in tokens: 550 on average
SETTINGS = {"num_stages": 4, "capacity": 8192, "delay": 0, "num_slots": 32, "max_endings": 32, "cost": {}}


def job_lengths(job: int) -> list[list[int]]:
    """Draw [step][sample] -> tokens of one job."""
    drawn = np.random.default_rng(job).lognormal(LENGTHS["mu"], LENGTHS["sigma"], (STEPS, SAMPLES))
    return np.clip(drawn.round(), 1, LENGTHS["longest"]).astype(int).tolist()


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(planner: subprocess.Popen[str], num_windows: int) -> dict:
    """Plan `num_windows` windows; returns the figures."""
    assert planner.stdin is not None and planner.stdout is not None
    print(json.dumps(SETTINGS), file=planner.stdin)
    follower = Follower([], SETTINGS["num_stages"], SETTINGS["capacity"], max_endings=SETTINGS["max_endings"])
    rng, joined, asked, endings = random.Random(0), 0, 0, []
    wall_ms, cpu_ms, memory = [], [], []
    for window in range(num_windows):
        due = (JOBS - RESIDENT) * window // max(1, num_windows - 1)  # jobs that have been asked to leave before this window
        leave = rng.sample(sorted(follower.jobs), min(due - asked, RESIDENT // 2))
        join, asked = {}, asked + len(leave)
        while joined < JOBS and len(follower.jobs) < RESIDENT:
            number = next(n for n in itertools.count() if follower.numbers.is_free(n, follower.num_indices, follower.jobs))
            join[number] = {"steps": job_lengths(joined)}
            follower.join(number, join[number]["steps"])
            joined += 1
        request = json.dumps({"join": join, "leave": dict.fromkeys(leave, True)})
        start, start_cpu = time.perf_counter(), cpu_s(planner.pid)
        print(request, file=planner.stdin, flush=True)
        answer = json.loads(planner.stdout.readline())
        seconds, cpu = time.perf_counter() - start, cpu_s(planner.pid) - start_cpu
        for number in answer["left"]:
            follower.leave(int(number))
        endings += map(len, follower.follow(stream_from_json(answer["microbatches"])))
        wall_ms.append(1e3 * seconds / len(answer["microbatches"]))
        cpu_ms.append(1e3 * cpu / len(answer["microbatches"]))
        memory.append(memory_mib(planner.pid))
    figures = {"windows": num_windows, "jobs": joined, "slots": follower.num_slots, "endings_at_most": max(endings)}
    for name, each in (("wall", wall_ms), ("cpu", cpu_ms)):
        median, high = np.percentile(each, (50, 95))
        figures[f"{name}_ms_per_slot"] = {"median": round(median, 2), "p95": round(high, 2), "first": round(each[0], 2)}
    return figures | {"memory_mib": {"window 10": memory[min(9, num_windows - 1)], f"window {num_windows}": memory[-1]}}


def main() -> None:
    """Measure, print and keep the figures."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=whole, default=100)
    parser.add_argument("--hardware", default="2 CPU cores")
    arguments = parser.parse_args()
    mark = stamp(arguments.hardware)  # before the results make the tree another one
    command = [sys.executable, "-m", "scheduling.serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as planner:
        try:
            figures = measure(planner, arguments.windows)
        finally:
            planner.kill()
    workload = {"case": f"{JOBS} jobs x {STEPS} steps x {SAMPLES} samples, {RESIDENT} resident", "lengths": LENGTHS, "settings": SETTINGS}
    append_line(RESULTS / "plan_windows.jsonl", workload | figures | mark)
    print(json.dumps(workload | figures))


if __name__ == "__main__":
    main()
