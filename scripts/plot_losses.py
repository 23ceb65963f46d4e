"""Draws the loss curves of a run's jobs and prints how far each loss fell, and the lowest one of validation.

    python scripts/plot_losses.py runs/quickstart-1

Writes losses.png into the run's directory; loss_picture.py does the drawing.
"""

from pathlib import Path

from loss_picture import plot_losses
from one_line import OneLineParser

from megatron_lora.output.metrics import read_evaluations, read_metrics


def mean_loss(rows: list[dict]) -> float:
    """Return the loss per target token over some steps."""
    return sum(row["loss"] * row["target_tokens"] for row in rows) / sum(row["target_tokens"] for row in rows)


def main() -> None:
    """Plot all jobs of a run into one picture; print each job's loss over its first and its last quarter."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    files = {file.parent.name: file for file in sorted(run.glob("jobs/*/metrics.jsonl"))}
    if not files:
        parser.error(f"{run}: has no jobs/*/metrics.jsonl; name the output directory of a run")
    for name, file in files.items():
        rows = [row for row in read_metrics(file) if row.get("loss") is not None]
        if rows:
            quarter = max(1, len(rows) // 4)
            first, last = mean_loss(rows[:quarter]), mean_loss(rows[-quarter:])
            evaluations = [line for line in read_evaluations(file) if line["eval_loss"] is not None]
            best = min(evaluations, key=lambda line: line["eval_loss"], default=None)
            validation = f"; of validation {best['eval_loss']:.3f} at the lowest, after step {best['step']}" if best else ""
            print(f"{name:16} loss {first:.3f} in its first {quarter} steps, {last:.3f} in its last {quarter}{validation}")
    plot_losses(files, run / "losses.png")
    print(f"Loss curves: {run / 'losses.png'}")


if __name__ == "__main__":
    main()
