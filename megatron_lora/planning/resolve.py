"""Resolves what a config leaves open: `precision`, `layers_per_stage`, `activation_offloading`, `microbatch_tokens`, `recompute`,
`adapter_memory`.

    resolved = resolve(config, architecture, lengths, this_device(ranks_here), target_share)     # a ResolvedConfig

`plan` and the trainer both call this. The choices come from the cost model (scheduling.cost) and
the memory model (scheduling.memory), in this order. A key that the config gives stays as it is.

    precision           bf16 on a GPU, fp32 on a CPU
    layers_per_stage    minimises the time of the slowest stage; the last stage also computes the head
    activation_offloading   on a GPU, where not even `full` recomputation makes the run fit
    microbatch_tokens   as many as memory allows, unless larger microbatches no longer save time
    recompute           per stage, the policies that cost the least time among those that fit in memory:
                        first "cheap" layers (norms and SwiGLU run again), then as few "full" layers
                        (the layer runs again) as possible
    layers_per_stage    again, if recomputation makes a stage the slowest: layers move to other stages
    adapter_memory      as large as all jobs need, or as activations leave it (adapter_memory.py)

Times are those of a reference device, the same for every GPU, so that splits and plans are the same
on all GPUs; where the device was calibrated (calibration.py) they are its own. Memory is that of
the actual device. `target_share` is the share of tokens that are targets (data.steps.target_share):
the head is computed for these alone. Callers that know only lengths pass 1.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from itertools import groupby

from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.planning.adapter_memory import GB, adapters_of, as_if_kept_alive, bytes_of, in_gb, most, rows_of
from megatron_lora.planning.devices import reference_of, size
from megatron_lora.planning.predict import (
    USUAL_TOKENS,
    budget_or_usual,
    cost_of,
    head_share_of,
    item_bytes,
    least_residents,
    memory_of,
    planner_cost,
    precision_of,
    predicted_peaks,
    rank_row_bytes_of,
    shape_of,
)
from megatron_lora.planning.targets import jobs_of
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


def resolve(
    given: RunConfig, architecture: Architecture, lengths: Lengths, device: Device, target_share: float = 1.0, keep_alive: bool = False
) -> ResolvedConfig:
    """Return the config with every choice made; `lengths` are those of all samples, in tokens, and `device` is one rank's.

    With `keep_alive`, an adapter_memory that is `auto` has room for jobs that are added later. Raises UserError
    where the longest sample does not fit in memory with `microbatch_tokens: auto`.
    """
    config = as_if_kept_alive(given, architecture.module_sizes) if keep_alive else given
    config = dataclasses.replace(config, precision=precision_of(config, device))
    resolved = _with_layers(config, choose_layers(config, architecture, device, target_share))
    if config.activation_offloading == "auto":
        resolved = dataclasses.replace(resolved, activation_offloading=needs_offloading(resolved, architecture, lengths, device))
    if config.microbatch_tokens == "auto":
        resolved = dataclasses.replace(resolved, microbatch_tokens=choose_budget(resolved, architecture, lengths, device, target_share))
    if config.recompute == "auto":
        resolved = dataclasses.replace(resolved, recompute=choose_recompute(resolved, architecture, device))
        if config.parallel.layers_per_stage is None:
            resolved = even_out(resolved, architecture, device, target_share)
    if config.adapter_memory == "auto":
        resolved = dataclasses.replace(resolved, adapter_memory=choose_adapter_memory(resolved, architecture, device))
    return ResolvedConfig.of(dataclasses.replace(resolved, jobs=given.jobs))


def choose_adapter_memory(config: RunConfig, architecture: Architecture, device: Device) -> float:
    """Return the GB for resident adapters: for all jobs, or for as many of the largest as activations leave memory for.

    All else must be resolved. Where not even the least number of jobs fits, it is that of these.
    """
    adapters, least = adapters_of(jobs_of(config, architecture)), least_residents(config, architecture, device)
    row_bytes = rank_row_bytes_of(config, architecture, item_bytes(config, device))

    def room_for(num: int) -> RunConfig:
        return dataclasses.replace(config, adapter_memory=in_gb(bytes_of(rows_of(adapters, num), row_bytes)))

    def too_many(num: int) -> bool:
        return max(predicted_peaks(room_for(num), architecture, device)) > usable_bytes(device)

    more = bisect.bisect_left(range(least + 1, len(adapters) + 1), True, key=too_many)
    return float(room_for(least + more).adapter_memory)


def choose_layers(config: RunConfig, architecture: Architecture, device: Device, target_share: float = 1.0) -> tuple[int, ...]:
    """Return each stage's number of layers: the config's, or those that minimise the time of the slowest stage, head included.

    Where microbatch_tokens or recompute are still `auto`, the times are those of a usual microbatch
    (predict.USUAL_TOKENS) without recomputation.
    """
    if config.parallel.layers_per_stage is not None:
        return config.parallel.layers_per_stage
    recompute = "none" if config.recompute == "auto" else config.recompute
    share = head_share_of(config, architecture, device, target_share)
    head_in_layers = head_layers(
        shape_of(architecture), reference_of(device), budget_or_usual(config), config.parallel.tensor, recompute, share
    )
    return split_layers(architecture.num_layers, config.parallel.pipeline, head_in_layers)


def needs_offloading(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device) -> bool:
    """Return whether a run fits on a GPU only, if at all, with the inputs of its `full` layers in host memory."""
    if device.name == "cpu" or not config.may_run_again:
        return False
    recompute = "full" if config.recompute == "auto" else config.recompute
    tried = dataclasses.replace(config, recompute=recompute, activation_offloading=False)
    longest = max((tokens for steps in lengths for batch in steps for tokens in batch), default=1)
    tokens = longest if config.microbatch_tokens == "auto" else int(config.microbatch_tokens)
    return fitting_tokens(memory_of(tried, architecture, device), device) < tokens


def choose_budget(config: RunConfig, architecture: Architecture, lengths: Lengths, device: Device, target_share: float = 1.0) -> int:
    """Return the token budget of a microbatch: as much as memory allows, unless a larger one no longer saves time.

    With `recompute: auto`, memory allows what fits when every layer is recomputed. What a larger
    budget saves is then weighed against the recomputation that it needs.
    """
    recompute_is_auto = config.recompute == "auto"
    fastest, smallest = (dataclasses.replace(config, recompute=policy) if recompute_is_auto else config for policy in ("none", "full"))
    cost = planner_cost(fastest, architecture, device, target_share)
    fitting = fitting_tokens(memory_of(smallest, architecture, device), device)

    def slowdown(budget: int) -> float:
        """Return by what factor the recomputation that `budget` tokens need makes the slowest stage slower."""
        without = dataclasses.replace(fastest, microbatch_tokens=budget)
        recomputing = dataclasses.replace(without, recompute=choose_recompute(without, architecture, device))
        seconds, seconds_without = (_slowest_stage_s(one, architecture, device, target_share) for one in (recomputing, without))
        return seconds / seconds_without

    rounds = deal(lengths, config.parallel.data, cost).rounds  # of one sample per replica, which train at the same time
    try:
        return choose_capacity(rounds, config.parallel.pipeline, fitting, cost, slowdown=slowdown if recompute_is_auto else None)
    except ValueError as error:
        remedy = "" if recompute_is_auto else "recompute: auto, "
        raise UserError(
            f"microbatch_tokens: auto: {error} on {device.name} with {device.memory_bytes / 1e9:.1f} GB; use more stages or tensor ranks, "
            f"{remedy}a lower adapter_memory, a lower sequence_len, or a number of tokens to try it all the same"
        ) from None


def choose_recompute(config: RunConfig, architecture: Architecture, device: Device) -> str | tuple[str, ...]:
    """Return each layer's recomputation policy (one word if all are equal): the fastest that fit in the device's memory.

    layers_per_stage and microbatch_tokens must be resolved. On a stage where nothing fits, every
    layer is "full".
    """
    policies: list[str] = []
    for stage, memory in enumerate(memory_of(dataclasses.replace(config, recompute="none"), architecture, device)):

        def fits(chosen: tuple[str, ...], stage: int = stage, memory: StageMemory = memory) -> bool:
            candidate = memory.with_policies(chosen, config.activation_offloading is True)
            return peak_bytes(candidate, stage, config.parallel.pipeline, int(config.microbatch_tokens)) <= usable_bytes(device)

        num_layers = len(memory.policies)
        policies += cheapest_policies(num_layers, fits) or ("full",) * num_layers
    return policies[0] if len(set(policies)) == 1 else tuple(policies)


def even_out(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> RunConfig:
    """Return the config after moving single layers between stages for as long as that improves it.

    Every move chooses the recomputation anew. A config is better if the fullest stage exceeds its
    memory by less, or, at the same excess (mostly none), if its slowest stage is faster.
    """

    def penalty(candidate: RunConfig) -> tuple[float, float]:
        excess = max(peak - usable_bytes(device) for peak in predicted_peaks(candidate, architecture, device))
        return max(0.0, excess), _slowest_stage_s(candidate, architecture, device, target_share)

    def moved(source: int, target: int) -> RunConfig:
        counts = list(config.parallel.layers_per_stage or ())
        counts[source], counts[target] = counts[source] - 1, counts[target] + 1
        candidate = _with_layers(config, tuple(counts))
        return dataclasses.replace(candidate, recompute=choose_recompute(candidate, architecture, device))

    stages = range(config.parallel.pipeline)
    while True:
        counts = config.parallel.layers_per_stage or ()
        candidates = [moved(source, target) for source in stages for target in stages if source != target and counts[source] > 1]
        best = min(candidates, key=penalty, default=config)
        if penalty(best) >= penalty(config):
            return config
        config = best


def _with_layers(config: RunConfig, layers: tuple[int, ...]) -> RunConfig:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, layers_per_stage=layers))


def _slowest_stage_s(config: RunConfig, architecture: Architecture, device: Device, target_share: float) -> float:
    """Return the seconds of a usual microbatch on the slowest stage of the reference device."""
    return max(stage.seconds(USUAL_TOKENS) for stage in cost_of(config, architecture, reference_of(device), target_share).stages)


def describe(before: RunConfig, after: RunConfig, target_share: float = 1.0) -> Sequence[str]:
    """Return one line for each key that the config left open, with the value chosen."""
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
    """Return the policy if all layers have the same, otherwise each stage's as "2 full, 6 none | 8 none", in layer order."""
    if isinstance(config.recompute, str):
        return config.recompute
    policies = stage_policies(config.parallel.layers_per_stage or (len(config.recompute),), config.recompute)
    return " | ".join(", ".join(f"{len(list(run))} {policy}" for policy, run in groupby(stage)) for stage in policies)


