"""Experiment trackers as observers: TensorBoard event files in `jobs/<name>/`, and Weights & Biases when a project is set.

tensorboard --logdir OUTPUT_DIR/jobs                             a run per job, with the same tags, so that their curves share a chart
MEGATRON_LORA_WANDB=my-project megatron-lora train CONFIG        a W&B run per job, grouped under the output directory's name
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_lora.errors import UserError
from megatron_lora.output.job_states import OVER
from megatron_lora.output.metrics import EvalReport, JobSummary, Observer, StepReport


def scalars(report: StepReport | EvalReport) -> dict[str, float]:
    """Return tag -> number for the curves of a step or an evaluation, without numbers that are not finite."""
    logged = report.logged()
    if isinstance(report, EvalReport):
        names = ("eval_loss", "eval_perplexity", "eval_accuracy", *report.reported)
        return {f"eval/{name.removeprefix('eval_')}": logged[name] for name in names if logged.get(name) is not None}
    names = ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "target_tokens", "seconds", *report.reported)
    values = {f"train/{name}": logged[name] for name in names if logged[name] is not None}
    return {**values, "train/skipped": float(report.skipped)}


class TensorBoardMetrics(Observer):
    """Writes an event file per job."""

    def __init__(self, output_dir: str | Path):
        self._jobs_dir = Path(output_dir) / "jobs"
        self._writers: dict[str, SummaryWriter] = {}

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        for job in (job for job in jobs if job.name not in self._writers):
            # A job that resumes takes its later steps again: those of earlier starts are not shown.
            purge = job.first_step + 1 if job.first_step else None
            self._writers[job.name] = SummaryWriter(str(self._jobs_dir / job.name), flush_secs=10, purge_step=purge)

    def on_step(self, report: StepReport | EvalReport) -> None:
        for tag, value in scalars(report).items():
            self._writers[report.job].add_scalar(tag, value, report.step)

    on_evaluation = on_step

    def on_status(self, job: str, state: str, reason: str) -> None:
        if state in OVER and job in self._writers:  # else it has never joined
            writer = self._writers.pop(job)
            if state == "failed":
                writer.add_text("state", f"failed: {reason}")
            writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class WandbMetrics(Observer):
    """Reports to a Weights & Biases run per job."""

    def __init__(self, output_dir: str | Path, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]  an extra
        except ImportError:
            raise UserError(f"MEGATRON_LORA_WANDB: {project!r} needs the package wandb; pip install wandb, or unset it") from None
        self._wandb = wandb
        self._output_dir = Path(output_dir)
        self._project = project
        self._runs = {}

    def on_start(self, jobs: Sequence[JobSummary]) -> None:
        for job in (job for job in jobs if job.name not in self._runs):
            try:
                self._runs[job.name] = self._wandb.init(
                    project=self._project,
                    group=self._output_dir.name,
                    name=job.name,
                    dir=str(self._output_dir / "jobs" / job.name),
                    config={"total_steps": job.total_steps},
                    reinit="create_new",
                )
            except self._wandb.Error as error:
                self.close()
                reason = (str(error).splitlines() or ["no reason given"])[0]
                raise UserError(
                    f"MEGATRON_LORA_WANDB: {self._project!r} cannot be reported to ({reason}); run wandb login, or unset it"
                ) from None

    def on_step(self, report: StepReport) -> None:
        self._runs[report.job].log(scalars(report), step=report.step)

    def on_evaluation(self, report: EvalReport) -> None:
        self._runs[report.job].log(scalars(report), step=report.step)
        if report.best is not None:
            self._runs[report.job].summary["best"] = dataclasses.asdict(report.best)

    def on_status(self, job: str, state: str, reason: str) -> None:
        if job in self._runs:
            self._runs[job].summary["state"] = f"{state}: {reason}" if reason else state
        if state in OVER and job in self._runs:
            self._runs.pop(job).finish()

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()
        self._runs = {}
