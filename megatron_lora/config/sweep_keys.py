"""A sweep: the keys of `sweep:`, and the jobs, its points, that it makes of one.

    sweep: {job: tune, over: {learning_rate: {min: 1e-5, max: 1e-3, log: true}, r: [8, 16]}, strategy: asha, num: 16}

Points are ordinary jobs `tune-000`, `tune-001`, ...: the job with other values. Each has its sweep and its values in its key
`point`, so a run needs nothing else of a sweep, wherever its jobs come from. Rungs are fractions of a point's own steps,
`first_rung` and each `reduction` times the one before; what happens there is decided by training/rungs.py.
"""

import dataclasses
import importlib.util
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lora.config.keys import build, key, required
from megatron_lora.config.rules import METRICS, accepts, job_name, key_name, null_or, number, one_of, show, whole_number
from megatron_lora.errors import UserError

HALVING = ("successive_halving", "asha")
STRATEGIES = ("grid", "random", *HALVING, "optuna")
FIXED = ("name", "point", "metric", "mode", "val_datasets", "val_set_size")  # keys of a job that its points share
DEFAULT_NUM = 16
FIRST_ASKED = 10  # points that Optuna's sampler is not asked for: as many as it would draw at random first
LAST_RUNG = 0.95  # of a point's steps: a later one is its end
MOST_POINTS, MOST_VALUES = 1_000, 500  # each point lists its sweep, and config.yaml has a limit
DRAWS = 100  # for each point that is to differ from the others


@accepts("a mapping of job keys to a list, `{choices: [...]}` or `{min, max, log}`")
def over(path: str, value: object) -> dict[str, dict[str, Any]]:
    """Accept what a sweep goes over; each key's values become {"choices": list} or {"min", "max", "log"}."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: {show(value)} is no mapping of job keys to values; write for example {{r: [8, 16]}}")
    return {name: _axis(f"{path}.{key_name(name)}", name, axis) for name, axis in value.items()}


def _axis(path: str, name: str, axis: Any) -> dict[str, Any]:
    if name in FIXED:
        raise UserError(f"{path}: all points of a sweep share it; sweep over another key")
    if isinstance(axis, list):
        axis = {"choices": axis}
    if isinstance(axis, dict) and axis.keys() == {"choices"} and isinstance(axis["choices"], list) and axis["choices"]:
        return axis
    if not isinstance(axis, dict) or not {"min", "max"} <= axis.keys() <= {"min", "max", "log"}:
        raise UserError(f"{path}: {show(axis)} names no values; use a list, {{choices: [...]}} or {{min: ..., max: ..., log: true}}")
    low, high, log = axis["min"], axis["max"], axis.get("log", False)
    if any(type(end) not in (int, float) or not math.isfinite(end) for end in (low, high)) or low >= high:
        raise UserError(f"{path}: {show(low)} to {show(high)} is no range; give numbers, min below max")
    if not isinstance(log, bool) or (log and low <= 0):
        raise UserError(f"{path}.log: {show(log)} needs to be true or false, and true a min above 0, which is {show(low)}")
    return {"min": low, "max": high, "log": log}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """A sweep: the job that it varies, over what, and which points end early."""

    job: str = required(job_name, "the entry of `jobs` whose points take its place, under its name and a number")
    over: dict[str, dict[str, Any]] = required(over, "what differs between the points; a range of whole numbers gives whole numbers")
    strategy: str = key(
        "grid",
        one_of(*STRATEGIES),
        "`grid`: all combinations; `random`: some; `successive_halving`: at each rung the best continue, once all are there; `asha`: each "
        "continues, or not, as it compares with those that were there before; `optuna`: its TPE sampler names points as others end",
    )
    num: int | None = key(
        None,
        null_or(whole_number("a number of points", 1, MOST_POINTS)),
        f"points; null: all combinations, or {DEFAULT_NUM} where there is a range",
        "points",
    )
    metric: str | None = key(None, null_or(one_of(*METRICS)), "which number of an evaluation compares points; null: the job's `metric`")
    mode: str | None = key(None, null_or(one_of("min", "max")), "whether the smallest or the largest is the best; null: as it needs")
    reduction: int = key(3, whole_number("a reduction", 2, MOST_POINTS), "of the points at a rung, one of this many continues")
    first_rung: float = key(
        0.111, number("a share of a point's steps", 0, LAST_RUNG, above=True, below=True), "the first rung, a share of a point's own steps"
    )
    seed: int = key(0, whole_number("a seed", 0, 2**32 - 1), "decides which points are drawn")

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The keys that have a list of values, with these."""
        return {name: axis["choices"] for name, axis in self.over.items() if "choices" in axis}

    @property
    def num_points(self) -> int:
        """How many points there are in the end."""
        return self.num or (DEFAULT_NUM if len(self.choices) < len(self.over) else math.prod(map(len, self.choices.values())))

    @property
    def rungs(self) -> tuple[float, ...]:
        """Rungs before the end, as shares of a point's steps."""
        shares = itertools.takewhile(lambda share: share < LAST_RUNG, (self.first_rung * self.reduction**k for k in itertools.count()))
        return tuple(shares) if self.strategy in HALVING else ()

    def rung_steps(self, num_steps: int) -> tuple[int, ...]:
        """Return the steps after which a point of `num_steps` steps is at each rung."""
        return tuple(max(1, round(share * num_steps)) for share in self.rungs)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What makes a job a point of a sweep."""

    sweep: SweepConfig
    number: int
    values: dict[str, Any]


@accepts("written by a sweep")
def point(path: str, value: object) -> Point | None:
    """Accept what a sweep has written, or null."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"sweep", "number", "values"} or not isinstance(value["values"], dict):
        raise UserError(f"{path}: {show(value)} is written by a sweep alone; remove it, and name the job in sweep.job")
    number = whole_number("a point's number", 0)(f"{path}.number", value["number"])
    return Point(sweep=build(SweepConfig, f"{path}.sweep", value["sweep"]), number=number, values=value["values"])


