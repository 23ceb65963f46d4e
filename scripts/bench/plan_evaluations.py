"""Simulates what evaluation costs: 16 jobs trained and evaluated together on 2, 4 and 8 stages, against the same jobs trained alone.

Evaluation slots are about a tenth or a fifth of all: each job is evaluated after every step on a few samples ("steps"), or as much more
rarely on a validation set of about one slot ("lone") or eight ("blocks"). Both runs are planned window by window as a run does, checked
by a replay, and timed by scheduling.simulate, in which a backward takes as long as a forward, or twice (with recomputation). `ratio`
compares tokens per second, an evaluated token counted as its forward's share of forward and backward. In "even" runs, all slots are
equal and evaluation slots come at regular places. Appends a JSON line per case to scripts/bench/results/plan_evaluations.jsonl.

    python -m scripts.bench.plan_evaluations [--steps 24] [--effort 1] [--hardware "2 CPU cores"]          from the root of the repository
"""

import argparse
import itertools
import json
from collections.abc import Sequence

import numpy as np

from scheduling.pipeline import with_drain
from scheduling.simulate import simulate
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.types import Microbatch, Segment, Stream
from scheduling.validate import replay
from scheduling.windows import WindowPlanner
from scripts.bench.stamp import RESULTS, append_line, stamp

JOBS, SAMPLES, CAPACITY, SEED = 16, 16, 8192, 0
LENGTHS = {"mu": 6.0, "sigma": 0.8, "longest": 4096}  # log-normal, in tokens: 550 on average
STAGES, SHARES, BACKWARD = (2, 4, 8), (0.1, 0.2), (1.0, 2.0)
PATTERNS = {"steps": 0, "lone": 1, "blocks": 8}  # slots of a validation set; 0: as many tokens as one step is worth


def drawn(rng: np.random.Generator, *shape: int) -> list:
    """Draw sample lengths, in tokens."""
    return np.clip(rng.lognormal(LENGTHS["mu"], LENGTHS["sigma"], shape).round(), 1, LENGTHS["longest"]).astype(int).tolist()


def workload(num_steps: int, share: float, pattern: str) -> tuple[list, dict[int, list[int]], dict[int, list[int]]]:
    """Return the jobs' steps, validation sets, and after how many steps each is evaluated, for a share of evaluation slots."""
    rng = np.random.default_rng(SEED)
    lengths = [drawn(rng, num_steps, SAMPLES) for _ in range(JOBS)]
    worth = share / (1 - share) * sum(map(sum, itertools.chain.from_iterable(lengths))) / (JOBS * num_steps)  # tokens for each step
    size = PATTERNS[pattern] * CAPACITY or worth
    validation, due = {}, {}
    for job in range(JOBS):
        samples = drawn(rng, 1000)
        validation[job] = samples[: 1 + int(np.argmin(abs(np.cumsum(samples) - size)))]
        every = sum(validation[job]) / worth  # steps between evaluations
        due[job] = sorted({min(round(at), num_steps) for at in np.arange(rng.random() * every, num_steps + 0.5, every)})
    return lengths, validation, due


def planned(num_stages: int, lengths: list, validation: dict, due: dict, effort: int) -> Stream:
    """Plan a run window by window, and check it."""
    planner, stream = WindowPlanner(num_stages, CAPACITY, effort=effort), ()
    for job, steps in enumerate(lengths):
        planner.join(job, steps, validation.get(job, ()), due.get(job, ()))
    while planner.resident:
        stream += planner.plan()
    replay(stream, lengths, num_stages, CAPACITY, validation=validation, evaluate_after=due)
    return with_drain(stream, num_stages)


def even(num_stages: int, share: float, pattern: str) -> tuple[Stream, Stream]:
    """Return a stream of equal slots with evaluations at regular places, and without: of jobs that have one step each."""
    block = max(1, PATTERNS[pattern])
    period, num_slots = round(block / share), 640
    stream = tuple(Microbatch((Segment(k, 0, (0,), CAPACITY),), evaluate=k % period < block) for k in range(num_slots))
    return with_drain(stream, num_stages), with_drain(tuple(slot for slot in stream if not slot.evaluate), num_stages)


def seconds(stream: Stream, times: Sequence[float], num_stages: int, backward: float) -> float:
    """Return the makespan, in the unit of the times."""
    return simulate(stream, [times] * num_stages, [[backward * time for time in times]] * num_stages).makespan_s


def compare(together: Stream, alone: Stream, num_stages: int, times: list[list[float]]) -> dict:
    """Return the share of evaluation slots and of tokens, and the ratio of tokens/s to training alone, by the time of a backward."""
    of = {False: 0, True: 0}
    for slot in together:
        of[slot.evaluate] += slot.num_tokens
    evaluated = sum(slot.evaluate for slot in together)
    busy = sum(not slot.is_noop for slot in together)
    figures = {"evaluation_slots": round(evaluated / busy, 4), "evaluation_tokens": round(of[True] / (of[True] + of[False]), 4)}
    for backward in BACKWARD:
        rates = []
        for stream, each in zip((together, alone), times, strict=True):
            tokens = of[False] + (of[True] / (1 + backward) if stream is together else 0)
            rates.append(tokens / seconds(stream, each, num_stages, backward))
        figures[f"ratio_backward_{backward:g}"] = round(rates[0] / rates[1], 4)
    return figures


def measure(alone: Stream, num_stages: int, share: float, pattern: str, num_steps: int, effort: int) -> list[dict]:
    """Compare one case with the jobs trained `alone`, and evenly."""
    cost, found = SlotCost(), []
    lengths, validation, due = workload(num_steps, share, pattern)
    together = planned(num_stages, lengths, validation, due, effort)
    times = [slot_times(stream, lengths, cost, validation) for stream in (together, alone)]
    for plan in ("planned", "even"):
        if plan == "even":
            together, alone = even(num_stages, share, pattern)
            times = [[float(slot.num_tokens) for slot in stream] for stream in (together, alone)]
        name = f"P = {num_stages}, {share:.0%}, {pattern}{', even' if plan == 'even' else ''}"
        case = {"case": name, "plan": plan, "stages": num_stages, "pattern": pattern, "share": share, "slots": len(together)}
        found.append(case | compare(together, alone, num_stages, times))
    return found


def main() -> None:
    """Simulate every case, print and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="of each job")
    parser.add_argument("--effort", type=int, default=1, help="of the planner")
    parser.add_argument("--hardware", default="2 CPU cores")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    mark = stamp(arguments.hardware)  # before the results make the tree another one
    config = {"jobs": JOBS, "steps": arguments.steps, "samples": SAMPLES, "capacity": CAPACITY, "lengths": LENGTHS, "seed": SEED}
    for num_stages in STAGES:
        lengths, _, _ = workload(arguments.steps, SHARES[0], "lone")
        alone = planned(num_stages, lengths, {}, {}, arguments.effort)
        for share, pattern in itertools.product(SHARES, PATTERNS):
            for figures in measure(alone, num_stages, share, pattern, arguments.steps, arguments.effort):
                line = figures | {"workload": config | {"effort": arguments.effort}}
                append_line(RESULTS / "plan_evaluations.jsonl", line | mark)
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
