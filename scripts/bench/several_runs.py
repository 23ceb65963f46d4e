"""The runs that need several GPUs, as options of end_to_end.py, and which of them are compared with which.

    python scripts/bench/several_gpus.py             runs them
    python scripts/bench/predict_several_gpus.py     predicts them

Every run trains four jobs of r = 16 without dropout, their lengths those of a workload of lengths.json (het-s2 has global batches of 8
samples, the others of 16), and is measured at its own best token budget, which is at least the workload's longest sample, 4,096. `auto`
recomputation is what fits the device.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from e2e_options import check, layout_name, read_options
from model_shapes import architecture_of
from synthetic_jobs import read_workload

from megatron_lora.errors import UserError

BUDGETS = (4096, 5120, 6144, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: `machine` is the number of GPUs of the machine on which it is measured, beside its like."""

    name: str
    machine: int
    shape: str
    workload: str
    pipeline: int = 1
    tensor: int = 1
    data: int = 1
    policy: str = "ours"
    adapters: str = "fused"
    recompute: str = "auto"
    budgets: tuple[int, ...] = BUDGETS
    goal: str = ""

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.pipeline * self.tensor * self.data

    def options(self) -> list[str]:
        """Return the words of end_to_end.py, but for the budget and how long it runs."""
        sizes = {name: str(getattr(self, name)) for name in ("pipeline", "tensor", "data") if getattr(self, name) > 1}
        kind = {name: getattr(self, name) for name in ("shape", "workload", "policy", "adapters", "recompute")}
        words = [word for name, value in (sizes | kind).items() for word in (f"--{name}", value)]
        return words + (["--sequence"] if self.tensor > 1 else [])


def _policies(name: str, *, goal: str, **settings) -> tuple[Run, ...]:
    """Return ours, the three policies that it is compared with, and what people run today."""
    ours = Run(name=f"{name}-ours", goal=goal, **settings)
    others = [Run(name=f"{name}-{policy}", policy=policy, **settings) for policy in ("flush", "round-robin", "grouped")]
    today = Run(name=f"{name}-today", policy="flush", adapters="unfused", recompute="full", **settings)
    return ours, *others, today


_MIDDLE = {"machine": 2, "shape": "qwen2.5-32b", "workload": "het-s2", "goal": ">= 7,000 tokens/s, bubble <= 4%, exposed <= 1%"}
_SMALL = {"machine": 2, "shape": "llama-3.1-8b", "workload": "het-s4", "budgets": (8192, 12288, 16384)}
_LARGE = {"machine": 4, "shape": "llama-3.1-70b", "goal": ">= 7,000 tokens/s, bubble <= 5%"}
_MIXTURES = ("het", "mix")

RUNS = (
    *_policies("32b", pipeline=2, **_MIDDLE),
    Run(name="8b-one", **_SMALL),
    Run(name="8b-dp2", data=2, **_SMALL),
    Run(name="8b-tp2", tensor=2, **_SMALL),
    *(run for kind in _MIXTURES for run in _policies(f"70b-pp4-{kind}", pipeline=4, workload=f"{kind}-s4", **_LARGE)),
    *(Run(name=f"70b-pp2-tp2-{kind}-ours", pipeline=2, tensor=2, workload=f"{kind}-s4", **_LARGE) for kind in _MIXTURES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tokens per second of one run over those of another, and what the ratio is to be."""

    fast: str
    slow: str
    goal: str


_GOALS = {"flush": ">= 1.2", "round-robin": ">= 1.03", "grouped": ">= 1.03", "today": ">= 1.6"}
COMPARISONS = (
    *(Comparison(fast="32b-ours", slow=f"32b-{policy}", goal=goal) for policy, goal in _GOALS.items()),
    Comparison(fast="8b-dp2", slow="8b-one", goal=">= 1.9"),
    Comparison(fast="8b-tp2", slow="8b-one", goal=">= 1.6"),
    *(Comparison(fast=f"70b-pp4-{kind}-ours", slow=f"70b-pp4-{kind}-{policy}", goal="") for kind in _MIXTURES for policy in _GOALS),
)


def ratios(tokens_per_s: Mapping[str, float]) -> list[dict]:
    """Return the comparisons whose runs are there, {name: tokens per second}."""
    return [
        {"fast": c.fast, "slow": c.slow, "ratio": tokens_per_s[c.fast] / tokens_per_s[c.slow], "goal": c.goal}
        for c in COMPARISONS
        if c.fast in tokens_per_s and c.slow in tokens_per_s
    ]


def chosen(names: str) -> tuple[Run, ...]:
    """Return the runs whose names begin with one of these words, between commas; all where there is none."""
    words = [word for word in names.split(",") if word]
    for word in words:
        if not any(run.name.startswith(word) for run in RUNS):
            raise argparse.ArgumentTypeError(f"{word!r} begins no run's name; choose among {', '.join(run.name for run in RUNS)}")
    return tuple(run for run in RUNS if not words or run.name.startswith(tuple(words)))


def machine(runs: Sequence[Run], gpus: int | None) -> list[Run]:
    """Return those of the runs that are of a machine of so many GPUs, of as many as are visible where that is None."""
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    return [run for run in runs if run.machine == gpus]


def check_runs(runs: Sequence[Run], passed: Sequence[str]) -> None:
    """Refuse options for all runs that do not go with one of them, before anything is started; UserError says which."""
    for run in runs:
        plain, _ = read_options(run.options())
        for budget in run.budgets:
            options, cases = read_options([*run.options(), "--budget", str(budget), *passed])
            if len(cases) > 1 or layout_name(options) != layout_name(plain) or options.shape != run.shape:
                raise UserError(f"options for all runs: {run.name} has one case, a shape and a layout of its own; leave those away")
            check(options, cases, [read_workload(options.lengths, case.workload) for case in cases])
            layers = architecture_of(options.shape, options.num_layers).num_layers
            if options.layers is not None and (len(options.layers) != options.pipeline or sum(options.layers) != layers):
                raise UserError(f"--layers: {run.name} has {layers} layers on {options.pipeline} stages, not {options.layers}")
            if not isinstance(cases[0].recompute, str) and len(cases[0].recompute) != layers:
                raise UserError(f"--recompute: {run.name} has {layers} layers, not {len(cases[0].recompute)}")
