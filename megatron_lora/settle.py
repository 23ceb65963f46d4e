"""What a config leaves to us, settled by the cost and memory models: `layers_per_stage: null` and `microbatch_tokens: auto`.

    config = settle(config, architecture, lengths, this_device(ranks_here))     # both are numbers now

`plan` and the trainer both ask here. Stages are split, and slots weighed, by the figures of a reference device, so that both follow
from the config and the model's shape alone, whichever GPU is there; `auto` follows from the memory of the device it is asked for.
A key that the config gives stays as it is.
"""

import dataclasses
import os
from collections.abc import Sequence

from megatron_lora.architecture import Architecture, layers_of_stages
from megatron_lora.config import RunConfig
from megatron_lora.devices import reference_of, this_device
from megatron_lora.errors import UserError
from megatron_lora.run_dir import RunDirectory
from scheduling.cost import CostModel, Device, ModelShape, analytic_cost, head_layers, split_layers
from scheduling.data_parallel import deal
from scheduling.memory import StageMemory, choose_capacity, fitting_tokens, stage_memory
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths

USUAL_TOKENS = 4096  # of a microbatch, where the stages are split before `auto` is settled


def settle(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device) -> RunConfig:
    """Return the config with every choice made, for samples of `lengths` [job][step][sample] on such devices.

    Raises UserError where `auto` finds no room for the longest sample.
    """
    parallel = dataclasses.replace(config.parallel, layers_per_stage=choose_layers(config, architecture, device))
    config = dataclasses.replace(config, parallel=parallel)
    if config.microbatch_tokens != "auto":
        return config
    return dataclasses.replace(config, microbatch_tokens=choose_budget(config, architecture, lengths, device))


def settle_together(config: RunConfig, architecture: Architecture, lengths: Lengths, host) -> tuple[RunConfig, SlotCost]:
    """Settle a run's config, and the planner's weights, on the first rank for all of them; it tells and records what was chosen.

    `host` is a gloo group of all ranks. Other ranks of a run may have other memory: the first rank's decides.
    """
    import torch.distributed as dist

    chosen: list = [None, None]
    if dist.get_rank() == 0:
        device = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size)))
        settled = settle(config, architecture, lengths, device)
        with RunDirectory.join(config) as directory:
            directory.settle(settled)
        for line in describe(config, settled):
            print(line, flush=True)
        chosen = [settled, planner_cost(settled, architecture, device)]
    dist.broadcast_object_list(chosen, 0, group=host)
    return chosen[0], chosen[1]


def choose_layers(config: RunConfig, architecture: Architecture, device: Device) -> tuple[int, ...]:
    """Return each stage's number of layers: as the config says, else such that the slowest stage, the head included, is fastest."""
    if config.parallel.layers_per_stage is not None:
        return config.parallel.layers_per_stage
    tokens = USUAL_TOKENS if config.microbatch_tokens == "auto" else config.microbatch_tokens
    head = head_layers(shape_of(architecture), reference_of(device), tokens, config.parallel.tensor, config.recompute)
    return split_layers(architecture.num_layers, config.parallel.pipeline, head)


def choose_budget(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device) -> int:
    """Return the tokens of a microbatch: as many as memory allows, no more than pay."""
    cost = planner_cost(config, architecture, device)
    fitting = fitting_tokens(memory_of(config, architecture, device), device)
    try:
        return choose_capacity(deal(lengths, config.parallel.data, cost).rounds, config.parallel.pipeline, fitting, cost)
    except ValueError as error:
        raise UserError(
            f"microbatch_tokens: auto: {error} on {device.name} with {device.memory_bytes / 1e9:.1f} GB; use more stages or tensor ranks, "
            "recompute: full, a lower sequence_len, or a number of tokens to try it all the same"
        ) from None


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the numbers of a model that decide its cost."""
    return ModelShape(**{field.name: getattr(architecture, field.name) for field in dataclasses.fields(ModelShape)})


def cost_of(config: RunConfig, architecture: Architecture, device: Device) -> CostModel:
    """Return the seconds of each stage on a device, by its table figures; the config's layers are settled."""
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel)]
    return analytic_cost(shape_of(architecture), device, layers, config.parallel.tensor, config.recompute)


def planner_cost(config: RunConfig, architecture: Architecture, device: Device) -> SlotCost:
    """Return what the planner weighs slots with, by the reference device's figures; the config's layers are settled."""
    return cost_of(config, architecture, reference_of(device)).slot_cost(sum(job.r for job in config.jobs) / len(config.jobs))


def memory_of(config: RunConfig, architecture: Architecture, device: Device) -> tuple[StageMemory, ...]:
    """Return the memory model of each stage, on one tensor rank; the config's layers are settled."""
    parallel, shape = config.parallel, shape_of(architecture)
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, parallel)]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.name != "cpu")
    stages = [
        stage_memory(
            shape,
            layers,
            stage,
            total_rank=sum(job.r for job in config.jobs),
            tensor=parallel.tensor,
            recompute=config.recompute,
            weight_bytes=2 if bf16 else 4,
            sequence=parallel.sequence,
        )
        for stage in range(parallel.pipeline)
    ]
    if architecture.tied_head and parallel.pipeline == 1:  # one matrix is embedding and head
        once = shape.head_params * (2 if bf16 else 4) / parallel.tensor
        stages = [dataclasses.replace(stages[0], weights=stages[0].weights - once)]
    return tuple(stages)


def describe(before: RunConfig, after: RunConfig) -> Sequence[str]:
    """Say in lines what was settled that the config left open."""
    lines = []
    if before.microbatch_tokens == "auto":
        lines.append(f"microbatch_tokens: auto is {after.microbatch_tokens}")
    if before.parallel.layers_per_stage is None and after.parallel.pipeline > 1:
        lines.append(f"parallel.layers_per_stage: null is {list(after.parallel.layers_per_stage or ())}")
    return lines
