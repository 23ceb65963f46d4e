"""The cost of one layer and of the head, per recomputation policy, and how stages are put together from them.

A table is what profile_layers.py writes: {"layer": {policy: cost}, "head": cost, ...}, a cost being a forward's and a backward's four
coefficients (scheduling.cost.PassCost). A stage costs its layers' sum, the last one's head too; embedding and final norm, which hardly
count, are in the layer's. A table is of a shape, a form of its frozen weights, one of so many tensor ranks and a kind of adapters.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from one_line import json_lines

from megatron_lora.commands.plan import read_cost
from megatron_lora.errors import UserError
from scheduling.cost import CostModel, PassCost, StageCost, stage_policies


def total(costs: Sequence[StageCost]) -> StageCost:
    """Return the cost of doing all of these, one after another."""

    def add(passes: Sequence[PassCost]) -> PassCost:
        return PassCost(**{field.name: sum(getattr(one, field.name) for one in passes) for field in fields(PassCost)})

    return StageCost(add([cost.forward for cost in costs]), add([cost.backward for cost in costs]))


def stages_of(table: dict, layers: Sequence[int], recompute: str | Sequence[str]) -> CostModel:
    """Return the cost of stages of so many layers under a policy, or one policy per layer."""
    chosen = stage_policies(layers, recompute)
    if missing := {policy for policies in chosen for policy in policies} - table["layer"].keys():
        policy = missing.pop()
        raise UserError(
            f"--cost: the table has no layers with recomputation {policy!r}; write one with profile_layers.py --policies {policy}"
        )
    *policies, head = CostModel.from_json([*table["layer"].values(), table["head"]]).stages
    costs = dict(zip(table["layer"], policies, strict=True))
    stages = []
    for index, of_stage in enumerate(chosen):
        parts = [costs[policy] for policy in of_stage] + ([head] if index == len(layers) - 1 else [])
        stages.append(total(parts))
    return CostModel(tuple(stages))


def table_name(shape: str, base_weights: str = "native", tensor: int = 1, adapters: str = "fused") -> str:
    """Return the case under which profile_layers.py keeps a table."""
    words = [f"1 of {tensor} tensor ranks"] if tensor > 1 else []
    return ", ".join([shape, base_weights, *words, *([adapters] if adapters != "fused" else [])])


def read_stages(path: Path, layers: Sequence[int], recompute: str | Sequence[str], name: str) -> CostModel:
    """Read a cost model of these stages: from a table (`table_name`) of a .jsonl file, or from a file as `plan --cost` takes it."""
    if path.suffix != ".jsonl":
        return read_cost(str(path), len(layers))
    return stages_of(read_table(path, name), layers, recompute)


def read_tables(path: Path) -> list[dict]:
    """Return all tables of a file; UserError where it cannot be read."""
    return json_lines(path, "write one with profile_layers.py")


def read_table(path: Path, name: str) -> dict:
    """Return the newest table of a name; UserError where there is none."""
    tables = [table for table in read_tables(path) if table.get("case") == name]
    if not tables:
        raise UserError(f"{path} has no table of {name!r}; write one with profile_layers.py")
    return tables[-1]


def at_pace(table: dict, pace: float) -> dict:
    """Return a table whose layers and head are as fast as `pace` times those of this one."""

    def slowed(cost: dict) -> dict:
        return {side: {name: value / pace for name, value in terms.items()} for side, terms in cost.items()}

    return table | {"layer": {policy: slowed(cost) for policy, cost in table["layer"].items()}, "head": slowed(table["head"])}


def fit_error(table: dict) -> float:
    """Return the mean of |predicted / measured - 1| over the layers' passes that a table was fitted to."""
    errors = []
    for policy, part, backward, *features, seconds in table["measurements"]:
        if part == 0:
            cost = PassCost(**table["layer"][policy]["backward" if backward else "forward"])
            errors.append(abs(cost.seconds(*features) / seconds - 1))
    return sum(errors) / len(errors)


def as_plain(cost: StageCost) -> dict:
    """Return a cost as JSON has it."""
    return asdict(cost)
