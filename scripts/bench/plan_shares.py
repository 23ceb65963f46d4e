"""Measures shares: two groups of jobs with priorities 2 and 1, planned window by window, against equal priorities.

Each group has 2 (P + d) jobs that never run out of steps. Every window is checked by a Follower.
Appends a JSON line for each number of stages P, delay d and distribution of lengths to
scripts/bench/results/plan_shares.jsonl: the least and the largest ratio of the groups' predicted device
time over any 50 windows in a row, tokens/s (by the predicted makespan) over that of equal priorities,
and the no-ops of both.

    python -m scripts.bench.plan_shares [--windows 60] [--effort 1] [--workers 2]          from the root of the repository
"""

import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np

from scheduling.accounting import usage
from scheduling.follow import Follower
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import Stream
from scheduling.windows import WindowPlanner
from scripts.bench.stamp import append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, whole

SPAN, SLOTS, CAPACITY, SAMPLES, PRIORITY, SEED = 50, 32, 8192, 16, 2.0, 0
STAGES, DELAYS = (1, 2, 4), (0, 1)
DISTRIBUTIONS = {  # of a sample's tokens
    "normal": lambda rng, size: rng.normal(700, 200, size),
    "lognormal": lambda rng, size: rng.lognormal(6.4, 0.8, size),
    "two lengths": lambda rng, size: np.where(rng.random(size) < 0.8, rng.integers(100, 500, size), rng.integers(2000, 4096, size)),
}


def drawn(distribution: str, num_jobs: int, num_windows: int) -> list[list[list[int]]]:
    """Draw [job][step][sample] -> tokens, of steps that the jobs do not finish within `num_windows`: half of all would fill them."""
    rng = np.random.default_rng(SEED)
    mean = DISTRIBUTIONS[distribution](np.random.default_rng(SEED), 10_000).mean()
    steps = 2 + int(2 * num_windows * SLOTS * CAPACITY / (mean * SAMPLES * num_jobs))
    return np.clip(DISTRIBUTIONS[distribution](rng, (num_jobs, steps, SAMPLES)), 16, 4096).astype(int).tolist()


def planned(
    lengths: list, num_stages: int, delay: int, priorities: list[float], num_windows: int, effort: int
) -> tuple[Stream, list[list[float]]]:
    """Plan a number of windows; returns their stream and [window][group] -> device time."""
    planner = WindowPlanner(num_stages, CAPACITY, SLOTS, delay, effort)
    follower = Follower(lengths, num_stages, CAPACITY, delay)
    for number, steps in enumerate(lengths):
        planner.join(number, steps, priority=priorities[number])
    stream, times = (), []
    for _ in range(num_windows):
        window = planner.plan()
        follower.follow(window)
        used = usage(window, lengths, planner.cost)
        first = len(lengths) // 2
        times.append([sum(of.time for job, of in used.items() if (job < first) == group) for group in (True, False)])
        stream += window
    assert len(planner.jobs) == len(lengths), "a job ran out of steps"
    return stream, times


def ratios(times: list[list[float]], span: int) -> np.ndarray:
    """Return the first group's time over the second's, of each `span` windows in a row."""
    ends = np.concatenate([np.zeros((1, 2)), np.cumsum(times, axis=0)])
    first, second = (ends[span:] - ends[:-span]).T
    return first / second


def tokens_per_time(stream: Stream, lengths: list, num_stages: int) -> float:
    """Return tokens over the predicted makespan."""
    return sum(slot.num_tokens for slot in stream) / makespan(slot_times(stream, lengths, SlotCost()), num_stages)


def name_of(num_stages: int, delay: int, distribution: str) -> str:
    """Return a case's name."""
    return f"P = {num_stages}, d = {delay}, {distribution}"


def measure(num_stages: int, delay: int, distribution: str, num_windows: int, span: int = SPAN, effort: int = 1) -> dict:
    """Return the figures of one case."""
    group = 2 * (num_stages + delay)
    lengths = drawn(distribution, 2 * group, num_windows)
    equal, _ = planned(lengths, num_stages, delay, [1.0] * 2 * group, num_windows, effort)
    shared, times = planned(lengths, num_stages, delay, [PRIORITY] * group + [1.0] * group, num_windows, effort)
    found = ratios(times, span)
    tokens = [tokens_per_time(stream, lengths, num_stages) for stream in (shared, equal)]
    return {
        "case": name_of(num_stages, delay, distribution),
        "windows": num_windows,
        "span": span,
        "ratio": {"least": round(float(found.min()), 4), "most": round(float(found.max()), 4)},
        "tokens_per_s": round(tokens[0] / tokens[1], 4),
        "noops": {"shared": sum(slot.is_noop for slot in shared), "equal": sum(slot.is_noop for slot in equal)},
    }


def main() -> int:
    """Measure, print and keep the figures."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=whole, default=SPAN + 10)
    parser.add_argument("--effort", type=int, default=1, help="work of the local search; a run's is 1")
    parser.add_argument("--only", default="", help="cases whose name begins so: P = 4, d = 1")
    parser.add_argument("--workers", type=whole, default=1, help="cases at a time")
    result_options(parser, "plan_shares.jsonl")
    options = parser.parse_args()
    if options.windows < SPAN:
        parser.error(f"--windows {options.windows}: at least {SPAN}")
    if options.effort < 0:
        parser.error(f"--effort {options.effort}: at least 0")
    mark = stamp(options.hardware, options.commit)  # before the results make the tree another one
    settings = {
        "effort": options.effort,
        "slots": SLOTS,
        "capacity": CAPACITY,
        "samples": SAMPLES,
        "priorities": [PRIORITY, 1.0],
        "seed": SEED,
    }
    cases = [case for case in itertools.product(STAGES, DELAYS, DISTRIBUTIONS) if name_of(*case).startswith(options.only)]
    with ProcessPoolExecutor(options.workers) as pool:
        measured = [pool.submit(measure, *case, options.windows, SPAN, options.effort) for case in cases]
        for figures in as_completed(measured):
            append_line(options.output, figures.result() | {"settings": settings} | mark)
            print(json.dumps(figures.result()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
