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
from megatron_lora.data.serving import serving_advice
from megatron_lora.output.job_states import OVER, after
from megatron_lora.output.metrics import JobSummary, Observer, StepReport
from megatron_lora.output.observers import make_observers
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.training.executor import StepDone
from megatron_lora.training.jobs import Job, Jobs
from megatron_lora.training.optimizer import MAX_SKIPPED_IN_A_ROW
from megatron_lora.training.step_reporter import StepReporter

Written = queue.SimpleQueue[tuple[int, int]]  # (job, steps taken) of each saved job whose files are on disk


class RunReporter:
    """Everything that the first rank reports.

    A context manager, which closes the observers also after an exception.
    """

    def __init__(self, config: RunConfig, jobs: Jobs, remove: Callable[[int], None]):
        """Join the run's directory, which must exist, and start the observers.

        `remove(job number)` removes a failed job from the windows still to be planned.
        """
        self.jobs = jobs
        self.remove = remove
        for job in jobs.values():
            resumes = f", resumes after step {job.resume_point.step}" if job.resume_point.step else ""
            print(f"{job.name}: {job.data.describe()}; {job.num_steps} steps{resumes}", flush=True)
            _warn_of_no_learning(job)
        self.directory = RunDirectory.join(config)
        summaries = [JobSummary(job.name, job.num_steps, job.resume_point.step) for job in jobs.values()]
        self.observers: Sequence[Observer] = make_observers(config.output_dir, summaries)
        self.steps = StepReporter(jobs, self._report)
        self.on_forward = self.steps.on_forward

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *exception) -> None:
        for observer in self.observers:
            observer.close()
        self.directory.close()
        for job in self.jobs.values():
            advice = serving_advice(job.config, job.data) if job.state == "done" else ""
            if advice:
                print(f"{job.name}: {advice}", flush=True)

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
        for job in self.jobs.values():
            if stopped and job.state not in OVER:
                self._set_state(job, "paused", "the run was stopped; the same command resumes it")

    def _update_states(self, written: Written) -> None:
        while not written.empty():
            number, step = written.get()
            job = self.jobs[number]
            if step == job.num_steps:
                self._set_state(job, "done", "")

    def _report(self, number: int, report: StepReport) -> None:
        job = self.jobs[number]
        if job.state == "failed":
            return
        if job.state == "queued":
            self._set_state(job, "running", "")
        for observer in self.observers:
            observer.on_step(report)
        job.skipped_in_a_row = job.skipped_in_a_row + 1 if report.skipped else 0
        if job.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            reason = f"the gradient norm was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last of them step {report.step}"
            self._set_state(job, "failed", reason)
            self.remove(number)

    def _set_state(self, job: Job, state: str, reason: str) -> None:
        job.state = after(job.state, state)
        self.directory.set_job(job.name, state, reason)
        for observer in self.observers:
            observer.on_status(job.name, state, reason)


def _warn_of_no_learning(job: Job) -> None:
    """Warn of a learning rate that is 0 in all of a job's steps: its adapter would never change."""
    settings, name = job.optimizer_settings(), job.name
    if any(settings.learning_rate_at(step) > 0 for step in range(job.num_steps)):
        return
    key, cure = ("warmup_ratio", "use 0, or more steps") if job.config.learning_rate > 0 else ("learning_rate", "use a number above 0")
    value = getattr(job.config, key)
    print(
        f"megatron-lora: warning: jobs.{name}.{key}: {value:g} leaves a learning rate of 0 in all steps ({job.num_steps}), so the adapter "
        f"will not move; {cure}",
        file=sys.stderr,
        flush=True,
    )
