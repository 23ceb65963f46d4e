"""What a config leaves to us, resolved by the cost and memory models: `layers_per_stage: null`, `microbatch_tokens` and `recompute: auto`.

    config = resolve(config, architecture, lengths, this_device(ranks_here), target_share)     # all are numbers and policies now

`plan` and the trainer both ask here, and tell which share of the tokens are targets (data.target_share), the rows that the head computes;
where there are lengths alone it is 1. Times are those of a reference device, so that splits and plans do not hang on which GPU is there;
`auto` follows from the memory of the device it is asked for. Recomputation costs as little time as fits: first the layers that only make
norms and SwiGLU again, then as few as can be that run twice. Where it makes a stage slow, and the split is ours, layers move elsewhere.
A key that the config gives stays as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.planning.devices import reference_of, size
from megatron_lora.planning.predict import USUAL_TOKENS, _head_share, _tokens, cost_of, memory_of, planner_cost, predicted_peaks, shape_of
from scheduling.cost import Device, head_layers, split_layers, stage_policies
from scheduling.data_parallel import deal
from scheduling.memory import (
    RESERVED,
    StageMemory,
    cheapest_policies,
    choose_capacity,
    fitting_tokens,
    peak_bytes,
    usable_bytes,
)
from scheduling.types import Lengths


def resolve(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device, target_share: float = 1.0) -> RunConfig:
    """Return the config with every choice made, for samples of `lengths` [job][step][sample] on such devices.

    Raises UserError where `auto` finds no room for the longest sample.
    """
    resolved = _with_layers(config, choose_layers(config, architecture, device, target_share))
    if config.microbatch_tokens == "auto":
        resolved = dataclasses.replace(resolved, microbatch_tokens=choose_budget(resolved, architecture, lengths, device, target_share))
    if config.recompute == "auto":
        resolved = dataclasses.replace(resolved, recompute=choose_recompute(resolved, architecture, device))
        if config.parallel.layers_per_stage is None:
            resolved = even_out(resolved, architecture, device, lambda asked: _slowest(asked, architecture, device, target_share))
    return resolved


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

    The config's layers and budget are resolved. Where nothing fits, every layer of that stage is `full`.
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

    `slowest` gives the seconds of a usual microbatch on the slowest stage of a resolved config.
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


def describe(before: RunConfig, after: RunConfig, target_share: float = 1.0) -> Sequence[str]:
    """Say in lines what was resolved that the config left open."""
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
