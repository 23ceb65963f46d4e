"""Compares what a run's timeline.json shows with what the simulator predicts for its plan from the run's own action times.

Every forward and backward takes the time that it took (the mean over the ranks of its stage), a step the mean step; the simulator adds
waiting alone. What reality has beyond that is communication, launches and late plans. --output adds a line to a file, as
scripts/bench/results/timeline.jsonl; --cost fits a cost model to the times, for `megatron-lora plan --cost`.

    python scripts/bench/compare_timeline.py runs/quickstart-1 --hardware "2 CPU cores" [--cost cost.json]
"""

import datetime
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from one_line import OneLineParser, ended, finished_run, new_file, output_file  # noqa: E402
from stamp import append_line  # noqa: E402

from megatron_lora.config.schema import RunConfig, load_config  # noqa: E402
from megatron_lora.errors import UserError  # noqa: E402
from megatron_lora.huggingface.architecture import read_architecture  # noqa: E402
from megatron_lora.huggingface.hub import resolve_base_model  # noqa: E402
from megatron_lora.planning.predict import cost_of  # noqa: E402
from scheduling.cost import DEVICES, CostModel, Measurement, refine  # noqa: E402
from scheduling.plan_json import stream_from_json  # noqa: E402
from scheduling.simulate import simulate  # noqa: E402


def read_plan(run: Path) -> list:
    """Return the executed slots in the contract's format."""
    windows = sorted((run / "plan").glob("window-*.json"))
    return [slot for window in windows for slot in json.loads(window.read_text(encoding="utf-8"))["microbatches"]]


def read_spans(run: Path) -> dict[tuple[int, str], dict[int, list[tuple[float, float]]]]:
    """Return (start, end) in seconds of each action on every rank of its stage: [stage, kind][slot, or job of a STEP]."""
    spans: dict[tuple[int, str], dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for event in json.loads((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] == "X":
            start = event["ts"] / 1e6
            spans[event["pid"], event["cat"]][int(event["name"].split()[-1])].append((start, start + event["dur"] / 1e6))
    return spans


def seconds_of(spans, stage: int, kind: str, num_slots: int) -> list[float]:
    """Return the mean seconds of each slot's forward or backward on a stage; 0 for a no-op."""
    of_stage = spans[stage, kind]
    return [statistics.fmean(end - start for start, end in of_stage[slot]) if slot in of_stage else 0.0 for slot in range(num_slots)]


def compare(run: Path, config: RunConfig) -> dict:
    """Return predicted and real makespan, bubbles per stage, and the time that stages waited for plans."""
    parallel, slots, spans = config.parallel, read_plan(run), read_spans(run)
    stages = range(parallel.pipeline)
    forward, backward = ([seconds_of(spans, stage, kind, len(slots)) for stage in stages] for kind in "FB")
    steps = [end - start for stage in stages for taken in spans[stage, "STEP"].values() for start, end in taken]
    step_s = statistics.fmean(steps) if steps else 0.0
    delay = int(parallel.tensor * parallel.data > 1)
    predicted = simulate(stream_from_json(slots), parallel.pipeline, forward, backward, step_s=step_s, delay=delay)
    actions = [span for (_, kind), found in spans.items() if kind in ("F", "B", "STEP") for taken in found.values() for span in taken]
    real_s = max(end for _, end in actions) - min(start for start, _ in actions)
    ranks = parallel.tensor * parallel.data
    busy = [sum(forward[s]) + sum(backward[s]) + sum(e - b for t in spans[s, "STEP"].values() for b, e in t) / ranks for s in stages]
    waits = sorted((index, max(end - start for start, end in found)) for s in stages for index, found in spans[s, "wait plan"].items())
    return {
        "slots": len(slots),
        "windows": len(list((run / "plan").glob("window-*.json"))),
        "predicted_s": predicted.makespan_s,
        "real_s": real_s,
        "predicted_bubble": [predicted.bubble(stage) for stage in stages],
        "real_bubble": [1 - each / real_s for each in busy],
        "first_plan_wait_s": max((wait for index, wait in waits if index == 0), default=0.0),
        "later_plan_wait_s": sum(wait for index, wait in waits if index > 0) / parallel.pipeline,
    }


def fit(run: Path, config: RunConfig) -> CostModel:
    """Fit the analytic cost of the config's stages to a run's times (of a single replica: others plan rounds)."""
    if config.parallel.data > 1:
        raise UserError("--cost: fits runs of one replica; measure one with parallel.data=1")
    slots, spans = read_plan(run), read_spans(run)
    measured = []
    for stage in range(config.parallel.pipeline):
        for kind in "FB":
            for slot, seconds in zip(slots, seconds_of(spans, stage, kind, len(slots)), strict=True):
                tokens = [entry[3] for entry in slot]
                ranked = sum(entry[3] * config.jobs[entry[0]].r for entry in slot)
                measured.append(Measurement(stage, kind == "B", sum(tokens), sum(n * n for n in tokens), ranked, seconds))
    device = DEVICES["h100" if json.loads((run / "env.json").read_text(encoding="utf-8")).get("devices") else "cpu"]
    return refine(cost_of(config, read_architecture(resolve_base_model(config.base_model)), device), measured)


def main() -> None:
    """Print the comparison of one run; keep what was asked for."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--hardware", required=True, help="what it ran on, as a table shall say it")
    parser.add_argument("--cost", type=new_file, help="write a fitted cost model here")
    parser.add_argument("--output", type=output_file, help="also add a line of results to this file")
    arguments = parser.parse_args()
    config = load_config(arguments.run / "config.yaml")
    with finished_run(arguments.run):
        found = compare(arguments.run, config)
        environment = json.loads((arguments.run / "env.json").read_text(encoding="utf-8"))
    model = fit(arguments.run, config) if arguments.cost is not None else None
    print(f"{'':10} {'predicted':>10} {'real':>10}")
    print(f"{'makespan':10} {found['predicted_s']:>8.2f} s {found['real_s']:>8.2f} s")
    for stage, (predicted, real) in enumerate(zip(found["predicted_bubble"], found["real_bubble"], strict=True)):
        print(f"{f'bubble {stage}':10} {predicted:>10.1%} {real:>10.1%}")
    print(f"waited for plans: {found['first_plan_wait_s']:.2f} s for the first, {found['later_plan_wait_s']:.3f} s a stage for the others")
    line = {"date": datetime.date.today().isoformat(), "hardware": arguments.hardware, "commit": environment.get("commit"), **found}
    line |= {"devices": environment.get("devices"), "packages": environment.get("packages"), "parallel": str(config.parallel)}
    line |= {"base_model": config.base_model, "microbatch_tokens": config.microbatch_tokens, "seed": config.seed}
    line |= {"jobs": [{"name": job.name, "r": job.r, "global_batch_size": job.global_batch_size} for job in config.jobs]}
    if model is not None:
        arguments.cost.write_text(json.dumps(model.to_json(), indent=1) + "\n", encoding="utf-8")
    if arguments.output is not None:
        append_line(arguments.output, line)


if __name__ == "__main__":
    sys.exit(ended(main))
