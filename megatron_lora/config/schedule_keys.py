"""How a job's learning rate changes over its steps: transformers' schedules, under its names and with its arguments.

    lr_scheduler: cosine_with_min_lr
    lr_scheduler_kwargs: {min_lr_rate: 0.1}

The formulas stand in training/schedules.py.
"""

from typing import Any

from megatron_lora.config.rules import Rule, accepts, number, one_of, show, suggest, whole_number
from megatron_lora.errors import UserError

WARMUP_RATIO = 0.03
LR_END = 1e-7  # of a polynomial, where none is given: transformers'
_CYCLES = number("a number of cosine waves", 0, above=True)
_SHAPE = one_of("linear", "cosine", "1-sqrt")
SCHEDULES: dict[str, dict[str, Rule]] = {  # name -> argument -> what it may be
    "constant": {},
    "linear": {},
    "cosine": {"num_cycles": _CYCLES},
    "cosine_with_min_lr": {
        "min_lr": number("a learning rate", 0, 1),
        "min_lr_rate": number("a share of the learning rate", 0, 1),
        "num_cycles": _CYCLES,
    },
    "polynomial": {"lr_end": number("a learning rate", 0, 1), "power": number("a power", 0, above=True)},
    "warmup_stable_decay": {
        "num_decay_steps": whole_number("a number of steps", 1),
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": number("a share of the learning rate", 0, 1),
        "num_cycles": _CYCLES,
    },
}


@accepts("a mapping of the schedule's arguments to values")
def schedule_arguments(path: str, value: object) -> dict[str, object]:
    """Accept a mapping; whether the schedule takes its names is checked beside `lr_scheduler`."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {show(value)} is no mapping of a schedule's arguments; write {{min_lr_rate: 0.1}}")
    return dict(value)


def check_schedule(where: str, job: Any) -> None:
    """Raise UserError where the schedule of `job`, a JobConfig, does not take its arguments, or needs others."""
    if job.warmup_steps is not None and job.warmup_ratio != WARMUP_RATIO:
        raise UserError(f"{where}.warmup_steps: {job.warmup_steps} is in place of {where}.warmup_ratio, which is given; keep one of them")
    rules, given = SCHEDULES[job.lr_scheduler], job.lr_scheduler_kwargs or {}
    at = f"{where}.lr_scheduler_kwargs"
    for name, value in given.items():
        if name not in rules:
            takes = f"takes {', '.join(rules)}" if rules else "takes none"
            raise UserError(f"{at}.{name}: lr_scheduler {job.lr_scheduler} {takes}{suggest(name, rules)}")
        rules[name](f"{at}.{name}", value)
    if job.lr_scheduler == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
        raise UserError(f"{at}: lr_scheduler cosine_with_min_lr takes min_lr or min_lr_rate; give one of them")
    if job.lr_scheduler == "warmup_stable_decay" and "num_decay_steps" not in given:
        raise UserError(f"{at}: lr_scheduler warmup_stable_decay needs num_decay_steps; give a number of steps")
    lowest = given.get("min_lr", given.get("lr_end", LR_END) if job.lr_scheduler == "polynomial" else 0.0)
    if 0 < job.learning_rate <= lowest:
        raise UserError(f"{where}.learning_rate: {job.learning_rate:g} is not above the {lowest:g} that its schedule ends at")
