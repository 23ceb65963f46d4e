"""Points of a sweep that Optuna's TPE sampler names, through its ask-and-tell interface: a function of what is known of the others.

The study is made anew for each point, and its sampler seeded by the sweep's seed and the point's number, so that a run which is
resumed needs nothing of it. Points that still train count as running, whose results the sampler takes for bad ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from megatron_lora.config.sweep_keys import FIRST_ASKED, SweepConfig, check_optuna, in_range, is_whole

Told = Mapping[int, tuple[Mapping[str, Any], bool, tuple[int, float] | None]]  # of a point: its values, whether it is over, (step, value)


def num_to_ask(sweep: SweepConfig, told: Told) -> int:
    """Return how many points are to be added: as many as are over, until there are all."""
    alive = sum(not over for _, over, _ in told.values())
    return max(0, min(FIRST_ASKED - alive, sweep.num_points - len(told)))


def ask(sweep: SweepConfig, mode: str, told: Told, number: int) -> dict[str, Any]:
    """Return the values of point `number`; UserError where Optuna is not installed."""
    check_optuna()
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {name: _distribution(optuna, axis) for name, axis in sweep.over.items()}
    sampler = optuna.samplers.TPESampler(seed=sweep.seed + number, constant_liar=True)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize", sampler=sampler)
    for values, over, found in told.values():
        params = {name: _known(sweep.over[name], values[name]) for name in spaces}
        state = optuna.trial.TrialState.RUNNING if not over else optuna.trial.TrialState.COMPLETE if found else optuna.trial.TrialState.FAIL
        value = found[1] if over and found else None
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=spaces, value=value))
    asked = study.ask(spaces).params
    return {name: _value(sweep.over[name], asked[name]) for name in sweep.over}


def _distribution(optuna: Any, axis: Mapping[str, Any]) -> Any:
    if "choices" in axis:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(axis["choices"]))))
    kind = optuna.distributions.IntDistribution if is_whole(axis) else optuna.distributions.FloatDistribution
    return kind(axis["min"], axis["max"], log=axis["log"])


def _known(axis: Mapping[str, Any], value: Any) -> Any:
    """Return a value as Optuna knows it: of choices their place, since a choice may be anything."""
    return axis["choices"].index(value) if "choices" in axis else value


def _value(axis: Mapping[str, Any], asked: Any) -> Any:
    return axis["choices"][asked] if "choices" in axis else in_range(axis, asked)
