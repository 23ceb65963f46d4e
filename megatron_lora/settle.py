"""What a config leaves to us, settled by the cost and memory models: `layers_per_stage: null`, `microbatch_tokens` and `recompute: auto`.

    config = settle(config, architecture, lengths, this_device(ranks_here), target_share)     # all are numbers and policies now

`plan` and the trainer both ask here, and tell which share of the tokens are targets (data.target_share), the rows that the head computes;
where there are lengths alone it is 1. Times are those of a reference device, so that splits and plans do not hang on which GPU is there;
`auto` follows from the memory of the device it is asked for. Recomputation costs as little time as fits: first the layers that only make
norms and SwiGLU again, then as few as can be that run twice. Where it makes a stage slow, and the split is ours, layers move elsewhere.
A key that the config gives stays as it is.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from itertools import groupby

from megatron_lora.architecture import Architecture, layers_of_stages
from megatron_lora.config import RunConfig
from megatron_lora.devices import reference_of, size, this_device
from megatron_lora.errors import UserError
from megatron_lora.run_dir import RunDirectory
from scheduling.cost import CostModel, Device, ModelShape, analytic_cost, head_layers, head_share, split_layers, stage_policies
from scheduling.data_parallel import deal
from scheduling.layer_memory import Adapter
from scheduling.memory import (
    RESERVED,
    StageMemory,
    cheapest_policies,
    choose_capacity,
    fitting_tokens,
    loss_chunk_rows,
    peak_bytes,
    stage_memory,
    usable_bytes,
)
from scheduling.row_tiles import linear_tiles
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths

USUAL_TOKENS = 4096  # of a microbatch, where the stages are split before `auto` is settled
MOST_OF_A_SEGMENT = 0.02  # of a usual microbatch's time, as was measured; of smaller models it is not known


def settle(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device, target_share: float = 1.0) -> RunConfig:
    """Return the config with every choice made, for samples of `lengths` [job][step][sample] on such devices.

    Raises UserError where `auto` finds no room for the longest sample.
    """
    settled = _with_layers(config, choose_layers(config, architecture, device, target_share))
    if config.microbatch_tokens == "auto":
        settled = dataclasses.replace(settled, microbatch_tokens=choose_budget(settled, architecture, lengths, device, target_share))
    if config.recompute == "auto":
        settled = dataclasses.replace(settled, recompute=choose_recompute(settled, architecture, device))
        if config.parallel.layers_per_stage is None:
            settled = even_out(settled, architecture, device, lambda asked: _slowest(asked, architecture, device, target_share))
    return settled


def settle_together(
    config: RunConfig, architecture: Architecture, lengths: Lengths, target_share: float, host
) -> tuple[RunConfig, SlotCost]:
    """Settle a run's config, and the planner's weights, on the first rank for all of them; it tells and records what was chosen.

    `host` is a gloo group of all ranks. Other ranks of a run may have other memory: the first rank's decides.
    """
    import torch.distributed as dist

    chosen: list = [None, None]
    if dist.get_rank() == 0:
        device = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size)))
        settled = settle(config, architecture, lengths, device, target_share)
        with RunDirectory.join(config) as directory:
            directory.settle(settled)
        for line in [*describe(config, settled, target_share), *memory_line(config, settled, architecture, device)]:
            print(line, flush=True)
        chosen = [settled, planner_cost(settled, architecture, device, target_share)]
    dist.broadcast_object_list(chosen, 0, group=host)
    return chosen[0], chosen[1]


def choose_layers(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> tuple[int, ...]:
    """Return each stage's number of layers: as the config says, else such that the slowest stage, the head included, is fastest."""
    if config.parallel.layers_per_stage is not None:
        return config.parallel.layers_per_stage
    recompute = "none" if config.recompute == "auto" else config.recompute
    share = _head_share(config, architecture, device, target_share)
    head = head_layers(shape_of(architecture), reference_of(device), _tokens(config), config.parallel.tensor, recompute, share)
    return split_layers(architecture.num_layers, config.parallel.pipeline, head)


