"""Which evaluation of a job is its best so far, and when its patience is over: a pure function of the metric's values in order.

A value is the best if it is better than the best before it, by however little. It is an improvement if it is also further from it than
the threshold; `patience` evaluations in a row without one end the job. These are the rules of transformers' EarlyStoppingCallback
with `load_best_model_at_end`. A value that is not finite is never the best and no improvement.

    progress = Progress()
    progress = judge(progress, Criterion(mode="min", threshold=0.0, patience=3), step=20, value=1.7)
    progress.best == Best(20, 1.7) and not progress.over
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lora.config.schema import JobConfig
from megatron_lora.output.standing import Best, CheckpointState


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """What decides between evaluations: a job's `mode`, `early_stopping_threshold` and `early_stopping_patience`."""

    mode: str  # "min" or "max"
    threshold: float = 0.0
    patience: int | None = None

    @classmethod
    def of(cls, job: JobConfig) -> Criterion:
        """Return a job's."""
        return cls(mode=job.mode, threshold=job.early_stopping_threshold, patience=job.early_stopping_patience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A job's evaluations so far: the best, and how many in a row have brought no improvement."""

    best: Best | None = None
    num_without: int = 0
    over: bool = False  # the patience is

    @classmethod
    def of(cls, state: CheckpointState | None) -> Progress:
        """Return what a checkpoint says of it; None: no evaluation so far."""
        return cls() if state is None else cls(best=state.best, num_without=state.evaluations_without_improvement)


def judge(progress: Progress, criterion: Criterion, step: int, value: float) -> Progress:
    """Return the progress after an evaluation at `step` with this value of the metric."""
    best = progress.best
    is_best = math.isfinite(value) and (best is None or (value < best.value if criterion.mode == "min" else value > best.value))
    improves = is_best and (best is None or abs(value - best.value) > criterion.threshold)
    num_without = 0 if improves else progress.num_without + 1
    over = criterion.patience is not None and num_without >= criterion.patience
    return Progress(best=Best(step, value) if is_best else best, num_without=num_without, over=over)
