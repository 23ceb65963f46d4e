"""What a run of end_to_end.py would show, by a table that profile_layers.py has measured on one GPU.

    found = predict(options, case, table, device, link)

Layers and recomputation are resolved as a run on that device resolves them, samples are planned as it plans them, and the simulator replays
the plan: a stage costs what the table says of its layers and head. What no single GPU can show is assumed:

* messages between stages and collectives move their bytes at `Link.bytes_per_s` after `Link.latency_s`. Between stages they pass while
  both compute, and are waited for where the receiver is idle
* tensor ranks exchange a layer's rows 4 times forward and 4 times backward, and 4 times more where a layer runs again; nothing computes
  meanwhile. The table is of layers as narrow as one of their ranks'. What embedding and loss exchange, once a microbatch, is left out
* a step's Adam takes STEP_S; the sums of gradients over replicas or tensor ranks follow it, overlapped with nothing
* replicas wait for the slower one in every slot, nobody waits for plans, and all GPUs are as fast as the table's

Memory is scheduling.memory's, which knows fused adapters alone: with unfused ones a run needs more than `peaks`.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace

from e2e_options import Case, parallel_of
from e2e_run import joined, plan_settings
from layer_table import stages_of
from model_shapes import architecture_of
from synthetic_jobs import read_workload, take

from megatron_lora.commands.plan import runs_of
from megatron_lora.config.schema import RunConfig
from megatron_lora.planning.forecast import Forecast, Workload, forecast
from megatron_lora.planning.predict import USUAL_TOKENS, cost_of, memory_of, planner_cost, shape_of
from megatron_lora.planning.resolve import even_out, resolve
from scheduling.cost import CostModel, Device, ModelShape, PassCost, StageCost, stage_policies
from scheduling.memory import usable_bytes
from scheduling.types import Lengths

STEP_S = 2e-3  # 1.2 to 1.8 ms in the runs of end_to_end.jsonl
COLLECTIVES = 4  # of a layer's rows, each way
ITEM, GRADIENT = 2, 4  # bytes of an activation, of an adapter's gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How two GPUs are connected, in each direction."""

    bytes_per_s: float
    latency_s: float

    def seconds(self, num_bytes: float) -> float:
        """Return the time of a message."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A run as it is predicted: `communication` is the share of the makespan that it adds, `peaks` are bytes per stage."""

    config: RunConfig
    forecast: Forecast
    communication: float
    peaks: tuple[float, ...]
    fits: bool

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second, fill, drain and optimizer steps included."""
        return self.forecast.figures.tokens / self.forecast.figures.seconds


def predict(
    options: Namespace,
    case: Case,
    table: dict,
    device: Device,
    link: Link,
    *,
    by_figures: bool = False,
    split: bool = False,
) -> Prediction:
    """Predict a case on such devices, over its steps, or as many as fill its time; `by_figures`: baselines planned by table figures.

    `split`: what a run leaves open, layers of stages and recomputation, is moved to where the table says that the slowest stage is fastest.
    """
    architecture = architecture_of(options.shape, options.num_layers)
    shape, available = shape_of(architecture), read_workload(options.lengths, case.workload)
    share = case.jobs.completion
    config = resolve(case.config(options.shape, parallel_of(options)), architecture, available, device, share)
    if split and case.recompute == "auto" and options.layers is None:
        config = even_out(config, architecture, device, lambda asked: _slowest(asked, table))
    parallel, weights = config.parallel, planner_cost(config, architecture, device, share)
    cost = stages_of(table, parallel.layers_per_stage or (), config.recompute)
    lengths = take(available, case.jobs.count, case.steps or _steps(config, available, cost, case.warm_seconds))
    silent = Workload.of(config, lengths, cost, weights)
    workload = replace(silent, cost=with_collectives(cost, config, shape, link))
    if case.policy == "ours":
        runs = runs_of("ours", workload)
    else:
        known = cost_of(config, architecture, device, share) if by_figures else workload.cost
        real = known.slot_cost(sum(workload.ranks) / len(workload.ranks))
        runs = (joined(case.policy, lengths, plan_settings(config, weights), real),)
    rows = config.microbatch_tokens / (parallel.tensor if parallel.sequence else 1)
    hop_s = link.seconds(rows * shape.hidden_size * ITEM) if parallel.pipeline > 1 else 0.0
    found = forecast(runs, workload, hop_s, STEP_S + _sums(config, shape, link))
    alone = forecast(runs, silent, 0.0, STEP_S)
    stages = memory_of(config, architecture, device)
    peaks = tuple(memory.total(found.tokens_in_flight(stage), found.largest_slot) for stage, memory in enumerate(stages))
    return Prediction(
        config=config,
        forecast=found,
        communication=1 - alone.figures.seconds / found.figures.seconds,
        peaks=peaks,
        fits=max(peaks) <= usable_bytes(device),
    )


def with_collectives(cost: CostModel, config: RunConfig, shape: ModelShape, link: Link) -> CostModel:
    """Add what tensor ranks exchange to the cost of each stage."""
    ranks = config.parallel.tensor
    if ranks == 1:
        return cost
    per_token = shape.hidden_size * ITEM * (ranks - 1) / ranks / link.bytes_per_s

    def added(cost: PassCost, count: int) -> PassCost:
        return replace(cost, per_token=cost.per_token + count * per_token, fixed=cost.fixed + count * link.latency_s)

    stages = []
    for stage, policies in zip(cost.stages, stage_policies(config.parallel.layers_per_stage or (), config.recompute), strict=True):
        once, again = COLLECTIVES * len(policies), COLLECTIVES * policies.count("full")
        stages.append(StageCost(added(stage.forward, once), added(stage.backward, once + again)))
    return CostModel(tuple(stages))


def _slowest(config: RunConfig, table: dict) -> float:
    """Return the seconds of a usual microbatch, of samples of a quarter of it, on the slowest stage."""
    rank_tokens = USUAL_TOKENS * sum(job.r for job in config.jobs) / len(config.jobs)
    stages = stages_of(table, config.parallel.layers_per_stage or (), config.recompute).stages
    return max(stage.seconds(USUAL_TOKENS, USUAL_TOKENS**2 / 4, rank_tokens) for stage in stages)


def _sums(config: RunConfig, shape: ModelShape, link: Link) -> float:
    """Return the seconds in which a job's gradients are summed over replicas and tensor ranks (of which half would do)."""
    parallel, rank = config.parallel, max(job.r for job in config.jobs)
    num_bytes = GRADIENT * shape.lora_width * rank * max(parallel.layers_per_stage or (0,)) / parallel.tensor
    return sum(link.seconds(num_bytes * 2 * (n - 1) / n) for n in (parallel.tensor, parallel.data) if n > 1)


def _steps(config: RunConfig, available: Lengths, cost: CostModel, seconds: float) -> int:
    """Return how many steps of every job fill the time, or somewhat more: of a pipeline that never waits."""
    jobs = len(config.jobs)
    per_step = sum(sum(batch) for steps in take(available, jobs, len(available[0])) for batch in steps) / len(available[0])
    token_s = cost.token_seconds(sum(job.r for job in config.jobs) / jobs) / config.parallel.data
    return math.ceil(seconds / (per_step * token_s))
