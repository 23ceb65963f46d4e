"""Predicts a run's time and memory: applies `scheduling`'s cost and memory models to a config, an architecture and a device."""

from __future__ import annotations

import dataclasses

from megatron_lora.config.rules import storage_and_compute
from megatron_lora.config.schema import RunConfig
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.quantisation import NF4_BLOCK
from megatron_lora.parallel.partition import layers_of_stages
from megatron_lora.planning.adapter_memory import GB, MODEST_SHARE, adapters_of, bytes_of, most, rooms, rows_of
from megatron_lora.planning.devices import reference_of
from megatron_lora.planning.targets import jobs_of
from scheduling.cost import CostModel, Device, StageCost, head_share, linear_tiles, stage_costs, stage_policies
from scheduling.layer_memory import MAGNITUDES
from scheduling.memory import (
    StageMemory,
    copied_share,
    loss_chunk_rows,
    peak_bytes,
    rank_row_bytes,
    stage_memory,
)
from scheduling.model_shape import ModelShape
from scheduling.slot_cost import SlotCost

USUAL_TOKENS = 4096  # of a usual microbatch: stands in for microbatch_tokens while that is `auto`
LINEARS_IN_8_BITS = 1.6  # times as fast as in 16, with rounding and LoRA: 1.35 to 1.65 measured (fp8.jsonl)
MEMORY_BYTES_PER_S = 3e12  # that unpacking reaches on a Hopper GPU
MAX_SEGMENT_SHARE = 0.02  # bound on a segment's fixed cost, as a share of a usual microbatch's time: the largest measured


def predicted_peaks(config: RunConfig, architecture: Architecture, device: Device) -> list[float]:
    """Return each stage's peak memory with full microbatches, in bytes as torch.cuda.max_memory_allocated counts them.

    The config must be resolved.
    """
    stages = memory_of(config, architecture, device)
    return [peak_bytes(memory, stage, len(stages), int(config.microbatch_tokens)) for stage, memory in enumerate(stages)]


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the dimensions of a model that decide its cost."""
    return ModelShape(**{field.name: getattr(architecture, field.name) for field in dataclasses.fields(ModelShape)})


def cost_of(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> CostModel:
    """Return the time model of each stage on a device, from its measured costs or the table in scheduling.cost.

    layers_per_stage must be resolved.
    """
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel)]
    share = head_share_of(config, architecture, device, target_share)
    rows = config.parallel.tensor if config.parallel.sequence else 1
    to_host = architecture.hidden_size * item_bytes(config, device) / rows if config.activation_offloading is True else 0.0
    storage, compute = storage_and_compute(config.base_weights)
    speed = LINEARS_IN_8_BITS if compute == "fp8" and device.name != "cpu" else 1.0
    model = stage_costs(shape_of(architecture), device, layers, config.parallel.tensor, config.recompute, share, to_host, speed)
    if device.measured is None and any(job.experts for job in config.jobs):
        model = _with_experts(model, config, shape_of(architecture))
    if storage == "bf16" or device.measured is not None or device.name == "cpu":
        return model
    moved = shape_of(architecture).layer_params / config.parallel.tensor * sum(stored_bytes(config.base_weights, 2)) / MEMORY_BYTES_PER_S
    return _unpacking(model, layers, config.recompute, 0.0 if storage == compute else moved, moved)  # 8 bits are multiplied as stored


def _with_experts(model: CostModel, config: RunConfig, shape: ModelShape) -> CostModel:
    """Return a model in which a rank of a job also costs what its experts' adapters do, in the mean of all jobs."""
    ranks, of_experts = (sum(getattr(job, name) for job in config.jobs) for name in ("lora_rank", "expert_rank"))
    times = 1 + of_experts * shape.expert_lora_width / (ranks * shape.lora_width)
    stages = (
        StageCost(*(dataclasses.replace(one, per_rank_token=one.per_rank_token * times) for one in (stage.forward, stage.backward)))
        for stage in model.stages
    )
    return CostModel(tuple(stages))