@accepts("a mapping of the keys below")
def sweep(path: str, value: object) -> SweepConfig | None:
    """Accept a sweep, or null."""
    return None if value is None else build(SweepConfig, path, value)


def with_points(config: SweepConfig, jobs: object) -> list[Any]:
    """Return a config's jobs, mappings as they were written, with the points of a sweep in the place of its job."""
    entries = jobs if isinstance(jobs, list) else []
    names = [job.get("name") for job in entries if isinstance(job, dict)]
    if config.job not in names:
        raise UserError(f"sweep.job: {show(config.job)} is no entry of jobs, which are {', '.join(map(str, names)) or 'missing'}; name one")
    if names.count(config.job) > 1:
        raise UserError(f"jobs.{config.job}.name: two jobs have this name, and a sweep varies one; rename one")
    at = [isinstance(job, dict) and job.get("name") == config.job for job in entries].index(True)
    points = [point_of(config, entries[at], number, values) for number, values in enumerate(first_values(config))]
    return [*entries[:at], *points, *entries[at + 1 :]]


def point_of(config: SweepConfig, job: Mapping[str, Any], number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point as a mapping: `job` with other values."""
    compared = {name: given for name, given in (("metric", config.metric), ("mode", config.mode)) if given is not None}
    written = {"sweep": dataclasses.asdict(config), "number": number, "values": dict(values)}
    return {**job, **compared, **values, "name": f"{config.job}-{number:03d}", "point": written}


def first_values(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the values of the points that are there from the start; UserError where there are none such."""
    _check_keys_used(config)
    choices, num = config.choices, config.num_points
    ranges = [name for name in config.over if name not in choices]
    size = math.prod(map(len, choices.values()))
    if config.strategy == "grid" and ranges:
        raise UserError(f"sweep.over.{key_name(ranges[0])}: a range has no grid; give a list, or strategy: random")
    if num > MOST_POINTS:
        raise UserError(
            f"sweep.over: has {num:,} combinations, and at most {MOST_POINTS:,} can be points; set sweep.num, and strategy: random"
        )
    if config.strategy == "grid" and num != size:
        raise UserError(f"sweep.num: {num} is not the grid's {size} points; remove it, or use strategy: random")
    if num > size and not ranges:
        raise UserError(f"sweep.num: {num} is more than the {size} points that sweep.over has; lower it, or give more values")
    if config.strategy == "optuna":
        check_optuna()
        return _drawn(config, min(num, FIRST_ASKED))
    if ranges or num < size:
        return _drawn(config, num)
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]


