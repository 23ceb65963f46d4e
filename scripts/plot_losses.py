"""Draws the loss curves of a run's jobs from their metrics.jsonl.

A thin line is each step's loss, a thick one the mean per target token over five steps. Writes losses.png into the run's directory.

    python scripts/plot_losses.py runs/quickstart-1
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def read_losses(file: Path) -> list[tuple[int, float, int]]:
    """Return (step, loss, target tokens) of every step whose loss was finite."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"], row["target_tokens"]) for row in rows if row.get("loss") is not None]


def mean(losses: list[tuple[int, float, int]]) -> float:
    """Return the loss per target token over some steps."""
    return sum(loss * num_targets for _, loss, num_targets in losses) / sum(num_targets for _, _, num_targets in losses)


def main() -> None:
    """Plot all jobs of a run into one picture and say, for each, how its loss has moved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    files = sorted(run.glob("jobs/*/metrics.jsonl"))
    if not files:
        parser.error(f"{run}: has no jobs/*/metrics.jsonl; name the output directory of a run")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for file in files:
        losses = read_losses(file)
        if not losses:
            continue
        steps, values = [step for step, _, _ in losses], [loss for _, loss, _ in losses]
        (line,) = axes.plot(steps, [mean(losses[max(0, i - 2) : i + 3]) for i in range(len(losses))], label=file.parent.name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.3, linewidth=1)
        few = max(1, len(losses) // 4)
        print(f"{file.parent.name:16} loss {mean(losses[:few]):.3f} in its first {few} steps, {mean(losses[-few:]):.3f} in its last {few}")
    axes.set(xlabel="step of the job", ylabel="loss (mean per target token)", title="thin: each step; thick: mean over five steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "losses.png", dpi=120)
    print(f"Loss curves: {run / 'losses.png'}")


if __name__ == "__main__":
    main()
