"""The first rank's reporter: reports of steps and evaluations go to the observers (terminal, files, trackers), job states to status.json.

Steps' numbers reach the host some time after the step (step_reporter.py), and a thread writes the
adapters (snapshots.py). A job's state follows from both: it is "running" from its first report on,
"failed" after three skipped steps in a row, and "done" or "stopped" once its adapter is written.
Of a job that is failed, or whose patience is over, steps that are already planned still run, but
they are not reported, and nothing of them is kept.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import sys
from collections.abc import Sequence

from megatron_lora.config.objective_keys import LARGE_RATE
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.output.best import remove_checkpoints
from megatron_lora.output.final_files import digests_of_metrics
from megatron_lora.output.job_states import OVER, after
from megatron_lora.output.metrics import EvalReport, JobSummary, Observer, StepReport, metrics_file, read_evaluations
from megatron_lora.output.observers import make_observers
from megatron_lora.output.on_save import OnSave
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.training.control import Control
from megatron_lora.training.early_stopping import Criterion, Progress, judge
from megatron_lora.training.executor import EvaluationDone, StepDone
from megatron_lora.training.first_factors import remove_first_factors
from megatron_lora.training.jobs import Job, Jobs
from megatron_lora.training.optimizer import MAX_SKIPPED_IN_A_ROW
from megatron_lora.training.reported import ReportBoard, Reported
from megatron_lora.training.step_reporter import Report, StepReporter
from megatron_lora.training.watchdog import Watchdog

Written = queue.SimpleQueue[tuple[Job, str]]  # each job that is over and whose files are on disk, and its state


class RunReporter:
    """Everything that the first rank reports.

    A context manager, which closes the observers also after an exception.
    """

    def __init__(self, config: RunConfig, jobs: Jobs, board: ReportBoard, control: Control):
        """Join the run's directory, which must exist, and start the observers.

        `board` is where the writer of snapshots waits for reports. `control` hears of jobs that are
        "failed", "stopped" or "done", and of those that have left and whose checkpoint is "saved".
        """
        self.jobs = jobs
        self.board = board
        self.control = control
        self.progress: dict[str, Progress] = {}
        self.steps_reported: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # job whose patience is over -> why it is stopped
        self.watchdogs: dict[str, Watchdog] = {}
        self.alarms: dict[str, str] = {}  # job that its watchdog has paused -> why
        self.num_begun = 0  # windows
        self.stopped_early: dict[str, str] = {}  # points whose last adapter is still to be written -> why they are stopped
        self.files_of_left: dict[str, dict[str, str]] = {}  # of jobs that have left and are not over: SHA-256 of PEFT files
        self.over: set[str] = set()  # names of jobs that ended in this start
        self.advice: dict[str, str] = {}  # of jobs that are done, for those who serve them
        self.directory = RunDirectory.join(config)
        self.on_save = OnSave(config.on_save, self.directory.path)
        self.on_save.put_undelivered(self.directory.status()["jobs"])
        self.observers: Sequence[Observer] = make_observers(config.output_dir)
        self.steps = StepReporter(jobs, self._report)
        self.on_forward = self.steps.on_forward

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *exception) -> None:
        self.board.close(failed=True)  # without a failure it is closed and read already
        for observer in self.observers:
            observer.close()
        self.on_save.close()
        self.directory.close()
        for name, advice in self.advice.items():
            print(f"{name}: {advice}", flush=True)

    def join(self, job: Job) -> None:
        """Begin to report a job that becomes resident."""
        resumes = f", resumes after step {job.resume_point.step}" if job.resume_point.step else ""
        print(f"{job.name}: {job.data.describe()}; {job.num_steps} steps{resumes}", flush=True)
        _warn_of_no_learning(job)
        _warn_of_fast_learning(job)
        _warn_of_scales(job)
        self.progress[job.name] = Progress.of(job.resume_point.state)
        self.alarms.pop(job.name, None)
        self.watchdogs[job.name] = Watchdog(job.config, self._first_evaluation(job))
        self.steps.join(job)
        summary = JobSummary(job.name, job.num_steps, job.resume_point.step, self.progress[job.name].best)
        for observer in self.observers:
            observer.on_start([summary])
        self._post(job, job.resume_point.step)

    def on_window(self, written: Written, *, begins: bool = True) -> None:
        """Do what waits for this thread where a window, or a part of one, `begins`; update the states of jobs that are `written`."""
        if begins:
            self.control.accounts.begin()
            self.num_begun += 1
        self.control.write_later(self, self.num_begun)
        self.steps.flush(wait=False)  # where nothing trains, what may continue waits for reports
        self._update_states(written)

    def on_step(self, done: StepDone, written: Written) -> None:
        """Queue the report of a step, and update the states of jobs whose adapters were `written`."""
        self.steps.on_step(done)
        self._update_states(written)

    def on_evaluation(self, done: EvaluationDone) -> None:
        """Queue the report of an evaluation."""
        self.steps.on_evaluation(done)

    def end_reports(self) -> None:
        """Report all steps and evaluations so far, which are the last; waits for the device."""
        self.steps.flush(wait=True)
        self.board.close()

    def finish(self, written: Written, *, stopped: bool) -> None:
        """Report the last states; if the run was `stopped`, resident jobs that are not over become "paused"."""
        self.control.write_later(self)
        self._update_states(written)
        for job in self.jobs.values():
            if stopped and job.state not in OVER and job.state != "paused":
                self._set_job(job, "paused", "the run was stopped; the same command resumes it")
        self.on_save.wait(stopped=stopped)
        self._update_states(written)

    def set_state(self, name: str, state: str, reason: str) -> None:
        """Record a job's state; in the training thread."""
        job = next((job for job in self.jobs.values() if job.name == name), None)
        if job is not None and state == "stopped" and job.steps_taken in job.rungs and job.exported_after < job.steps_taken:
            self.stopped_early[name] = reason  # in a run that is repeated
            return
        if job is not None:
            job.state = after(job.state, state)
        if state in OVER:
            self.over.add(name)
            self.board.end_job(name)
        best = self.progress[name].best if name in self.progress else None
        files = self._final_files(name) if state in OVER else None
        self.directory.set_job(name, state, reason, step=self.steps_reported.get(name), best=best, files=files)
        if state == "stopped" and self.control.sweeps.is_stopped(name):
            remove_checkpoints(self.directory.path / "jobs" / name)
            remove_first_factors(self.directory.path / "jobs" / name)
        for observer in self.observers:
            observer.on_status(name, state, reason)

    def _final_files(self, name: str) -> dict[str, str]:
        """Return the SHA-256 of the files of a job that is over: its metrics, and its PEFT directory where this start has written it."""
        left = self.files_of_left.pop(name, {})
        found = digests_of_metrics(self.directory.path / "jobs" / name)
        return found | next((dict(job.files) for job in self.jobs.values() if job.name == name), left)

    def add_jobs(self, jobs: Sequence[JobConfig]) -> None:
        """Record jobs that were added to the run; in the training thread."""
        self.directory.add_jobs(jobs)

    def _update_states(self, written: Written) -> None:
        while not written.empty():
            job, state = written.get()
            if job.name in self.over:
                continue  # cancelled meanwhile, perhaps after it had left
            self.files_of_left[job.name] = dict(job.files)
            if state == "exported":
                self.control.tell(state, job.name)
                if job.name in self.stopped_early:
                    self.set_state(job.name, "stopped", self.stopped_early.pop(job.name))
                continue
            reasons = {"stopped": self.reasons, "paused": self.alarms}.get(state, {})
            self._set_job(job, state, reasons.get(job.name, ""))
            self.control.tell(*((state, job.name, "") if state in OVER else ("saved", job.name, state)))
            if state == "done" and job.advice:
                self.advice[job.name] = job.advice
            if state in ("done", "stopped"):
                self.on_save.put(job.name)
        for name, target, line in self.on_save.results():
            self.directory.set_on_save(name, target, line)

    def _report(self, job: Job, report: Report) -> None:
        self.directory.check_lock()
        if job.state in OVER or job.name in self.reasons:
            return
        if job.state == "queued":
            self._set_job(job, "running", "")
        if isinstance(report, StepReport):
            self._report_step(job, report)
        else:
            self._report_evaluation(job, report)

    def _report_evaluation(self, job: Job, report: EvalReport) -> None:
        metric = job.config.metric
        progress = judge(self.progress[job.name], Criterion.of(job.config), report.step, report.value(metric))
        self.progress[job.name] = progress
        for observer in self.observers:
            observer.on_evaluation(dataclasses.replace(report, best=progress.best))
        self._post(job, report.step)
        self.control.sweeps.tell(job.config, report.step, report.value(metric), job.num_steps)
        self._pause(job, self.watchdogs[job.name].after_evaluation(report.eval_loss))
        if progress.over and report.step < job.num_steps:
            best = "" if progress.best is None else f", the best after step {progress.best.step}"
            self.reasons[job.name] = f"{progress.num_without} evaluations in a row without a better {metric}{best}"
            self.board.end_job(job.name)
            self.control.tell("stopped", job.name, self.reasons[job.name])

    def _pause(self, job: Job, reason: str | None) -> None:
        """Have a job paused that has gone wrong, once; it leaves with a window of the plan."""
        if reason is not None and job.name not in self.alarms:
            self.alarms[job.name] = reason
            self.control.tell("paused", job.name, reason)

    def _first_evaluation(self, job: Job) -> float | None:
        """Return the loss of a job's first evaluation, if there was one and its watchdog needs it."""
        metrics = metrics_file(self.directory.path, job.name)
        if job.config.eval_watchdog_patience is None or not metrics.exists():
            return None
        losses = (math.nan if line["eval_loss"] is None else float(line["eval_loss"]) for line in read_evaluations(metrics))
        return next(losses, None)

    def _post(self, job: Job, step: int) -> None:
        """Note how far a job's reports have come, and let the writer of snapshots know."""
        self.steps_reported[job.name] = step
        reported = Reported(step=step, evaluation_due=self.steps.is_due(job, step), progress=self.progress[job.name])
        self.board.put(job.name, reported)

    def _report_step(self, job: Job, report: StepReport) -> None:
        for observer in self.observers:
            observer.on_step(report)
        self._post(job, report.step)
        self._pause(job, self.watchdogs[job.name].after_step(report.loss))
        job.skipped_in_a_row = job.skipped_in_a_row + 1 if report.skipped else 0
        if job.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            reason = f"the gradient norm was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last of them step {report.step}"
            self._set_job(job, "failed", reason)
            self.control.tell("failed", job.name, reason)

    def _set_job(self, job: Job, state: str, reason: str) -> None:
        job.state = after(job.state, state)  # also where it has left already
        self.set_state(job.name, state, reason)


