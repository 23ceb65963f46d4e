"""The first rank's reporter: reports go to the observers, states of jobs to status.json.

Numbers arrive after the fact (step_reporter.py) and adapters are written beside the run (snapshots.py); here both become what people see:
a job runs from its first report on, has failed after three skipped steps in a row, and is done once its adapter is written. What was
planned of a job before it failed still runs, but its optimizer takes no step there and nothing is reported.
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

Written = queue.SimpleQueue[tuple[int, int]]  # (job, steps taken) of what is on the disk


class RunReporter:
    """Everything that only the first rank tells. A context manager: observers are closed whatever happens."""

    def __init__(self, config: RunConfig, jobs: Sequence[TrainingJob], leave: Callable[[int], None], standings: Sequence[ResumePoint] = ()):
        """Take up the run's directory, which exists, and start the observers; `leave(job)` ends a failed job's part of the plan.

        `standings`: where each job goes on; by itself each begins.
        """
        self.jobs, self.leave = jobs, leave
        standings = standings or [ResumePoint()] * len(jobs)
        for job, standing in zip(jobs, standings, strict=True):
            goes_on = f", goes on after step {standing.step}" if standing.step else ""
            print(f"{job.config.name}: {job.data.describe()}; {job.num_steps} steps{goes_on}", flush=True)
            _warn_of_no_learning(job)
        self.directory = RunDirectory.join(config)
        summaries = [JobSummary(job.config.name, job.num_steps, standing.step) for job, standing in zip(jobs, standings, strict=True)]
        self.observers: Sequence[Observer] = make_observers(config.output_dir, summaries)
        self.steps = StepReporter(jobs, self._report, [standing.step for standing in standings])
        self.on_forward = self.steps.on_forward
        self.skipped_in_a_row = [standing.state.skipped_in_a_row if standing.state else 0 for standing in standings]
        self.states = ["queued"] * len(jobs)

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *exception) -> None:
        for observer in self.observers:
            observer.close()
        self.directory.close()

    def on_step(self, done: StepDone, written: Written, *, wait: bool = False) -> None:
        """Note a step that was taken, and the adapters that were written meanwhile; with `wait` its report is given out at once."""
        self.steps.on_step(done)
        if wait:
            self.flush()
        self._note(written)

    def flush(self) -> None:
        """Give out the reports of all steps so far."""
        self.steps.flush(wait=True)

    def finish(self, written: Written, *, stopped: bool) -> None:
        """Give out the last reports and states; where the run was `stopped`, jobs that are not over are paused."""
        self.flush()
        self._note(written)
        for job, state in enumerate(self.states):
            if stopped and state in ("queued", "running"):
                self._set_state(job, "paused", "the run was stopped; the same command takes it up again")

    def _note(self, written: Written) -> None:
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
            self.leave(job)

    def _set_state(self, job: int, state: str, reason: str) -> None:
        name = self.jobs[job].config.name
        self.states[job] = state
        self.directory.set_job(name, state, reason)
        for observer in self.observers:
            observer.on_status(name, state, reason)


def _warn_of_no_learning(job: TrainingJob) -> None:
    """Say so when a job's learning rate is 0 in all of its steps: its adapter would be written as it began."""
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
