"""Notices that a job has gone wrong, by its own keys: a training loss above a bound, or evaluations that never fall below the first one.

    watchdog = Watchdog(job.config, first_evaluation=None)
    watchdog.after_step(9.7)            # a reason to pause the job, or None

It pauses, and ends nothing: the job is saved, and may be resumed, or its keys set. It counts anew where a job joins.
"""

from __future__ import annotations

from megatron_lora.config.schema import JobConfig


class Watchdog:
    """What one job has shown since it joined."""

    def __init__(self, config: JobConfig, first_evaluation: float | None):
        """Watch a job; `first_evaluation` is the loss of its first one, where that was in an earlier residence."""
        self.config = config
        self.first_evaluation = first_evaluation
        self.num_high = 0  # steps in a row
        self.num_without = 0  # evaluations in a row

    def after_step(self, loss: float) -> str | None:
        """Return why the job should be paused after a step with this loss, if it should; a loss that is not a number is high."""
        bound, patience = self.config.loss_watchdog_threshold, self.config.loss_watchdog_patience
        if bound is None:
            return None
        self.num_high = 0 if loss <= bound else self.num_high + 1
        return f"loss_watchdog: the loss was above {bound:g} in {patience} steps in a row" if self.num_high == patience else None

    def after_evaluation(self, loss: float) -> str | None:
        """Return why the job should be paused after an evaluation with this loss, if it should."""
        patience = self.config.eval_watchdog_patience
        if self.first_evaluation is None:
            self.first_evaluation = loss
            return None
        self.num_without = 0 if loss < self.first_evaluation else self.num_without + 1
        if self.num_without != patience:
            return None
        return f"eval_watchdog: eval_loss was not below that of the first evaluation, {self.first_evaluation:g}, in {patience} in a row"