def choose_budget(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device, target_share: float = 1.0) -> int:
    """Return the tokens of a microbatch: as many as memory allows, no more than pay, recomputation counted where that is ours too."""
    free = config.recompute == "auto"
    plain, least = (dataclasses.replace(config, recompute=policy) if free else config for policy in ("none", "full"))
    cost = planner_cost(plain, architecture, device, target_share)
    fitting = fitting_tokens(memory_of(least, architecture, device), device)

    def slowdown(budget: int) -> float:
        without = dataclasses.replace(plain, microbatch_tokens=budget)
        asked = dataclasses.replace(without, recompute=choose_recompute(without, architecture, device))
        return _slowest(asked, architecture, device, target_share) / _slowest(without, architecture, device, target_share)

    try:
        rounds = deal(lengths, config.parallel.data, cost).rounds
        return choose_capacity(rounds, config.parallel.pipeline, fitting, cost, slowdown=slowdown if free else None)
    except ValueError as error:
        remedy = "" if free else "recompute: auto, "
        raise UserError(
            f"microbatch_tokens: auto: {error} on {device.name} with {device.memory_bytes / 1e9:.1f} GB; use more stages or tensor ranks, "
            f"{remedy}a lower sequence_len, or a number of tokens to try it all the same"
        ) from None


def choose_recompute(config: RunConfig, architecture: Architecture, device: Device) -> str | tuple[str, ...]:
    """Return the policy of every layer (one word where all are the same) that fits the device's memory and costs least time.

    The config's layers and budget are settled. Where nothing fits, every layer of that stage is `full`.
    """
    policies: list[str] = []
    for stage, memory in enumerate(memory_of(dataclasses.replace(config, recompute="none"), architecture, device)):

        def fits(chosen: tuple[str, ...], stage: int = stage, memory: StageMemory = memory) -> bool:
            asked = dataclasses.replace(memory, policies=chosen)
            return peak_bytes(asked, stage, config.parallel.pipeline, int(config.microbatch_tokens)) <= usable_bytes(device)

        count = len(memory.policies)
        policies += cheapest_policies(count, fits) or ("full",) * count
    return policies[0] if len(set(policies)) == 1 else tuple(policies)


def even_out(config: RunConfig, architecture: Architecture, device: Device, slowest: Callable[[RunConfig], float]) -> RunConfig:
    """Move layers away from the slowest stage, policies chosen anew, as long as that makes the slowest faster (or lets more fit).

    `slowest` gives the seconds of a usual microbatch on the slowest stage of a settled config.
    """

    def value(asked: RunConfig) -> tuple[float, float]:
        over = max(peak - usable_bytes(device) for peak in predicted_peaks(asked, architecture, device))
        return max(0.0, over), slowest(asked)

    def moved(donor: int, taker: int) -> RunConfig:
        counts = list(config.parallel.layers_per_stage or ())
        counts[donor], counts[taker] = counts[donor] - 1, counts[taker] + 1
        asked = _with_layers(config, tuple(counts))
        return dataclasses.replace(asked, recompute=choose_recompute(asked, architecture, device))

    stages = range(config.parallel.pipeline)
    while True:
        counts = config.parallel.layers_per_stage or ()
        moves = [moved(donor, taker) for donor in stages for taker in stages if donor != taker and counts[donor] > 1]
        best = min(moves, key=value, default=config)
        if value(best) >= value(config):
            return config
        config = best


def _with_layers(config: RunConfig, layers: tuple[int, ...]) -> RunConfig:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, layers_per_stage=layers))


def _slowest(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> float:
    """Return the seconds of a usual microbatch on the slowest stage of the reference device."""
    return max(stage.seconds(USUAL_TOKENS) for stage in cost_of(config, architecture, reference_of(device), target_share).stages)


def predicted_peaks(config: RunConfig, architecture: Architecture, device: Device) -> list[float]:
    """Return the bytes of each stage at its worst moment with full slots, as torch.cuda.max_memory_allocated counts; all is settled."""
    stages = memory_of(config, architecture, device)
    return [peak_bytes(memory, stage, len(stages), int(config.microbatch_tokens)) for stage, memory in enumerate(stages)]


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the numbers of a model that decide its cost."""
    return ModelShape(**{field.name: getattr(architecture, field.name) for field in dataclasses.fields(ModelShape)})


def cost_of(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> CostModel:
    """Return the seconds of each stage on a device, by its table figures; the config's layers are settled."""
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel)]
    share = _head_share(config, architecture, device, target_share)
    return analytic_cost(shape_of(architecture), device, layers, config.parallel.tensor, config.recompute, share)


