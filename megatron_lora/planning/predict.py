"""What a run costs by the models of time and memory: `scheduling`'s formulas, fed from a config, an architecture and a device."""

from __future__ import annotations

import dataclasses

from megatron_lora.config.schema import RunConfig
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.parallel.partition import layers_of_stages
from megatron_lora.planning.devices import reference_of
from scheduling.cost import CostModel, Device, ModelShape, head_share, stage_costs
from scheduling.layer_memory import Adapter
from scheduling.memory import (
    StageMemory,
    loss_chunk_rows,
    peak_bytes,
    stage_memory,
)
from scheduling.row_tiles import linear_tiles
from scheduling.slot_cost import SlotCost

USUAL_TOKENS = 4096  # of a microbatch, where the stages are split before `auto` is resolved
MOST_OF_A_SEGMENT = 0.02  # of a usual microbatch's time, as was measured; of smaller models it is not known


def predicted_peaks(config: RunConfig, architecture: Architecture, device: Device) -> list[float]:
    """Return the bytes of each stage at its worst moment with full slots, as torch.cuda.max_memory_allocated counts; all is resolved."""
    stages = memory_of(config, architecture, device)
    return [peak_bytes(memory, stage, len(stages), int(config.microbatch_tokens)) for stage, memory in enumerate(stages)]


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the numbers of a model that decide its cost."""
    return ModelShape(**{field.name: getattr(architecture, field.name) for field in dataclasses.fields(ModelShape)})


def cost_of(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> CostModel:
    """Return the seconds of each stage on a device, as measured there or by its table figures; the config's layers are resolved."""
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel)]
    share = _head_share(config, architecture, device, target_share)
    return stage_costs(shape_of(architecture), device, layers, config.parallel.tensor, config.recompute, share)


def message_and_step_seconds(config: RunConfig, architecture: Architecture, device: Device) -> tuple[float, float]:
    """Return the seconds of a full microbatch's message between stages and of an optimizer step, where they were measured; else zeros."""
    if device.measured is None:
        return 0.0, 0.0
    parallel, hop = config.parallel, device.measured.hop
    rows = _tokens(config) / (parallel.tensor if parallel.sequence else 1)
    hop_s = hop.seconds(rows * architecture.hidden_size * item_bytes(config, device)) if hop and parallel.pipeline > 1 else 0.0
    return hop_s, device.measured.step_s


def planner_cost(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> SlotCost:
    """Return what the planner weighs slots with, by the reference device's figures; the config's layers are resolved."""
    mean_rank, reference = sum(job.r for job in config.jobs) / len(config.jobs), reference_of(device)
    model = cost_of(config, architecture, reference, target_share)
    most_layers = max(len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel))
    per_segment = 2 * reference.segment_s * most_layers / max(model.token_seconds(mean_rank), 1e-30)
    per_segment = min(per_segment, MOST_OF_A_SEGMENT * USUAL_TOKENS)
    return model.slot_cost(mean_rank, per_segment, linear_tiles(shape_of(architecture), reference, config.parallel.tensor))


def _head_share(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> float:
    """Return the rows of the head per token of a full microbatch."""
    chunk_rows = loss_chunk_rows(-(-architecture.vocab_size // config.parallel.tensor), item_bytes(config, device))
    return head_share(target_share, _tokens(config), chunk_rows)


def _tokens(config: RunConfig) -> int:
    """Return the tokens of a full microbatch, of a usual one where `auto` is not resolved."""
    return USUAL_TOKENS if config.microbatch_tokens == "auto" else int(config.microbatch_tokens)


def item_bytes(config: RunConfig, device: Device) -> int:
    """Return the bytes of a number of the compute dtype."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.name != "cpu")
    return 2 if bf16 else 4


def memory_of(config: RunConfig, architecture: Architecture, device: Device) -> tuple[StageMemory, ...]:
    """Return the memory model of each stage, on one tensor rank; the config's layers and recomputation are resolved."""
    assert config.recompute != "auto", "recompute is not resolved"
    parallel, shape = config.parallel, shape_of(architecture)
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, parallel)]
    item = item_bytes(config, device)
    stages = [
        stage_memory(
            shape,
            layers,
            stage,
            adapters=[Adapter(job.r, job.target_modules) for job in config.jobs],
            tensor=parallel.tensor,
            recompute=config.recompute,
            item=item,
            weight_bytes=2.0 if config.base_weights == "fp8" else None,  # two copies of 8 bits
            sequence=parallel.sequence,
            cuda=device.name != "cpu",
            replicas=parallel.data,
        )
        for stage in range(parallel.pipeline)
    ]
    if architecture.tied_head and parallel.pipeline == 1:  # one matrix is embedding and head
        once = shape.hidden_size * -(-shape.vocab_size // parallel.tensor) * item
        stages = [dataclasses.replace(stages[0], weights=stages[0].weights - once)]
    return tuple(stages)
