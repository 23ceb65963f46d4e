"""The figures of a finished run: rate and bubbles, memory beside the memory model, makespan beside the simulator."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from e2e_base import Base
from e2e_run import Outcome
from spans import bubbles, exposed_hops, makespan, pass_seconds

from megatron_lora.config.schema import RunConfig
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.parallel.process_groups import pipelines
from megatron_lora.planning.forecast import Workload, forecast
from megatron_lora.planning.plan_feed import PlanSettings
from megatron_lora.planning.predict import memory_of, shape_of
from scheduling.simulate import simulate
from scheduling.types import Lengths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One rank's memory: peaks in bytes, the most tokens in flight and in a slot, and what the allocator had to ask for meanwhile."""

    peak: int
    reserved: int
    in_flight: int
    largest: int
    retries: int
    segments: int


def flops_per_token(architecture: Architecture) -> int:
    """Return 4 FLOPs for every parameter that computes: all but the embedding; forward and input gradient of a frozen model."""
    shape = shape_of(architecture)
    return 4 * (shape.layer_params * shape.num_layers + shape.head_params)


def mfu(architecture: Architecture, tokens_per_s: float, peak_flops: float) -> float:
    """Return the share of the peak that the rate makes use of."""
    return flops_per_token(architecture) * tokens_per_s / peak_flops


def rates(base: Base, settings: PlanSettings, lengths: Lengths, outcome: Outcome) -> dict:
    """Return real tokens per second, how slots were filled, and what stages waited for."""
    tokens = sum(sum(batch) for steps in lengths for batch in steps)
    idle = bubbles(outcome.events, base.stages, settings.num_stages)
    hops = exposed_hops(outcome.events, pipelines(base.parallel))
    busy = sum(not slot.is_noop for slot in outcome.stream)
    losses = [loss for _, _, loss in outcome.losses]
    return {
        "tokens": tokens,
        "seconds": outcome.seconds,
        "tokens_per_s": tokens / outcome.seconds,
        "ms_per_8192_tokens": 8192e3 * outcome.seconds / tokens,
        "steps": len(lengths[0]),
        "slots": len(outcome.stream),
        "noops": len(outcome.stream) - busy,
        "fill": tokens / (busy * settings.capacity * settings.num_replicas),
        "bubble": statistics.fmean(idle),
        "bubbles": idle,
        "exposed_communication": max(hops.values(), default=0.0),
        "exposed_hops": hops,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": all(map(math.isfinite, [*losses, *outcome.norms])),
    }


def memory(base: Base, config: RunConfig, usages: Sequence[Usage], adapters: str) -> dict:
    """Return every rank's peak beside what the memory model says; it knows of fused adapters, or of none."""
    present = config if adapters != "none" else dataclasses.replace(config, jobs=())
    modelled = memory_of(present, base.architecture, base.model)
    predicted = [modelled[stage].total(usage.in_flight, usage.largest) for stage, usage in zip(base.stages, usages, strict=True)]
    known = adapters in ("fused", "none")
    return {
        "peak_bytes": [usage.peak for usage in usages],
        "reserved_bytes": [usage.reserved for usage in usages],
        "predicted_bytes": predicted if known else None,
        "predicted_over_peak": [p / usage.peak for p, usage in zip(predicted, usages, strict=True) if usage.peak] if known else [],
        "tokens_in_flight": [usage.in_flight for usage in usages],
        "allocator_retries": sum(usage.retries for usage in usages),
        "device_allocations": sum(usage.segments for usage in usages),
    }


def prediction(base: Base, workload: Workload, settings: PlanSettings, outcome: Outcome) -> dict:
    """Return the simulator's makespan, by the workload's cost model beforehand and from the run's own pass times, beside the real one."""
    beforehand = forecast((outcome.stream,), workload).timeline
    num_stages, num_slots = settings.num_stages, len(outcome.stream)
    passes = [pass_seconds(outcome.events, base.stages, num_stages, kind, num_slots) for kind in "FB"]
    steps = [event["dur"] / 1e6 for events in outcome.events for event in events if event["cat"] == "STEP"]
    step_s = statistics.fmean(steps)
    replayed = simulate(outcome.stream, num_stages, *passes, step_s=step_s, delay=settings.delay)
    real = makespan(outcome.events)
    return {
        "predicted_s": beforehand.makespan_s,
        "replayed_s": replayed.makespan_s,
        "real_s": real,
        "predicted_over_real": beforehand.makespan_s / real,
        "replayed_over_real": replayed.makespan_s / real,
        "predicted_bubbles": [beforehand.bubble(stage) for stage in range(num_stages)],
        "step_s": step_s,
    }
