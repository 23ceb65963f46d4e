"""A machine's cost table, as `megatron-lora calibrate` measures it: what `plan`, `auto` and the planner go by in place of formulas.

    {"format": 1, "of": {}, "layers": {"none": {}, "cheap": {}, "full": {}}, "head": {}, "step_s": 1e-3, "links": {}, "about": {}}

`of` names what a table is of: a device, the shape of a layer, a tensor-parallel layout, the number format and what computes. Numbers of
layers, of stages, of replicas and of jobs are free. Tables lie below the cache directory, a file for each `of`; a run keeps the one that
it began with as calibration.json, and takes that one when it is resumed: a plan depends on it.

    device = calibrated(device, find_calibration(cache_dir(), config, architecture, device))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.files import write_atomically
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.planning.devices import device_like
from megatron_lora.planning.predict import cost_of, item_bytes, message_and_step_seconds, predicted_peaks, shape_of
from scheduling.cost import Device, Link, MeasuredCosts, PassCost, StageCost

FORMAT = 1
RUN_FILE = "calibration.json"  # of a run's directory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A table: of what (`subject_of`), the costs, what carries messages ("stage" and "tensor" neighbours), and how it was measured."""

    subject: Mapping[str, object]
    costs: MeasuredCosts
    links: Mapping[str, Link]
    about: Mapping[str, object]  # date, commit, packages, memory_bytes, fit_error

    def describe(self) -> str:
        """Say in a few words where the figures come from."""
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
            "links": {name: dataclasses.asdict(link) for name, link in self.links.items()},
            "about": dict(self.about),
        }
        return json.dumps(tree, indent=1) + "\n"


def subject_of(config: RunConfig, architecture: Architecture, device: Device) -> dict[str, object]:
    """Return what a table would have to be of, to serve a config on a device."""
    shape = {name: value for name, value in dataclasses.asdict(shape_of(architecture)).items() if name != "num_layers"}
    kind = {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence, "bytes_per_number": item_bytes(config, device)}
    return {"device": device.name, **shape, **kind, "base_weights": config.base_weights, "backend": config.backend}


def calibration_file(cache: Path, subject: Mapping[str, object]) -> Path:
    """Return where the table of a subject is kept."""
    return cache / "calibrations" / f"{hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:40]}.json"


def read_calibration(path: Path, option: str = "calibration") -> Calibration:
    """Read a table; UserError names the option for a file that holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        links = {name: Link(**link) for name, link in tree["links"].items()}
        costs = MeasuredCosts(
            layers=tuple((policy, _stage_cost(cost)) for policy, cost in tree["layers"].items()),
            head=_stage_cost(tree["head"]),
            step_s=float(tree["step_s"]),
            hop=links.get("stage"),
        )
        if tree["format"] != FORMAT or not {"none", "cheap", "full"} <= tree["layers"].keys():
            raise ValueError("another format")
        return Calibration(subject=tree["of"], costs=costs, links=links, about=tree["about"])
    except OSError as error:
        raise UserError(f"{option}: {str(path)!r} cannot be read ({error.strerror}); name a file of megatron-lora calibrate") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{option}: {str(path)!r} holds no cost table; write one with megatron-lora calibrate --output FILE") from None


def _stage_cost(tree: dict) -> StageCost:
    return StageCost(PassCost(**tree["forward"]), PassCost(**tree["backward"]))


def find_calibration(cache: Path, config: RunConfig, architecture: Architecture, device: Device) -> Calibration | None:
    """Return this user's table for a config on a device, None where none was measured."""
    file = calibration_file(cache, subject_of(config, architecture, device))
    return read_calibration(file) if file.is_file() else None


def keep_calibration(
    run: Path, begun: bool, cache: Path, config: RunConfig, architecture: Architecture, device: Device
) -> Calibration | None:
    """Return the table that a run goes by, kept in its directory: the one that lies there, for a run that has not `begun` one of the cache.

    None where there is none, or where the layout has changed to one that the run's table is not of.
    """
    file = run / RUN_FILE
    if not file.exists():
        found = None if begun else find_calibration(cache, config, architecture, device)
        if found is not None:
            write_atomically(file, found.to_json())
        return found
    found = read_calibration(file)
    return None if differing(found, config, architecture, device) else found


def differing(table: Calibration, config: RunConfig, architecture: Architecture, device: Device) -> str:
    """Say what keeps a table from serving a config on a device; empty where nothing does."""
    for name, value in subject_of(config, architecture, device).items():
        if table.subject.get(name) != value:
            return f"is of {name} {table.subject.get(name)!r}, and this config needs {value!r}"
    return ""


def calibrated(device: Device, table: Calibration | None) -> Device:
    """Return a device with a table's costs in place of the formulas; without a table as it is."""
    return device if table is None else dataclasses.replace(device, measured=table.costs)


def device_of(table: Calibration) -> Device:
    """Return the device that a table was measured on, for a machine that is another."""
    return calibrated(device_like(str(table.subject["device"]), float(str(table.about["memory_bytes"]))), table)


def predicted_cost(
    config: RunConfig, architecture: Architecture, device: Device, target_share: float, table: Calibration | None, jobs: Sequence[str]
) -> dict:
    """Return what cost.json says of a resolved run: seconds of its stages, messages and steps, and the jobs that are left."""
    hop_s, step_s = message_and_step_seconds(config, architecture, device)
    basis = f"the table figures of {device.name}" if table is None else table.describe()
    stages = cost_of(config, architecture, device, target_share).to_json()
    peaks = predicted_peaks(config, architecture, device)
    return {"jobs": list(jobs), "basis": basis, "stages": stages, "hop_s": hop_s, "step_s": step_s, "peaks": peaks}
