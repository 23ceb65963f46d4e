"""The learning rate of a step, from 0, by the formulas of `transformers.get_scheduler` (optimization.py); w warm-up steps of n.

    step < w                 lr * step / w
    constant                 lr
    linear                   lr * (n - step) / (n - w)
    cosine                   lr * cosine(progress)                  progress = (step - w) / (n - w)
    cosine_with_min_lr       lr * (low + (1 - low) cosine(progress))
    polynomial               lr_end + (lr - lr_end) (1 - progress)^power
    warmup_stable_decay      lr, and over the last num_decay_steps lr * (low + (1 - low) decay), decay from 1 to 0

with cosine(x) = (1 + cos(2 pi num_cycles x)) / 2. `constant` is transformers' `constant_with_warmup`.

    rate = learning_rate("cosine", 2e-4, step=3, num_steps=100, num_warmup_steps=3, arguments={})
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_lora.config.schedule_keys import LR_END


def num_warmup_steps(warmup_ratio: float, warmup_steps: int | None, num_steps: int) -> int:
    """Return in how many of a job's steps the learning rate rises: `warmup_steps`, or ceil(`warmup_ratio` * steps)."""
    return math.ceil(warmup_ratio * num_steps) if warmup_steps is None else warmup_steps


def learning_rate(name: str, highest: float, *, step: int, num_steps: int, num_warmup_steps: int, arguments: Mapping[str, Any]) -> float:
    """Return the learning rate of a step; `highest` is that after the warm-up, `arguments` are the schedule's own."""
    return highest * _factor(name, highest, step, num_steps, num_warmup_steps, arguments)


def _factor(name: str, highest: float, step: int, num_steps: int, warmup: int, arguments: Mapping[str, Any]) -> float:
    if name == "warmup_stable_decay":
        return _stable(step, num_steps, warmup, **arguments)
    if step < warmup:
        return step / max(1, warmup)
    after = max(1, num_steps - warmup)
    progress = (step - warmup) / after
    if name == "constant":
        return 1.0
    if name == "linear":
        return max(0.0, (num_steps - step) / after)
    if name == "polynomial":
        low = arguments.get("lr_end", LR_END) / highest if highest else 0.0
        return low if step > num_steps else low + (1.0 - low) * (1.0 - progress) ** arguments.get("power", 1.0)
    low = 0.0
    if name == "cosine_with_min_lr":
        low = arguments.get("min_lr_rate", arguments.get("min_lr", 0.0) / (highest or 1.0))
    else:
        assert name == "cosine", name
    return max(0.0, low + (1.0 - low) * _cosine(progress, arguments.get("num_cycles", 0.5)))


def _stable(
    step: int,
    num_steps: int,
    warmup: int,
    *,
    num_decay_steps: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    first = num_steps - num_decay_steps  # step of the decay; where it is before the warm-up's end, the decay has begun by then
    if step < warmup:
        done = step / max(1, warmup)
        rise = {"linear": done, "cosine": 0.5 * (1.0 - math.cos(math.pi * done)), "1-sqrt": 1.0 - math.sqrt(1.0 - done)}[warmup_type]
        return max(0.0, min_lr_ratio + (1.0 - min_lr_ratio) * rise)
    if step < first:
        return 1.0
    done = (step - first) / max(1, num_decay_steps)
    fall = {"linear": 1.0 - done, "cosine": _cosine(done, num_cycles), "1-sqrt": 1.0 - math.sqrt(done)}[decay_type]
    return max(0.0, min_lr_ratio + (1.0 - min_lr_ratio) * fall)


def _cosine(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))
