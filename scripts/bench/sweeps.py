"""What a sweep costs and what it finds: decisions on recorded curves, a simulated run of many points, live runs on CPU and on a GPU.

    python -m scripts.bench.sweeps record RUN                       curves of a grid that was trained to its end -> sweep_curves.jsonl
    python -m scripts.bench.sweeps decisions                        halving, its asynchronous form and random stopping, over 20 seeds
    python -m scripts.bench.sweeps simulate --points 256            the real control and planner over 4 stages, without a model
    python -m scripts.bench.sweeps live --data names.jsonl          9 recorded points as a sweep, as a grid, and 2 of them one by one
    python -m scripts.bench.sweeps kills                            a sweep of a tiny model is killed ten times, and decides the same
    python -m scripts.bench.sweeps gpu --points 64                  an 8B shape; recorded curves stand in for its losses

Regret is (L - L_best) / (L_median - L_best), L being the final loss of the best point that was trained to its end, and the others those of
the whole grid. Random stopping lets as many continue at each rung as halving does, whoever they are. Appends a JSON line per case.
`picture` draws docs/sweep.png.
"""

import argparse
import dataclasses
import heapq
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from megatron_lora.environment import allocator_settings

os.environ.update(allocator_settings(os.environ))  # before anything imports torch
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests")]

from megatron_lora.config.schema import RunConfig, config_of, load_config, load_jobs  # noqa: E402
from megatron_lora.config.sweep_keys import SweepConfig, with_points  # noqa: E402
from megatron_lora.output.events import read_events  # noqa: E402
from megatron_lora.output.leaderboard import read_leaderboard  # noqa: E402
from megatron_lora.output.metrics import metrics_file, read_evaluations, read_metrics  # noqa: E402
from megatron_lora.training.rungs import Result, decide  # noqa: E402
from scripts.bench.stamp import RESULTS, append_line, result_options, stamp  # noqa: E402
from scripts.one_line import OneLineParser, ended, whole  # noqa: E402

CURVES = RESULTS / "sweep_curves.jsonl"
SEEDS = 20
RESIDENT = 8  # points that train at a time where decisions are played
Curve = list[tuple[float, float]]  # (share of the steps, loss)


def record(run: Path) -> dict:
    """Return the curves of a run whose jobs are the points of a grid."""
    config = load_config(run / "config.yaml")
    points = []
    for job in config.jobs:
        steps, found = read_metrics(metrics_file(run, job.name)), read_evaluations(metrics_file(run, job.name))
        values = {key: getattr(job, key) for key in ("learning_rate", "r", "global_batch_size")}
        curve = [[line["step"], line["eval_loss"]] for line in found]
        points.append({"job": job.name, "values": values, "steps": len(steps), "tokens": sum(s["tokens"] for s in steps), "curve": curve})
    shared = {key: value for key, value in dataclasses.asdict(config.jobs[0]).items() if key not in ("name", *points[0]["values"])}
    return {"base_model": Path(config.base_model).name, "job": shared, "points": points}


def recorded() -> list[dict]:
    """Return the recorded points."""
    return json.loads(CURVES.read_text(encoding="utf-8").splitlines()[-1])["points"]


def shares_of(point: dict) -> Curve:
    """Return a point's curve over the share of its steps."""
    return [(step / point["steps"], math.inf if loss is None else loss) for step, loss in point["curve"]]


def at(curve: Curve, share: float) -> float:
    """Return the loss of the evaluation that is nearest to a share of the steps."""
    return min(curve, key=lambda each: abs(each[0] - share))[1]


