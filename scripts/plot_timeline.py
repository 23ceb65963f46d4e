"""Draws what a run did on each pipeline stage, from its timeline.json and the plan that it executed.

One row per stage. A box is the forward (upper half) or backward (lower half) of one microbatch; its colours are the jobs whose
tokens it holds, in proportion. A tick is a job's optimizer step. White means that the stage waited.

    python scripts/plot_timeline.py runs/quickstart-1 --from 0 --until 30 --output timeline.png
"""

import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import yaml

sys.path[:0] = [str(Path(__file__).resolve().parent / "bench")]

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from one_line import OneLineParser, ended, finished_run  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402

ROW = 1.0
BOX = 0.4  # height of a forward or a backward


def read_plan(run: Path) -> list[Counter]:
    """Return, for each slot of the run, the tokens of each job (by number) in it."""
    slots = []
    for window in sorted((run / "plan").glob("window-*.json")):
        for microbatch in json.loads(window.read_text(encoding="utf-8"))["microbatches"]:
            tokens: Counter = Counter()
            for job, _, _, num_tokens in microbatch:
                tokens[job] += num_tokens
            slots.append(tokens)
    return slots


def read_spans(run: Path) -> list[tuple[int, str, int, float, float]]:
    """Return (stage, "F" | "B" | "STEP", slot or job, start in s, seconds) of each stage's first rank, in order of time."""
    events = [event for event in json.loads((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"] if event["ph"] == "X"]
    first_rank = {stage: min(event["tid"] for event in events if event["pid"] == stage) for stage in {event["pid"] for event in events}}
    spans = [
        (event["pid"], event["cat"], int(event["name"].split()[-1]), event["ts"] / 1e6, event["dur"] / 1e6)
        for event in events
        if event["tid"] == first_rank[event["pid"]] and event["cat"] in ("F", "B", "STEP")
    ]
    return sorted(spans, key=lambda span: span[3])


def draw(axes: pyplot.Axes, spans: list[tuple[int, str, int, float, float]], slots: list[Counter], colours: list) -> None:
    """Draw the boxes of all stages; stage 0 is the uppermost row."""
    for stage, kind, index, start, seconds in spans:
        top = -stage * ROW
        if kind == "STEP":
            axes.plot([start + seconds / 2] * 2, [top - 0.05, top + 0.05], color=colours[index], linewidth=3, zorder=3)
            continue
        edge = top + 0.05 if kind == "F" else top - 0.05
        height = BOX if kind == "F" else -BOX
        total = sum(slots[index].values())
        for job, tokens in sorted(slots[index].items()):
            part = height * tokens / total
            axes.bar(start, part, seconds, edge, align="edge", color=colours[job])
            edge += part
        if total:
            axes.bar(start, -height, seconds, edge, align="edge", fill=False, edgecolor="white", linewidth=0.6)


def main() -> None:
    """Draw the part of a run between two moments."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--from", dest="first_s", type=float, default=0.0, help="seconds after the run's first microbatch")
    parser.add_argument("--until", dest="last_s", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, help="default: timeline.png in the run's directory")
    arguments = parser.parse_args()
    run = arguments.run
    with finished_run(run):
        names = [job["name"] for job in yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["jobs"]]
        all_spans, slots = read_spans(run), read_plan(run)
    colours = [pyplot.get_cmap("tab10")(number % 10) for number in range(len(names))]
    spans = [span for span in all_spans if span[3] + span[4] > arguments.first_s and span[3] < arguments.last_s]
    if not spans:
        raise UserError("--from, --until: nothing happened in that part of the run; name another")
    num_stages = 1 + max(span[0] for span in spans)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.9 * num_stages))
    draw(axes, spans, slots, colours)
    end = max(span[3] + span[4] for span in spans)
    axes.set(xlim=(arguments.first_s, min(arguments.last_s, end)), ylim=(-num_stages * ROW + 0.5, 0.5), xlabel="seconds")
    ticks = [(-stage * ROW + side, f"stage {stage} {what}") for stage in range(num_stages) for side, what in ((0.25, "F"), (-0.25, "B"))]
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=handles, ncols=min(len(names), 6), loc="upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    target = arguments.output or run / "timeline.png"
    figure.savefig(target, dpi=110)
    print(f"Timeline: {target}")


if __name__ == "__main__":
    sys.exit(ended(main))