def _warn_of_no_learning(job: Job) -> None:
    """Warn of a learning rate that is 0 in all of a job's steps: its adapter would never change."""
    settings, name = job.optimizer_settings(), job.name
    if any(settings.learning_rate_at(step) > 0 for step in range(job.num_steps)):
        return
    warmup = "warmup_ratio" if job.config.warmup_steps is None else "warmup_steps"
    key, cure = (warmup, "use 0, or more steps") if job.config.learning_rate > 0 else ("learning_rate", "use a number above 0")
    value = getattr(job.config, key)
    print(
        f"megatron-lora: warning: jobs.{name}.{key}: {value:g} leaves a learning rate of 0 in all steps ({job.num_steps}), so the adapter "
        f"will not move; {cure}",
        file=sys.stderr,
        flush=True,
    )


def _warn_of_scales(job: Job) -> None:
    """Warn of ranks of their own without alphas of their own: such linears have another scale, and some servers take none."""
    if job.config.rank_pattern and not job.config.alpha_pattern:
        scale = "lora_alpha / sqrt(r)" if job.config.use_rslora else "lora_alpha / r"
        print(
            f"megatron-lora: warning: jobs.{job.name}.rank_pattern: its linears have another scale, {scale}, without an alpha_pattern; for "
            "servers that read no patterns use export: portable",
            file=sys.stderr,
            flush=True,
        )


def _warn_of_fast_learning(job: Job) -> None:
    """Warn of a learning rate of SFT's size for a preference, whose loss would fall by driving both answers away from the reference."""
    if job.config.preference is None or job.config.learning_rate < LARGE_RATE:
        return
    print(
        f"megatron-lora: warning: jobs.{job.name}.learning_rate: {job.config.learning_rate:g} is of the size for sft; preference jobs take "
        "about a tenth of it (5e-6 to 5e-5)",
        file=sys.stderr,
        flush=True,
    )
