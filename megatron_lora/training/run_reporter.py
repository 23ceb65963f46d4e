"""The first rank's reporter: step reports go to the observers (terminal, files, trackers), job states to status.json.

Steps' numbers reach the host some time after the step (step_reporter.py), and a thread writes the
adapters (snapshots.py). A job's state follows from both: it is "running" from its first report on,
"failed" after three skipped steps in a row, and "done" once its adapter is written. Steps of a failed
job that are already planned still run, but its optimizer skips them and they are not reported.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Sequence

from megatron_lora.config.schema import RunConfig
from megatron_lora.output.metrics import JobSummary, Observer, StepReport
from megatron_lora.output.observers import make_observers
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.standing import ResumePoint
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import TrainingJob
from megatron_lora.training.optimizer import MAX_SKIPPED_IN_A_ROW, learning_rate_at
from megatron_lora.training.step_reporter import StepReporter

Written = queue.SimpleQueue[tuple[int, int]]  # (job, steps taken) of each saved job whose files are on disk


class RunReporter:
    """Everything that the first rank reports.

    A context manager, which closes the observers also after an exception.
    """

    def __init__(
        self, config: RunConfig, jobs: Sequence[TrainingJob], remove: Callable[[int], None], resume_points: Sequence[ResumePoint] = ()
    ):
        """Join the run's directory, which must exist, and start the observers.

        `remove(job)` removes a failed job from the windows still to be planned. `resume_points`: where each
        job resumes; by default each starts at step 0.
        """
        self.jobs = jobs
        self.remove = remove
        resume_points = resume_points or [ResumePoint()] * len(jobs)
        for job, point in zip(jobs, resume_points, strict=True):
            resumes = f", resumes after step {point.step}" if point.step else ""
            print(f"{job.config.name}: {job.data.describe()}; {job.num_steps} steps{resumes}", flush=True)
            _warn_of_no_learning(job)
        self.directory = RunDirectory.join(config)
        summaries = [JobSummary(job.config.name, job.num_steps, point.step) for job, point in zip(jobs, resume_points, strict=True)]
        self.observers: Sequence[Observer] = make_observers(config.output_dir, summaries)
        self.steps = StepReporter(jobs, self._report, [point.step for point in resume_points])
        self.on_forward = self.steps.on_forward
        self.skipped_in_a_row = [point.state.skipped_in_a_row if point.state else 0 for point in resume_points]
        self.states = ["queued"] * len(jobs)

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *exception) -> None:
        for observer in self.observers:
            observer.close()
        self.directory.close()

    def on_step(self, done: StepDone, written: Written, *, wait: bool = False) -> None:
        """Queue the report of a step, and update the states of jobs whose adapters were `written`.

        With `wait` the step is reported before this returns.
        """
        self.steps.on_step(done)
        if wait:
            self.flush()
        self._update_states(written)

    def flush(self) -> None:
        """Report all steps so far; waits for the device."""
        self.steps.flush(wait=True)

    def finish(self, written: Written, *, stopped: bool) -> None:
        """Report the last steps and states; if the run was `stopped`, unfinished jobs become "paused"."""
        self.flush()
        self._update_states(written)
        for job, state in enumerate(self.states):
            if stopped and state in ("queued", "running"):
                self._set_state(job, "paused", "the run was stopped; the same command resumes it")

    def _update_states(self, written: Written) -> None:
        while not written.empty():
            job, step = written.get()
            if step == self.jobs[job].num_steps:
                self._set_state(job, "done", "")

    def _report(self, job: int, report: StepReport) -> None:
        if self.states[job] == "failed":
            return
        if self.states[job] == "queued":
            self._set_state(job, "running", "")
        for observer in self.observers:
            observer.on_step(report)
        self.skipped_in_a_row[job] = self.skipped_in_a_row[job] + 1 if report.skipped else 0
        if self.skipped_in_a_row[job] == MAX_SKIPPED_IN_A_ROW:
            reason = f"the gradient norm was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last of them step {report.step}"
            self._set_state(job, "failed", reason)
            self.remove(job)

    def _set_state(self, job: int, state: str, reason: str) -> None:
        name = self.jobs[job].config.name
        self.states[job] = state
        self.directory.set_job(name, state, reason)
        for observer in self.observers:
            observer.on_status(name, state, reason)


def _warn_of_no_learning(job: TrainingJob) -> None:
    """Warn of a learning rate that is 0 in all of a job's steps: its adapter would never change."""
    rate, name = learning_rate_at(job.optimizer()), job.config.name
    if any(rate(step) > 0 for step in range(job.num_steps)):
        return
    key, cure = ("warmup_ratio", "use 0, or more steps") if job.config.learning_rate > 0 else ("learning_rate", "use a number above 0")
    value = getattr(job.config, key)
    print(
        f"megatron-lora: warning: jobs.{name}.{key}: {value:g} leaves a learning rate of 0 in all steps ({job.num_steps}), so the adapter "
        f"will not move; {cure}",
        file=sys.stderr,
        flush=True,
    )
