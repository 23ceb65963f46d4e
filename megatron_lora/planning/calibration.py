"""A machine's cost table, measured by `megatron-lora calibrate`: `plan`, `auto` and the planner use it instead of formulas.

    {"format": 1, "of": {}, "layers": {"none": {}, "cheap": {}, "full": {}}, "head": {}, "step_s": 1e-3, "links": {}, "about": {}}

`of` is the table's subject: a device, the shape of a layer, the tensor-parallel layout, the bytes
of an element, `base_weights` and `backend`. A table serves any number of layers, stages, replicas
and jobs. Tables lie in the cache directory, one file for each subject. A run keeps the table that
it began with as calibration.json and uses it when it is resumed, since its plan depends on it.

    device = calibrated(device, find_calibration(cache_dir(), config, architecture, device))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.files import CHANGED, sealed, unsealed, write_atomically
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.planning.devices import device_like
from megatron_lora.planning.predict import cost_of, item_bytes, message_and_step_seconds, predicted_peaks, shape_of
from scheduling.cost import Device, Link, MeasuredCosts, PassCost, StageCost

FORMAT = 1
RUN_FILE = "calibration.json"  # of a run's directory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A table: its subject (`subject_of`), the costs, and how it was measured."""

    subject: Mapping[str, object]
    costs: MeasuredCosts
    about: Mapping[str, Any]  # date, commit, packages, memory_bytes, fit_error, turns

    def describe(self) -> str:
        """Return whose calibration it is, for messages."""
        return f"the calibration of {self.subject['device']} of {self.about['date']}"

    def to_json(self) -> str:
        """Return the table as its file holds it."""
        costs = self.costs
        tree = {
            "format": FORMAT,
            "of": dict(self.subject),
            "layers": {policy: dataclasses.asdict(cost) for policy, cost in costs.layers},
            "head": dataclasses.asdict(costs.head),
            "step_s": costs.step_s,
            "links": {} if costs.hop is None else {"stage": dataclasses.asdict(costs.hop)},
            "about": dict(self.about),
        }
        return sealed(json.dumps(tree, indent=1))


def subject_of(config: RunConfig, architecture: Architecture, device: Device) -> dict[str, object]:
    """Return the subject of the tables that serve a config on a device."""
    found = shape_of(architecture)
    given = {field.name: (getattr(found, field.name), field.default) for field in dataclasses.fields(found) if field.name != "num_layers"}
    shape = {name: value for name, (value, default) in given.items() if value != default or name == "qk_norm"}
    kind = {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence, "bytes_per_number": item_bytes(config, device)}
    kind |= {"expert": config.parallel.expert} if config.parallel.expert > 1 else {}
    return {"device": device.name, **shape, **kind, "base_weights": config.base_weights, "backend": config.backend}


def calibration_file(cache: Path, subject: Mapping[str, object]) -> Path:
    """Return where the table of a subject is kept."""
    return cache / "calibrations" / f"{hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:40]}.json"


def read_calibration(path: Path, option: str = "calibration") -> Calibration:
    """Read a table; UserError names the option for a file that holds none, or that was changed."""
    try:
        tree = unsealed(path.read_text(encoding="utf-8"))
        hop = tree["links"].get("stage")
        costs = MeasuredCosts(
            layers=tuple((policy, _stage_cost(cost)) for policy, cost in tree["layers"].items()),
            head=_stage_cost(tree["head"]),
            **_figures({"step_s": tree["step_s"]}),
            hop=None if hop is None else Link(**_figures(hop)),
        )
        _figures({"memory_bytes": tree["about"]["memory_bytes"]})
        named = "device" in tree["of"] and "date" in tree["about"]
        if tree["format"] != FORMAT or not named or not {"none", "cheap", "full"} <= tree["layers"].keys():
            raise ValueError("another format")
        return Calibration(subject=tree["of"], costs=costs, about=tree["about"])
    except OSError as error:
        raise UserError(f"{option}: {str(path)!r} cannot be read ({error.strerror}); name a file of megatron-lora calibrate") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = CHANGED if str(error) == CHANGED else "holds no cost table"
        raise UserError(f"{option}: {str(path)!r} {fault}; write one with megatron-lora calibrate --output FILE") from None


def _stage_cost(tree: dict) -> StageCost:
    return StageCost(PassCost(**_figures(tree["forward"])), PassCost(**_figures(tree["backward"])))


def _figures(tree: dict) -> dict[str, float]:
    """Return figures by their names; ValueError or TypeError unless all are finite numbers of at least 0."""
    figures = {name: float(value) for name, value in tree.items()}
    if not all(0 <= figure < math.inf for figure in figures.values()):
        raise ValueError(figures)
    return figures


def find_calibration(cache: Path, config: RunConfig, architecture: Architecture, device: Device) -> Calibration | None:
    """Return this user's table for a config on a device, None where none was measured."""
    file = calibration_file(cache, subject_of(config, architecture, device))
    return read_calibration(file) if file.is_file() else None


def keep_calibration(
    run: Path, begun: bool, cache: Path, config: RunConfig, architecture: Architecture, device: Device
) -> tuple[Calibration | None, str]:
    """Return the table that a run uses, or None if it uses formulas; and what to print about it, which may be nothing.

    A run that has `begun` uses the table in its directory, if there is one and it serves the run's
    layout, which may have changed. Before that, a table from the cache is copied there.
    """
    file = run / RUN_FILE
    if not file.exists():
        found = None if begun else find_calibration(cache, config, architecture, device)
        if found is not None:
            write_atomically(file, found.to_json())
    else:
        found = read_calibration(file)
        if differs := differing(found, config, architecture, device):
            return None, f"costs are by formulas: {file} {differs}"
    return found, "" if found is None else f"costs are by {found.describe()}"


def differing(table: Calibration, config: RunConfig, architecture: Architecture, device: Device) -> str:
    """Return in what a table's subject differs from what a config needs on a device; empty where it serves."""
    needed = subject_of(config, architecture, device)
    for name in {**needed, **table.subject}:
        if table.subject.get(name) != needed.get(name):
            return f"is of {name} {table.subject.get(name)!r}, and this config needs {needed.get(name)!r}"
    return ""


def calibrated(device: Device, table: Calibration | None) -> Device:
    """Return a device with a table's costs in place of the formulas, or the device itself without a table."""
    return device if table is None else dataclasses.replace(device, measured=table.costs)


def device_of(table: Calibration) -> Device:
    """Return the device that a table was measured on, which this machine need not have."""
    return calibrated(device_like(str(table.subject["device"]), float(table.about["memory_bytes"])), table)


def predicted_cost(
    config: RunConfig, architecture: Architecture, device: Device, target_share: float, table: Calibration | None, jobs: Sequence[str]
) -> dict:
    """Return what cost.json says of a resolved run: seconds of its stages, messages and steps, and its `jobs`."""
    hop_s, step_s = message_and_step_seconds(config, architecture, device)
    basis = f"the table figures of {device.name}" if table is None else table.describe()
    stages = dataclasses.asdict(cost_of(config, architecture, device, target_share))["stages"]
    peaks = predicted_peaks(config, architecture, device)
    return {"jobs": list(jobs), "basis": basis, "stages": stages, "hop_s": hop_s, "step_s": step_s, "peaks": peaks}
