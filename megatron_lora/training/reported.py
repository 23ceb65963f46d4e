"""What has been reported of each job, for the threads that write snapshots: they wait here until a snapshot's step is reported.

A snapshot is taken when its step is, on every rank. What it is for, a checkpoint, the best weights or the last ones, is known once the
job's reports have come as far, with the record of the evaluation at that step where there is one. Reports come from the training thread,
which never waits for the writers while the run lasts; when no more will come, it says so.

    reported = board.wait_for("summarise", 40)      # None: nothing is to be written
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from megatron_lora.training.early_stopping import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """How far a job's reports have come: `step` steps, and the evaluation there unless it is `evaluation_due`."""

    step: int
    evaluation_due: bool
    progress: Progress


class ReportBoard:
    """The newest report of each job by name, and those of the steps that a snapshot was taken at."""

    def __init__(self):
        self._changed = threading.Condition()
        self._newest: dict[str, Reported] = {}
        self._of_snapshots: dict[tuple[str, int], Reported] = {}
        self._expected: set[tuple[str, int]] = set()
        self._over: set[str] = set()
        self._closed = False

    def expect(self, job: str, step: int) -> None:
        """Note, before the step is reported, that a snapshot is taken there: `set` may change until then at which steps that is."""
        with self._changed:
            self._expected.add((job, step))

    def put(self, job: str, reported: Reported) -> None:
        """Note a job's newest report."""
        with self._changed:
            self._newest[job] = reported
            if (job, reported.step) in self._expected and not reported.evaluation_due:
                self._expected.remove((job, reported.step))
                self._of_snapshots[job, reported.step] = reported
            self._changed.notify_all()

    def end_job(self, job: str) -> None:
        """Nothing more is reported of a job, which is over."""
        with self._changed:
            self._over.add(job)
            self._changed.notify_all()

    def close(self, *, failed: bool = False) -> None:
        """No more reports come; after a failure, those of which the writer has not read are withdrawn."""
        with self._changed:
            self._closed = True
            if failed:
                self._newest.clear()
                self._of_snapshots.clear()
            self._changed.notify_all()

    def wait_for(self, job: str, step: int) -> Reported | None:
        """Wait for a job's report of `step` and the evaluation there; return it, without the evaluation if the run ends before.

        None if the job ended before that step.
        """
        with self._changed:
            while True:
                if (job, step) in self._of_snapshots:
                    return self._of_snapshots.pop((job, step))
                newest = self._newest.get(job)
                is_newest = newest is not None and newest.step == step
                if job in self._over:
                    return None
                if self._closed or (is_newest and newest is not None and not newest.evaluation_due):
                    return newest if is_newest else None
                self._changed.wait()