def play(curves: list[Curve], strategy: str, seed: int) -> tuple[float, float]:
    """Return the share of all steps that a strategy takes, and its regret; RESIDENT points train at a time, in an order by the seed."""
    rng = random.Random(seed)
    order = rng.sample(range(len(curves)), len(curves))
    sweep = SweepConfig(job="a", over={}, strategy="asha" if strategy == "asha" else "successive_halving")
    shares = (*sweep.rungs, 1.0)
    queue, running, results, decided = [(0, place, point) for place, point in enumerate(order)], [], [], set()
    now, spent, ended_ones = 0.0, 0.0, []
    coming = [len(curves), *[0] * len(sweep.rungs)]
    while queue or running:
        while queue and len(running) < RESIDENT:
            rung, place, point = heapq.heappop(queue)
            length = shares[-rung] - (shares[-rung - 1] if rung else 0.0)
            spent += length
            heapq.heappush(running, (now + length, place, point, -rung))
        now, place, point, rung = heapq.heappop(running)
        if rung == len(sweep.rungs):
            ended_ones.append(point)
            continue
        coming[rung] -= 1
        value = rng.random() if strategy == "random" else at(curves[point], shares[rung])
        results.append(Result(rung, 0, order.index(point), value))
        still = {k for k in range(len(sweep.rungs)) if any(coming[: k + 1])}
        for decision in decide(sweep, "min", results, decided, still):
            decided.add((decision.result.rung, decision.result.point))
            if decision.continues:
                coming[decision.result.rung + 1] += 1
                heapq.heappush(queue, (-decision.result.rung - 1, decision.result.point, order[decision.result.point]))
    return spent / len(curves), regret(curves, ended_ones)


def regret(curves: list[Curve], ended_ones: list[int]) -> float:
    """Return the regret of points that were trained to their end."""
    finals = [curve[-1][1] for curve in curves]
    best = min(finals)
    return (min(finals[point] for point in ended_ones) - best) / (statistics.median(finals) - best)


def decisions(options: argparse.Namespace) -> dict:
    """Play every strategy on the recorded curves."""
    curves, found = [shares_of(point) for point in recorded()], {}
    for strategy in ("successive_halving", "asha", "random"):
        played = [play(curves, strategy, seed) for seed in range(SEEDS)]
        tokens, regrets = [share for share, _ in played], [each for _, each in played]
        found[strategy] = {
            "tokens_share": statistics.fmean(tokens),
            "most_tokens_share": max(tokens),
            "regret": statistics.fmean(regrets),
            "most_regret": max(regrets),
        }
    return {"points": len(curves), "seeds": SEEDS, "strategies": found}


def simulate(options: argparse.Namespace) -> dict:
    """Run the real control and planner over points whose curves are recorded ones, each moved a little."""
    from living_plan import World

    from megatron_lora.config.schema import ParallelConfig
    from megatron_lora.parallel.process_groups import initialize_parallel
    from megatron_lora.planning import plan_feed
    from scheduling.simulate import simulate as replayed
    from scheduling.slot_cost import SlotCost, slot_times

    initialize_parallel(ParallelConfig(), "gloo")
    rng, base = random.Random(options.seed), [shares_of(point) for point in recorded()]
    spread = statistics.pstdev(min(9.0, curve[-1][1]) for curve in base)
    curves = []
    for number in range(options.points):
        moved = rng.gauss(0, spread / 10)
        curves.append([(share, loss + moved + rng.gauss(0, spread / 50)) for share, loss in base[number % len(base)]])
    sweep = SweepConfig(job="tune", over={"seed": {"choices": list(range(options.points))}}, strategy=options.strategy)
    written = {"name": "tune", "datasets": [{"path": "nowhere.jsonl", "type": "text"}], "val_set_size": 1, "r": 16}
    jobs = list(load_jobs(None, with_points(sweep, [written]), 0))
    lengths = {job.name: [[rng.randint(64, 1024) for _ in range(8)] for _ in range(27)] for job in jobs}
    held = dict.fromkeys(lengths, [512] * 8)

    def value_of(name: str, step: int) -> float:
        return at(curves[int(name[-3:])], step / 27)

    seconds: list[float] = []

    def timed(self, asked, joined, before=plan_feed._Planner.plan):
        begun = time.perf_counter()
        try:
            return before(self, asked, joined)
        finally:
            seconds.append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(plan_feed._Planner, "plan", timed):
        world = World(Path(folder), jobs, lengths, num_stages=4, room=jobs[:64], validation=held, capacity=8192, value_of=value_of)
        world.settings = dataclasses.replace(world.settings, num_slots=32, max_endings=16)
        world.run()
        done = [int(name[-3:]) for name, state in world.states.items() if state == "done"]
        stream = tuple(slot for window in world.windows for slot in window.stream)
        planned = sum(sum(lengths[name][step]) for name, steps in world.trained.items() for step in steps)
    numbered = [lengths[job.name] for job in jobs]
    times = slot_times(stream, numbered, SlotCost(), dict.fromkeys(range(len(jobs)), [512] * 8))
    timeline = replayed(stream, [times] * 4, [[2 * each for each in times]] * 4)
    return {
        "points": options.points,
        "strategy": options.strategy,
        "tokens_share": planned / sum(map(sum, itertools.chain.from_iterable(numbered))),
        "regret": regret(curves, done),
        "survivors": len(done),
        "bubble": statistics.fmean(timeline.bubble(stage) for stage in range(4)),
        "noops_share": sum(slot.is_noop for slot in stream) / len(stream),
        "windows": len(seconds),
        "planning_s": sum(seconds),
        "planning_ms_a_slot": 1e3 * sum(seconds) / len(stream),
        "most_planning_s": max(seconds),
    }