def _check_keys_used(config: SweepConfig) -> None:
    """Raise UserError for values that are given twice, or too many, and for a key that the strategy does not use."""
    for name, choices in config.choices.items():
        if twice := [value for at, value in enumerate(choices[:MOST_VALUES]) if value in choices[:at]]:
            raise UserError(f"sweep.over.{key_name(name)}: {show(twice[0])} is in the list twice; remove one of the two")
    if (number := sum(map(len, config.choices.values()))) > MOST_VALUES:
        raise UserError(f"sweep.over: lists {number:,} values, and at most {MOST_VALUES} are supported; give ranges")
    unused = () if config.strategy in HALVING else ("seed",) * (config.strategy == "grid") + ("reduction", "first_rung")
    for field in dataclasses.fields(config):
        if field.name in unused and (value := getattr(config, field.name)) != field.default:
            raise UserError(f"sweep.{field.name}: {value} means nothing to strategy: {config.strategy}; remove it, or use another strategy")


def _drawn(config: SweepConfig, num: int) -> list[dict[str, Any]]:
    """Return the first `num` points that are drawn and differ; UserError where fewer are found."""
    found: dict[str, dict[str, Any]] = {}
    for index in range(DRAWS * num):
        values = _draw(config, index)
        found.setdefault(repr(values), values)
        if len(found) == num:
            return [*found.values()]
    raise UserError(f"sweep.num: {num} points were to differ, and {len(found)} were found in sweep.over; lower it, or give more values")


def _draw(config: SweepConfig, number: int) -> dict[str, Any]:
    """Draw a point's values, each to six digits, from the sweep's seed and its number alone."""
    draw = random.Random(f"{config.seed} {number}")
    return {name: value_at(axis, draw.random()) for name, axis in config.over.items()}


def value_at(axis: Mapping[str, Any], share: float) -> Any:
    """Return the value at a share, 0 to below 1, of what a key goes over."""
    if "choices" in axis:
        return axis["choices"][int(share * len(axis["choices"]))]
    low, high, whole = axis["min"], axis["max"], is_whole(axis)
    value = low * ((high + whole) / low) ** share if axis["log"] else low + share * (high + whole - low)
    return in_range(axis, value)


def is_whole(axis: Mapping[str, Any]) -> bool:
    """Whether a range is one of whole numbers."""
    return isinstance(axis["min"], int) and isinstance(axis["max"], int)


def in_range(axis: Mapping[str, Any], value: float) -> float:
    """Return a number of a range as points have it: whole, or to six digits."""
    return min(axis["max"], int(value) if is_whole(axis) else max(axis["min"], float(f"{value:.6g}")))


def badness(value: float | None, mode: str) -> float:
    """Return a number that is the smaller the better a value of the metric is; infinite for one that is not finite."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def check_optuna() -> None:
    """Raise UserError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweep.strategy: optuna needs the package optuna, which is not installed; pip install optuna, or use random")


def by_sweep(jobs: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the points among jobs, in the order of their numbers, by the names of their sweeps."""
    found: dict[str, list[Any]] = {}
    for job in sorted((job for job in jobs if job.point is not None), key=lambda job: job.point.number):
        found.setdefault(job.point.sweep.job, []).append(job)
    return found


def check_point(where: str, job: Any, point: Point) -> None:
    """Raise UserError unless a point, the JobConfig `job`, has the name and the numbers that its sweep gave it."""
    of, values, named = point.sweep, point.values, f"{point.sweep.job}-{point.number:03d}"
    rules = {field.name: field.metadata["rule"] for field in dataclasses.fields(job)}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    same = values.keys() == of.over.keys() <= rules.keys() and all(
        rules[name](where, numbers[name]) == getattr(job, name) for name in numbers
    )
    if job.name != named or not same:
        raise UserError(f"{where}.point: is what a sweep wrote for {named} with {show(values)}; set name and values back, or remove point")