def _unpacking(model: CostModel, layers: list[int], recompute: str | tuple[str, ...], forward_s: float, backward_s: float) -> CostModel:
    """Return a model in which each layer also unpacks its weights, once in a forward and once in a backward."""
    stages = []
    for stage, policies in zip(model.stages, stage_policies(layers, recompute), strict=True):
        forward, backward = len(policies) * forward_s, len(policies) * backward_s + policies.count("full") * forward_s
        passes = ((stage.forward, forward), (stage.backward, backward))
        stages.append(StageCost(*(dataclasses.replace(one, fixed=one.fixed + seconds) for one, seconds in passes)))
    return CostModel(tuple(stages))


def message_and_step_seconds(config: RunConfig, architecture: Architecture, device: Device) -> tuple[float, float]:
    """Return the seconds of a full microbatch's message between stages and of an optimizer step, where they were measured; else zeros."""
    if device.measured is None:
        return 0.0, 0.0
    parallel, hop = config.parallel, device.measured.hop
    rows = budget_or_usual(config) / parallel.row_multiple
    hop_s = hop.seconds(rows * architecture.hidden_size * item_bytes(config, device)) if hop and parallel.pipeline > 1 else 0.0
    return hop_s, device.measured.step_s


def planner_cost(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> SlotCost:
    """Return the planner's cost model of a slot, for the reference device.

    layers_per_stage must be resolved.
    """
    mean_rank, reference = mean_rank_of(config), reference_of(device)
    model = cost_of(config, architecture, reference, target_share)
    most_layers = max(len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel))
    per_segment = 2 * reference.segment_s * most_layers / max(model.token_seconds(mean_rank), 1e-30)
    per_segment = min(per_segment, MAX_SEGMENT_SHARE * USUAL_TOKENS)
    return model.slot_cost(mean_rank, per_segment, linear_tiles(shape_of(architecture), reference, config.parallel.tensor))


def window_time(config: RunConfig, architecture: Architecture, device: Device, target_share: float, window_s: float) -> float:
    """Return the time that a window of `window_s` predicted seconds has, in the planner's unit (scheduling.accounting).

    The unit is half of a token's forward and backward on the slowest stage of the reference device, as in planner_cost.
    """
    model = cost_of(config, architecture, reference_of(device), target_share)
    mean_rank = mean_rank_of(config)
    usual_s = max(stage.seconds(USUAL_TOKENS, 0.0, mean_rank * USUAL_TOKENS) for stage in model.stages)
    return window_s * 2 * (USUAL_TOKENS + model.slot_cost(mean_rank).fixed) / max(usual_s, 1e-30)


def mean_rank_of(config: RunConfig) -> float:
    """Return the mean LoRA rank of the jobs."""
    return sum(job.lora_rank for job in config.jobs) / len(config.jobs)