def live(options: argparse.Namespace) -> dict:
    """Train some of the recorded points as a sweep, as a grid and two of them one by one; compare the sweep with what was recorded."""
    from scripts.bench.trained import trained

    points = {json.dumps(point["values"]): point for point in recorded()}
    over = {key: sorted({point["values"][key] for point in points.values()}) for key in ("learning_rate", "r", "global_batch_size")}
    job = {"name": "tune", "datasets": [{"path": str(options.data), "type": "prompt_completion"}], "val_set_size": 16, "sequence_len": 128}
    job |= {"warmup_ratio": 0.1, "keep": "last", "target_modules": ["q_proj", "v_proj"]}
    sweep = {"job": "tune", "over": over, "num": options.points, "seed": options.seed}
    seconds, compared, survivors = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        common = {"base_model": options.model, "output_dir": f"{folder}/run", "microbatch_tokens": 384, "jobs": [job]}

        def train(case: str, config: RunConfig) -> None:
            run = trained(config)
            assert run is not None
            seconds[case] = run.makespan_s
            print(f"{case}: {seconds[case]:.0f} s", flush=True)

        config = config_of(common | {"jobs": [dict(job)], "sweep": sweep | {"strategy": "successive_halving"}})
        train("sweep", config)
        for row in read_leaderboard(Path(config.output_dir))["tune"]["points"]:
            curve = dict(points[json.dumps(row["values"])]["curve"])
            found = read_evaluations(metrics_file(config.output_dir, row["job"]))
            differences = [abs(line["eval_loss"] - curve[line["step"]]) / curve[line["step"]] for line in found]
            compared[row["job"]] = max(differences)
            survivors += [row["values"]] if row["state"] == "done" else []
        chosen = [points[json.dumps({key: getattr(each, key) for key in over})] for each in config.jobs]
        curves = [shares_of(point) for point in chosen]
        wanted = halved(curves)
        train("grid", dataclasses.replace(config, jobs=tuple(dataclasses.replace(each, point=None) for each in config.jobs)))
        for number in (0, len(config.jobs) // 2):
            train(f"alone {number}", dataclasses.replace(config, jobs=(dataclasses.replace(config.jobs[number], point=None),)))
    alone = [value for case, value in seconds.items() if case.startswith("alone")]
    return {
        "points": options.points,
        "survivors": survivors,
        "survivors_of_recorded_curves": [chosen[point]["values"] for point in wanted],
        "relative_differences": compared,
        "seconds": seconds,
        "one_by_one_s": statistics.fmean(alone) * options.points,
    }


def halved(curves: list[Curve]) -> list[int]:
    """Return which points halving trains to their end."""
    return [point for point, share in enumerate(stopped_at(curves)) if share == 1.0]


def stopped_at(curves: list[Curve]) -> list[float]:
    """Return at which share of its steps halving stops each point."""
    sweep = SweepConfig(job="a", over={}, strategy="successive_halving")
    shares, there = [1.0] * len(curves), list(range(len(curves)))
    for rung, share in enumerate(sweep.rungs):
        found = decide(sweep, "min", [Result(rung, 0, point, at(curves[point], share)) for point in there], (), ())
        there = [decision.result.point for decision in found if decision.continues]
        shares = [share if shares[point] == 1.0 and point not in there else shares[point] for point in range(len(curves))]
    return shares


def picture(options: argparse.Namespace) -> dict:
    """Draw the recorded points as halving would have trained them."""
    from megatron_lora.commands.sweep import draw

    points = recorded()
    stops = stopped_at([shares_of(point) for point in points])
    rows, jobs = [], {}
    for point, stop in zip(points, stops, strict=True):
        curve = [(step, loss) for step, loss in point["curve"] if step <= round(stop * point["steps"])]
        state, name = ("done" if stop == 1.0 else "stopped"), point["job"].replace("grid", "names")
        rows.append({"job": name, "values": point["values"], "state": state, "value": min(loss for _, loss in curve)})
        jobs[name] = SimpleNamespace(num_steps=point["steps"], evaluated=lambda metric, curve=curve: curve)
    rows.sort(key=lambda row: row["value"])
    over = ["learning_rate", "global_batch_size", "r"]
    board = {"metric": "eval_loss", "mode": "min", "strategy": "successive_halving", "over": over, "points": rows}
    draw(str(options.picture), {"names, 32 points, halving": board}, cast(Any, SimpleNamespace(jobs=jobs)))
    return {"picture": options.picture.name, "stopped": {f"{share:.3g}": stops.count(share) for share in sorted(set(stops))}}


def gpu(options: argparse.Namespace) -> dict:
    """Train points of an 8B shape as a sweep and as a grid, and some one by one; losses are those of recorded curves."""
    from megatron_lora.training.sweeps import Sweeps
    from scripts.bench.model_shapes import write_config
    from scripts.bench.trained import trained
    from scripts.bench.workloads import SUITE, read_workload, write_lengths

    curves = [shares_of(point) for point in recorded()]
    pool = [tokens for steps in read_workload(SUITE, "het-s4") for batch in steps for tokens in batch]
    seconds: dict[str, float] = {}
    shown: dict[str, int] = {}

    def tell(self, job, step, value, num_steps, before=Sweeps.tell):
        before(self, job, step, at(curves[job.point.number % len(curves)], step / num_steps) if job.point else value, num_steps)

    with nullcontext(options.runs) if options.runs else tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(options.shape, folder, options.num_layers)
        write_lengths(folder / "train.jsonl", [pool[k % len(pool)] for k in range(options.steps * options.batch)], 0.25)
        write_lengths(folder / "held.jsonl", pool[:4], 0.25)
        job = {"name": "tune", "datasets": [{"path": str(folder / "train.jsonl"), "type": "lengths"}], "global_batch_size": options.batch}
        job |= {"val_datasets": [{"path": str(folder / "held.jsonl"), "type": "lengths"}], "max_steps": options.steps, "keep": "last"}
        job |= {"sequence_len": max(pool), "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "warmup_ratio": 0.0}
        over = {"seed": list(range(options.points // 4)), "r": [8, 16, 24, 32]}
        common = {"base_model": str(folder), "load_weights": False, "microbatch_tokens": options.budget, "recompute": "none"}

        def train(case: str, jobs: list[dict], sweep: dict | None = None) -> None:
            out = {"output_dir": str(folder / case), "jobs": jobs} | ({"sweep": sweep} if sweep else {})
            with mock.patch.object(Sweeps, "tell", tell):
                run = trained(config_of(common | out))
            assert run is not None
            seconds[case], shown[case] = run.makespan_s, run.tokens
            print(f"{case}: {run.makespan_s:.1f} s, {run.tokens:,} tokens, bubble {run.bubble(0):.1%}", flush=True)

        sweep = {"job": "tune", "over": over}
        train("uncounted", [job | {"max_steps": 2}])
        train("sweep", [dict(job)], sweep | {"strategy": options.strategy})
        made = [event.event for event in read_events(folder / "sweep") if "rung" in event.details]
        train("grid", [dict(job)], sweep | {"strategy": "grid"})
        for number, r in enumerate(over["r"]):
            train(f"alone-{r}", [job | {"seed": number, "r": r}])
    alone = [value for case, value in seconds.items() if case.startswith("alone")]
    return {
        "points": options.points,
        "strategy": options.strategy,
        "device_seconds": seconds,
        "tokens": shown,
        "one_by_one_s": statistics.fmean(alone) * options.points,
        "promoted": made.count("promoted"),
        "stopped": made.count("stopped"),
    }


def kills(options: argparse.Namespace) -> dict:
    """Kill a sweep of a tiny model on two stages ten times, at random moments; AssertionError where it decides otherwise than unbroken."""
    import rank_pool
    import sweep_scripts

    from megatron_lora.config.schema import ParallelConfig

    ranks = rank_pool.RankPool()

    def pool(pp: int = 1):
        return SimpleNamespace(run=lambda function, *words: ranks.run(ParallelConfig(pipeline=pp), function, *words))

    with closing(ranks), tempfile.TemporaryDirectory() as folder:
        scene = sweep_scripts.make_scene(Path(folder))
        whole = sweep_scripts.play(pool, scene, Path(folder) / "whole", {"pp": 2})
        killed = sweep_scripts.play(pool, scene, Path(folder) / "killed", {"pp": 2}, random.Random(options.seed), num_kills=10)
        sweep_scripts.check(whole, killed)
        for outcome in (whole, killed):
            sweep_scripts.check_survivors(pool, scene, outcome)
        return {"kills": killed.kills, "decisions": len(whole.decisions), "survivors": whole.survivors}


CASES = {"decisions": decisions, "simulate": simulate, "live": live, "kills": kills, "picture": picture, "gpu": gpu}


def main() -> int:
    """Run one case, and append its line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("record", *CASES))
    parser.add_argument("run", type=Path, nargs="?", help="of record: a finished run")
    parser.add_argument("--points", type=whole, help="default: 256, 9 or 64")
    parser.add_argument("--strategy", choices=("successive_halving", "asha"), default="asha")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="of live: the records that the grid was trained on")
    parser.add_argument("--picture", type=Path, default=Path("docs/sweep.png"))
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--num-layers", type=whole)
    parser.add_argument("--steps", type=whole, default=9)
    parser.add_argument("--batch", type=whole, default=4)
    parser.add_argument("--budget", type=whole, default=8192)
    parser.add_argument("--runs", type=Path, help="of gpu: where runs stay")
    result_options(parser, "sweeps.jsonl")
    options = parser.parse_args()
    options.points = options.points or {"simulate": 256, "live": 9, "gpu": 64}.get(options.case)
    if options.case == "record":
        found, file = record(options.run), CURVES
    else:
        found = CASES[options.case](options)
        file = options.output
        print(json.dumps(found, indent=1))
    case = f"{options.case}, {options.strategy}" if options.case in ("simulate", "gpu") else options.case
    line = stamp(options.hardware, options.commit) | {"case": case, "seed": options.seed}
    append_line(file, line | (found if options.case == "record" else {"results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
