"""Best and patience against transformers' Trainer and EarlyStoppingCallback, over random values."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, Trainer

from megatron_lora.output.standing import Best
from megatron_lora.training.early_stopping import Criterion, Progress, judge

NUMBERS = [0.0, 0.05, 0.1, 0.11, 0.2, 0.3, 0.5, 1.0, -0.4]
VALUES = st.tuples(st.sampled_from(NUMBERS), st.lists(st.sampled_from([*NUMBERS, math.nan]), max_size=12)).map(lambda v: [v[0], *v[1]])


def theirs(values, mode, threshold, patience):
    """Return, per value, whether it is the best, and whether training stops: one evaluation after the other, as Trainer makes them."""
    args = SimpleNamespace(greater_is_better=mode == "max", metric_for_best_model="eval_loss", save_strategy="best")
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    trainer, callback = SimpleNamespace(args=args, state=state), EarlyStoppingCallback(patience, threshold)
    found = []
    for value in values:
        control = SimpleNamespace(should_training_stop=False)
        callback.on_evaluate(args, state, control, {"eval_loss": value})
        found.append((Trainer._determine_best_metric(trainer, {"eval_loss": value}, None), control.should_training_stop))
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
@settings(deadline=None)
@given(values=VALUES, threshold=st.sampled_from([0.0, 0.05, 0.1, 0.3]), patience=st.integers(1, 4))
def test_equals_transformers(mode, values, threshold, patience):
    criterion, progress, found = Criterion(mode=mode, threshold=threshold, patience=patience), Progress(), []
    for step, value in enumerate(values):
        progress = judge(progress, criterion, step, value)
        found.append((progress.best == Best(step, value), progress.over))
    assert found == theirs(values, mode, threshold, patience)


def test_without_patience_a_job_never_ends_early():
    progress = Progress()
    for step in range(20):
        progress = judge(progress, Criterion(mode="min"), step, float(step))
    assert progress == Progress(best=Best(0, 0.0), num_without=19)


def test_a_value_that_is_not_finite_is_no_improvement():
    criterion, progress = Criterion(mode="max", patience=2), Progress()
    for step, value in enumerate((math.inf, math.nan)):
        progress = judge(progress, criterion, step, value)
    assert progress == Progress(num_without=2, over=True)
    assert judge(progress, criterion, 5, -3.0) == Progress(best=Best(5, -3.0))