def head_share_of(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> float:
    """Return the rows that the head computes per token of a full microbatch: the targets, rounded up to chunks."""
    chunk_rows = loss_chunk_rows(-(-architecture.vocab_size // config.parallel.tensor), item_bytes(config, device))
    return head_share(target_share, budget_or_usual(config), chunk_rows)


def budget_or_usual(config: RunConfig) -> int:
    """Return the token budget of a microbatch; that of a usual one while it is `auto`."""
    return USUAL_TOKENS if config.microbatch_tokens == "auto" else int(config.microbatch_tokens)


def item_bytes(config: RunConfig, device: Device) -> int:
    """Return the bytes per number in the compute dtype."""
    return 2 if precision_of(config, device) == "bf16" else 4


def precision_of(config: RunConfig, device: Device) -> str:
    """Return the precision of a run on a device: `auto` is bf16 on a GPU, and fp32 on a CPU, which is slow in 16 bits."""
    if config.precision != "auto":
        return config.precision
    return "fp32" if device.name == "cpu" else "bf16"


def rank_row_bytes_of(config: RunConfig, architecture: Architecture, item: int) -> dict[str, int]:
    """Return module -> bytes of one rank row in all layers of the stage that has the most; `item` is the bytes of a number.

    Those of experts are there where a job adapts them, and magnitudes where one is a DoRA. layers_per_stage must be resolved.
    """
    layers = max(len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel))
    of_layer = rank_row_bytes(shape_of(architecture), item, config.parallel.tensor, config.parallel.expert)
    frozen = () if any(job.experts for job in config.jobs) else architecture.expert_modules
    if all(job.adapter == "lora" for job in config.jobs):
        frozen = (*frozen, MAGNITUDES)
    return {module: num_bytes * layers for module, num_bytes in of_layer.items() if module not in frozen}


def room_of(config: RunConfig, architecture: Architecture, item: int) -> dict[str, int]:
    """Return module -> rank rows of the arena of a config whose adapter_memory is resolved."""
    return rooms(
        adapters_of(jobs_of(config, architecture)), rank_row_bytes_of(config, architecture, item), float(config.adapter_memory) * GB
    )


def least_residents(config: RunConfig, architecture: Architecture, device: Device) -> int:
    """Return beside how many of the largest jobs activations are chosen while adapter_memory is `auto` (adapter_memory.py)."""
    modest = most(
        adapters_of(jobs_of(config, architecture)),
        rank_row_bytes_of(config, architecture, item_bytes(config, device)),
        MODEST_SHARE * device.memory_bytes,
    )
    return min(len(config.jobs), max(2 * (config.parallel.pipeline + config.parallel.norm_delay), modest))


def stored_bytes(base_weights: str, item: int) -> tuple[float, float]:
    """Return the bytes of a frozen weight as it is stored, and where it is unpacked for a product, if it is."""
    storage, compute = storage_and_compute(base_weights)
    if storage == "bf16":
        return (2.0 if compute == "fp8" else float(item)), 0.0  # two copies in 8 bits
    return (1.0 if storage == "fp8" else 0.5 + 4 / NF4_BLOCK), 1.0 if compute == "fp8" else float(item)


def memory_of(config: RunConfig, architecture: Architecture, device: Device) -> tuple[StageMemory, ...]:
    """Return each stage's memory model, for one tensor rank.

    layers_per_stage and recompute must be resolved. An activation_offloading that is not yet counts as false,
    an adapter_memory as room for `least_residents`.
    """
    assert config.recompute != "auto", "recompute is not resolved"
    parallel, shape = config.parallel, shape_of(architecture)
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, parallel)]
    item = item_bytes(config, device)
    weight_bytes, scratch_bytes = stored_bytes(config.base_weights, item)
    adapters = adapters_of(jobs_of(config, architecture))
    demand = rows_of(adapters)
    if config.adapter_memory == "auto":
        room = rows_of(adapters, least_residents(config, architecture, device))
    else:
        room = room_of(config, architecture, item)
    of_factors = [(rows, demand[module]) for module, rows in room.items() if module in demand and module != MAGNITUDES]
    residents = max((-(-len(adapters) * rows // wanted) for rows, wanted in of_factors), default=1)
    stages = [
        stage_memory(
            shape,
            layers,
            stage,
            adapters=list(dict.fromkeys(adapters)),
            room=room,
            residents=min(len(adapters), residents),
            tensor=parallel.tensor,
            expert=parallel.expert,
            recompute=config.recompute,
            item=item,
            weight_bytes=weight_bytes,
            scratch_bytes=scratch_bytes,
            sequence=parallel.sequence,
            cuda=device.name != "cpu",
            replicas=parallel.data,
            offload=config.activation_offloading is True,
            deterministic=config.deterministic,
        )
        for stage in range(parallel.pipeline)
    ]
    # Adapters that jobs are held to, beside those that they train.
    held = rows_of(adapters_of([job for job in jobs_of(config, architecture) if job.reference == "init_adapter"]))
    held = {module: min(rows, room.get(module, 0)) for module, rows in held.items()}
    copies = bytes_of(held, rank_row_bytes_of(config, architecture, item)) * copied_share(item)
    stages = [dataclasses.replace(stage, adapters=stage.adapters + copies) for stage in stages]
    if architecture.tied_head and parallel.pipeline == 1:  # one matrix is embedding and head; stage_memory counts two
        once = shape.hidden_size * -(-shape.vocab_size // parallel.tensor) * item
        stages = [dataclasses.replace(stages[0], weights=stages[0].weights - once)]
    return tuple(stages)