def memory_line(before: RunConfig, after: RunConfig, architecture: Architecture, device: Device) -> Sequence[str]:
    """Return a line for each kind of memory that was chosen: that of adapters, each stage's predicted peak, host memory that is taken.

    The peak stands only under `recompute: auto`, with a warning where it is too much.
    """
    lines = [*adapter_memory_line(before, after, architecture, device)]
    if before.recompute == "auto":
        peaks = predicted_peaks(after, architecture, device)
        line = f"predicted peak memory: {' | '.join(map(size, peaks))} of {size(device.memory_bytes)}, {RESERVED:.0%} of it to spare"
        lines.append(line + ("; TOO MUCH: lower microbatch_tokens" if max(peaks) > usable_bytes(device) else ""))
    return [*lines, *host_memory_line(before, after, architecture, device)]


def adapter_memory_line(before: RunConfig, after: RunConfig, architecture: Architecture, device: Device) -> Sequence[str]:
    """Return a line with the memory of resident adapters where it was chosen, or where not all jobs fit at once."""
    adapters, row_bytes = adapters_of(jobs_of(after, architecture)), rank_row_bytes_of(after, architecture, item_bytes(after, device))
    num, gb = most(adapters, row_bytes, float(after.adapter_memory) * GB), float(after.adapter_memory)
    if num < len(adapters):
        fits = f"room for {num} of the {len(adapters)} jobs at once, or for more that are not the largest; the others wait in the queue"
    else:
        fits = "room for all jobs at once"
    if before.adapter_memory == "auto":
        return [f"adapter_memory: auto is {gb:.6g}, {fits}"]
    return [f"adapter_memory: {gb:.6g} has {fits}"] if num < len(adapters) else []


def host_memory_line(before: RunConfig, after: RunConfig, architecture: Architecture, device: Device) -> Sequence[str]:
    """Return a line with the host memory of each stage's ranks where layer inputs wait there, else none."""
    if not after.activation_offloading:
        return []
    stages, tokens = memory_of(after, architecture, device), int(after.microbatch_tokens)
    taken = [memory.on_host_per_token * tokens * (len(stages) - stage) for stage, memory in enumerate(stages)]
    choice = "auto is true" if before.activation_offloading == "auto" else "true"
    return [f"activation_offloading: {choice}; layer inputs take {' | '.join(map(size, taken))} of pinned host memory on each rank"]
