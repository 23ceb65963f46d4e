"""The cost of one layer and of the head, per recomputation policy, and how stages are put together from them.

A table is what profile_layers.py writes: {"layer": {policy: cost}, "head": cost, ...}, a cost being a forward's and a backward's four
coefficients (scheduling.cost.PassCost). A stage costs its layers' sum, the last one's head too; embedding and final norm, which hardly
count, are in the layer's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.plan_report import read_cost
from scheduling.cost import CostModel, PassCost, StageCost, stage_policies


def total(costs: Sequence[StageCost]) -> StageCost:
    """Return the cost of doing all of these, one after another."""

    def add(passes: Sequence[PassCost]) -> PassCost:
        return PassCost(**{field.name: sum(getattr(one, field.name) for one in passes) for field in fields(PassCost)})

    return StageCost(add([cost.forward for cost in costs]), add([cost.backward for cost in costs]))


def stages_of(table: dict, layers: Sequence[int], recompute: str | Sequence[str]) -> CostModel:
    """Return the cost of stages of so many layers under a policy, or one policy per layer."""
    *policies, head = CostModel.from_json([*table["layer"].values(), table["head"]]).stages
    costs = dict(zip(table["layer"], policies, strict=True))
    stages = []
    for index, chosen in enumerate(stage_policies(layers, recompute)):
        parts = [costs[policy] for policy in chosen] + ([head] if index == len(layers) - 1 else [])
        stages.append(total(parts))
    return CostModel(tuple(stages))


def read_stages(path: Path, layers: Sequence[int], recompute: str | Sequence[str], shape: str) -> CostModel:
    """Read a cost model of these stages: the newest table for the shape in a .jsonl file, or a cost model as `plan --cost` takes it."""
    if path.suffix != ".jsonl":
        return read_cost(str(path), len(layers))
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--cost: {path} cannot be read ({error}); write one with profile_layers.py") from None
    tables = [line for line in lines if line.get("shape") == shape]
    if not tables:
        raise UserError(f"--cost: {path} has no table for {shape}; write one with profile_layers.py --shape {shape}")
    return stages_of(tables[-1], layers, recompute)


def as_plain(cost: StageCost) -> dict:
    """Return a cost as JSON has it."""
    return asdict(cost)