def planner_cost(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> SlotCost:
    """Return what the planner weighs slots with, by the reference device's figures; the config's layers are settled."""
    mean_rank, reference = sum(job.r for job in config.jobs) / len(config.jobs), reference_of(device)
    model = cost_of(config, architecture, reference, target_share)
    most_layers = max(len(stage) for stage in layers_of_stages(architecture.num_layers, config.parallel))
    per_segment = 2 * reference.segment_s * most_layers / max(model.token_seconds(mean_rank), 1e-30)
    per_segment = min(per_segment, MOST_OF_A_SEGMENT * USUAL_TOKENS)
    return model.slot_cost(mean_rank, per_segment, linear_tiles(shape_of(architecture), reference, config.parallel.tensor))


def _head_share(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> float:
    """Return the rows of the head per token of a full microbatch."""
    chunk_rows = loss_chunk_rows(-(-architecture.vocab_size // config.parallel.tensor), _item(config, device))
    return head_share(target_share, _tokens(config), chunk_rows)


def _tokens(config: RunConfig) -> int:
    """Return the tokens of a full microbatch, of a usual one where `auto` is not settled."""
    return USUAL_TOKENS if config.microbatch_tokens == "auto" else int(config.microbatch_tokens)


def _item(config: RunConfig, device: Device) -> int:
    """Return the bytes of a number of the compute dtype."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.name != "cpu")
    return 2 if bf16 else 4


def memory_of(config: RunConfig, architecture: Architecture, device: Device) -> tuple[StageMemory, ...]:
    """Return the memory model of each stage, on one tensor rank; the config's layers and recomputation are settled."""
    assert config.recompute != "auto", "recompute is not settled"
    parallel, shape = config.parallel, shape_of(architecture)
    layers = [len(stage) for stage in layers_of_stages(architecture.num_layers, parallel)]
    item = _item(config, device)
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


def describe(before: RunConfig, after: RunConfig, target_share: float = 1.0) -> Sequence[str]:
    """Say in lines what was settled that the config left open."""
    lines = []
    if before.microbatch_tokens == "auto":
        lines.append(f"microbatch_tokens: auto is {after.microbatch_tokens}")
    if before.parallel.layers_per_stage is None and after.parallel.pipeline > 1:
        because = f", as {target_share:.0%} of the tokens are targets" if target_share < 1 else ""
        lines.append(f"parallel.layers_per_stage: null is {list(after.parallel.layers_per_stage or ())}{because}")
    if before.recompute == "auto":
        lines.append(f"recompute: auto is {_policies_in_words(after)}")
    return lines


def _policies_in_words(config: RunConfig) -> str:
    """Write one word where all layers have the same policy, else each stage's counts from its first layer on."""
    if isinstance(config.recompute, str):
        return config.recompute
    policies = stage_policies(config.parallel.layers_per_stage or (len(config.recompute),), config.recompute)
    return " | ".join(", ".join(f"{len(list(run))} {policy}" for policy, run in groupby(stage)) for stage in policies)


def memory_line(before: RunConfig, after: RunConfig, architecture: Architecture, device: Device) -> Sequence[str]:
    """Say what `recompute: auto` predicts each stage to take, and warn where that is too much."""
    if before.recompute != "auto":
        return []
    peaks = predicted_peaks(after, architecture, device)
    line = f"predicted peak memory: {' | '.join(map(size, peaks))} of {size(device.memory_bytes)}, {RESERVED:.0%} of it to spare"
    return [line + ("; TOO MUCH: lower microbatch_tokens" if max(peaks) > usable_bytes(device) else "")]
