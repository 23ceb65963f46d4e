"""A picture of loss curves, from the metrics.jsonl files of a run's jobs.

plot_losses({"summarise": "runs/a/jobs/summarise/metrics.jsonl"}, "runs/a/losses.png")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lora.output.metrics import read_evaluations, read_metrics

SMOOTHING = 0.8  # weight of the past in the bold curve


def plot_losses(files: Mapping[str, str | Path], output: str | Path) -> None:
    """Draw the loss of each job over its steps, its running mean in bold, evaluations dashed; UserError when a file cannot be read."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = cast(Any, colormaps["tab10" if len(files) <= 10 else "tab20"]).colors  # both are listed colours
    for index, (name, path) in enumerate(files.items()):
        points = [(step["step"], step["loss"]) for step in read_metrics(path) if step.get("loss") is not None]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        color = colors[index % len(colors)]
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=color, linewidth=1.8, label=name, marker="o" if len(steps) == 1 else None)
        points = [(line["step"], line["eval_loss"]) for line in read_evaluations(path) if line["eval_loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "s--", color=color, linewidth=1.4, markersize=4, label=f"{name}, validation")
    axes.set_xlabel("optimizer step of the job")
    axes.set_ylabel("loss per target token")
    axes.grid(alpha=0.25)
    if files:
        axes.legend(fontsize="small", ncols=1 + len(files) // 16)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start: the first value is the first loss."""
    mean = weight = 0.0
    smoothed = []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
