"""One rank's part of `megatron-lora calibrate`: time its stage, optimizers and links, and fit a cost table.

All ranks measure at the same time, as they compute in a run. A stage has random weights and as many
of its layers as fit without recomputation. Its microbatches are some that the run would plan, and
some that differ more from each other, so that the fit can separate the terms of the cost model.
Layers are timed under every recomputation policy: under `none` over all microbatches, under the
others over a few, since what those add is known to be about a forward.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import RunConfig
from megatron_lora.data.collate import collate
from megatron_lora.data.sample_arrays import target_share
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.environment import commit, versions
from megatron_lora.files import write_atomically
from megatron_lora.huggingface.architecture import Architecture, read_architecture
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.model.stage import Stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import NUM_SUMS, MessageLayout, connect
from megatron_lora.parallel.process_groups import from_first_rank, initialize_parallel, new_group, pipelines
from megatron_lora.planning.calibration import Calibration, calibration_file, subject_of
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.predict import memory_of, planner_cost, shape_of
from megatron_lora.planning.resolve import resolve
from megatron_lora.planning.targets import targeted
from megatron_lora.training.assemble import make_resident
from megatron_lora.training.jobs import Job, Jobs, read_jobs_in_turn
from megatron_lora.training.pass_times import in_turns, probe_slots, time_parts
from megatron_lora.training.warm_up import warm_up
from scheduling.cost import (
    Device,
    Link,
    MeasuredCosts,
    Measurement,
    StageCost,
    analytic_cost,
    pass_features,
    recomputing,
    refine,
)
from scheduling.data_parallel import deal
from scheduling.memory import loss_chunk_rows, usable_bytes
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch
from scheduling.windows import WindowPlanner

BUDGET_S = 60.0  # for all of it: where that is too little, fewer microbatches are timed, then fewer turns of these
MESSAGES = 10  # of a size
FASTEST_LINK = 1e13  # bytes/s: bounds a link whose large messages took no longer than its small ones
PROBED_STEPS = 4  # of each job, from which the planned slots are taken
Slots = Sequence[Sequence[Microbatch]]  # [slot][replica] -> its part


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How many microbatches are timed under a policy, and in how many turns, within a share of the time that remains before it."""

    share: float
    most_slots: int
    fewest_slots: int
    most_turns: int
    fewest_turns: int = 2

    def within(self, num_slots: int, slot_s: float, remaining_s: float) -> tuple[int, int]:
        """Return how many of the slots are timed, the fullest of which takes `slot_s`, and in how many turns beside an uncounted one."""
        passes = self.share * remaining_s / slot_s
        num_slots = min(num_slots, max(self.fewest_slots, int(passes / (1 + self.most_turns))))
        return num_slots, min(self.most_turns, max(self.fewest_turns, int(passes / num_slots) - 1))


EFFORTS = {"none": Effort(0.6, 12, 6, 5), "cheap": Effort(0.5, 3, 2, 2), "full": Effort(1.0, 3, 2, 2)}


def run(config: RunConfig, output: Path | None) -> None:
    """Measure as one of the config's ranks; the first one writes the table to `output` or below the cache directory, and prints it."""
    begin = time.perf_counter()
    config = dataclasses.replace(config, load_weights=False)
    device = initialize_parallel(config.parallel, seed=config.seed)
    host_group = new_group(backend="gloo")
    model_dir = resolve_base_model(config.base_model)
    architecture = read_architecture(model_dir)
    config = targeted(config, architecture)
    jobs = read_jobs_in_turn(config.jobs, model_dir, architecture.vocab_size, host_group)
    lengths = [job.step_samples.lengths() for job in jobs.values()]

    def choose() -> tuple[Device, ResolvedConfig, tuple[Slots, ...]]:
        share = target_share((job.step_samples.samples, job.step_samples.steps) for job in jobs.values())
        cost_device = this_device(config.parallel.world_size)
        resolved = resolve(config, architecture, lengths, cost_device, share)
        cost = planner_cost(resolved, architecture, cost_device, share)
        return cost_device, resolved, slots_to_time(resolved, cost, [steps.cut(min(PROBED_STEPS, len(steps))) for steps in lengths])

    cost_device, resolved, slots = from_first_rank(choose, host_group)
    short = as_many_layers_as_fit(resolved, architecture, cost_device)
    num_layers = sum(short.layers_per_stage)
    stage, arena = make_resident(short, architecture.cut(num_layers), model_dir, jobs, device)
    if device.type == "cuda":
        warm_up(stage, arena, short.microbatch_tokens, short.parallel.row_multiple)
    table = _Rank(resolved, architecture, cost_device, stage, jobs, lengths, host_group, begin + BUDGET_S).measure(*slots)
    if dist.get_rank() == 0:
        file = output or calibration_file(cache_dir(), table.subject)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, table.to_json())
        print("\n".join([*_summary(table, resolved), f"{file}: written after {time.perf_counter() - begin:.0f} s"]), flush=True)


def slots_to_time(config: ResolvedConfig, cost: SlotCost, lengths: Lengths) -> tuple[Slots, ...]:
    """Return slots as the run would plan them, and probes, which differ more from each other; both with the most telling first."""
    parallel, capacity, most = config.parallel, config.microbatch_tokens, EFFORTS["none"].most_slots // 2
    dealt = deal(lengths, parallel.data, cost)
    window = next(WindowPlanner(parallel.pipeline, capacity, delay=parallel.norm_delay, cost=cost).plan_all(dealt.rounds))
    fullest = sorted((slot for slot in dict.fromkeys(window) if slot.num_tokens), key=lambda slot: -slot.num_tokens)
    if len(fullest) > most:
        fullest = [fullest[i * (len(fullest) - 1) // (most - 1)] for i in range(most)]
    planned, probes = dict.fromkeys([fullest[0], fullest[-1], *fullest]), probe_slots(dealt.rounds, capacity)
    return tuple([[dealt.part(slot, k) for k in range(parallel.data)] for slot in slots] for slots in (planned, probes))


def as_many_layers_as_fit(config: ResolvedConfig, architecture: Architecture, cost_device: Device) -> ResolvedConfig:
    """Return the config without recomputation, each stage with as many of its layers as then fit in memory."""
    plain = dataclasses.replace(config, recompute="none")
    counts, budget = list(plain.layers_per_stage), plain.microbatch_tokens
    for stage, memory in enumerate(memory_of(plain, architecture, cost_device)):
        per_layer = memory.layer.kept("none") * budget
        over = memory.total(budget, budget) - usable_bytes(cost_device)
        counts[stage] = max(1, counts[stage] - max(0, -int(-over // per_layer)))
    return dataclasses.replace(plain, parallel=dataclasses.replace(plain.parallel, layers_per_stage=tuple(counts)))


@dataclasses.dataclass(slots=True)
class _Rank:
    """A stage with its jobs, ready to be timed, and the time of time.perf_counter by which it should be done."""

    config: ResolvedConfig
    architecture: Architecture
    cost_device: Device  # the planner's model of this rank's device
    stage: Stage
    jobs: Jobs
    lengths: Lengths
    host_group: dist.ProcessGroup
    deadline: float

    def measure(self, planned: Slots, probes: Slots) -> Calibration:
        """Return the table, the same on all ranks."""
        hop, step_s = self._hop(), self._step_s()
        every = [slot for pair in itertools.zip_longest(planned, probes) for slot in pair if slot is not None]
        turns = {}
        body, head, turns["none"] = self._time("none", every)
        layer_guess, head_guess = analytic_cost(shape_of(self.architecture), self.cost_device, (1, 0)).stages
        # The fit scales a guess's terms and cannot find one that is 0: the head gets launches, and a backward, which scales a gradient.
        forward = dataclasses.replace(head_guess.forward, fixed=self.cost_device.layer_launch_s)
        head_guess = StageCost(forward, dataclasses.replace(forward, per_token=0.02 * forward.per_token))
        layers = {"none": refine(layer_guess, body)}
        for policy in ("cheap", "full"):
            measured, _, turns[policy] = self._time(policy, planned)
            layers[policy] = refine(recomputing(layers["none"], policy), measured)
        costs = MeasuredCosts(layers=tuple(layers.items()), head=refine(head_guess, head), step_s=step_s, hop=hop)
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "packages": versions(),
            "memory_bytes": self.cost_device.memory_bytes,
            "fit_error": _fit_error(layers["none"], body),
            "turns": turns,
        }
        return Calibration(subject=subject_of(self.config, self.architecture, self.cost_device), costs=costs, about=about)

    def _time(self, policy: str, slots: Slots) -> tuple[list[Measurement], list[Measurement], tuple[int, int]]:
        """Return all ranks' times of a layer, and of the head, under a policy, and how many microbatches were timed in how many turns."""
        self.stage.set_recompute(policy)
        effort, parallel = EFFORTS[policy], self.config.parallel
        parts = [slot[parallel.replica_of(dist.get_rank())] for slot in slots[: effort.most_slots]]
        loads = [partial(collate, part, self.jobs, multiple=parallel.row_multiple, device=self.stage.device) for part in parts]
        works = [partial(time_parts, self.stage, load, parallel.row_multiple) for load in loads]
        works = [work if part.num_tokens else lambda watch: None for part, work in zip(parts, works, strict=True)]
        chosen = 0, 0

        def choose(seconds: float) -> tuple[int, int]:
            nonlocal chosen
            slowest = self._slowest(seconds)
            chosen = from_first_rank(lambda: effort.within(len(parts), slowest, self.deadline - time.perf_counter()), self.host_group)
            return chosen

        dist.barrier(group=self.host_group)
        body, head = [], []
        for part, load, times in zip(parts, loads, in_turns(self.stage.device, works, choose), strict=False):
            samples = ((self.lengths[s.job][s.step][k], self.jobs[s.job].config.lora_rank) for s in part.segments for k in s.samples)
            rows, squares, ranked = pass_features(samples, parallel.row_multiple)
            head_rows = self._head_rows(load().targets, part.num_tokens) if "loss" in times else 0
            for backward, layers, top in ((False, "forward", "loss"), (True, "backward", "loss's backward")):
                if layers in times:
                    body.append(Measurement(backward, rows, squares, ranked, times[layers] / len(self.stage.layers)))
                if top in times:
                    head.append(Measurement(backward, head_rows, 0, 0, times[top]))
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (body, head), group=self.host_group)
        return [m for of_rank, _ in gathered for m in of_rank], [m for _, of_rank in gathered for m in of_rank], chosen

    def _head_rows(self, targets: torch.Tensor | None, tokens: int) -> int:
        """Return the rows that the head multiplies: its targets, in chunks of equal rows, of which the last one is padded."""
        assert targets is not None, "a planned microbatch lists its targets"
        parallel = self.config.parallel
        widest = -(-self.architecture.vocab_size // parallel.tensor)
        height = min(loss_chunk_rows(widest, self.stage.dtype.itemsize), -(-tokens // parallel.row_multiple) * parallel.row_multiple)
        return -(-len(targets) // height) * height

    def _step_s(self) -> float:
        """Return the seconds of one job's optimizer step, sums over ranks included: the slowest rank's mean over jobs."""
        none = torch.zeros(NUM_SUMS, device=self.stage.device)

        def step(job: Job, watch: Timeline) -> None:
            with watch.span("step"):
                job.optimizer.start_reduction(none)
                job.optimizer.step(0, job.optimizer.finish_reduction()[0])

        works = [partial(step, job) for job in self.jobs.values()]
        timed = in_turns(self.stage.device, works, lambda _: (len(works), EFFORTS["none"].most_turns))
        return self._slowest(statistics.fmean(times["step"] for times in timed))

    def _hop(self) -> Link | None:
        """Time messages of a header alone and of a full microbatch, through all stages and back over a run's links; None on one stage."""
        parallel, device, width = self.config.parallel, self.stage.device, self.architecture.hidden_size
        if parallel.pipeline == 1:
            return None
        layout = MessageLayout(max_endings=len(self.jobs), hidden_size=width, dtype=self.stage.dtype)
        links, clock, slot, seconds = connect(pipelines(parallel), layout, device), Timeline(device), 0, []
        full = -(-self.config.microbatch_tokens // parallel.row_multiple)
        for rows in (0, full):
            taken = []
            for _ in range(MESSAGES + 2):
                dist.barrier(group=self.host_group)
                clock.wait()
                start = time.perf_counter()
                for receiver, sender in ((links.forward_in, links.forward_out), (links.backward_in, links.backward_out)):
                    if receiver is not None:
                        receiver.post(slot, rows)
                        receiver.take(slot)
                    if sender is not None:
                        sender.post(layout.blank(slot, rows, device))
                links.drain()
                clock.wait()
                taken.append((time.perf_counter() - start) / (2 * (parallel.pipeline - 1)))
                slot += 1
            seconds.append(self._slowest(statistics.median(taken[2:])))
        num_bytes = full * width * self.stage.dtype.itemsize
        return Link(latency_s=seconds[0], bytes_per_s=num_bytes / max(seconds[1] - seconds[0], num_bytes / FASTEST_LINK))

    def _slowest(self, seconds: float) -> float:
        """Return the most seconds of any rank."""
        found = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(found)


def _fit_error(layer: StageCost, body: Sequence[Measurement]) -> float:
    """Return the mean of |fitted / measured - 1| over a layer's times."""
    costs = [(layer.backward if m.backward else layer.forward).seconds(m.tokens, m.squares, m.rank_tokens) / m.seconds for m in body]
    return statistics.fmean(abs(cost - 1) for cost in costs)


def _summary(table: Calibration, config: ResolvedConfig) -> list[str]:
    """Return the lines that say what was measured, for a full microbatch of four equal samples."""
    tokens = config.microbatch_tokens
    usual = tokens, tokens**2 / 4, tokens * statistics.fmean(job.lora_rank for job in config.jobs)

    def both_passes(cost: StageCost, *features: float) -> str:
        return f"{cost.forward.seconds(*features) * 1e3:.3f} + {cost.backward.seconds(*features) * 1e3:.3f} ms"

    lines = [f"{table.subject['device']}, a microbatch of {tokens} tokens, forward + backward:"]
    lines += [f"  a layer, recompute {policy}: {both_passes(cost, *usual)}" for policy, cost in table.costs.layers]
    lines.append(f"  the head, every token a target: {both_passes(table.costs.head, tokens, 0)}")
    lines.append(f"  an optimizer step: {table.costs.step_s * 1e3:.3f} ms")
    if (hop := table.costs.hop) is not None:
        lines.append(f"  a message between stages: {hop.latency_s * 1e6:.0f} us, and {hop.bytes_per_s / 1e9:.2f} GB/s")
    timed = ", ".join(f"{slots} in {turns} turns under {policy}" for policy, (slots, turns) in table.about["turns"].items())
    return [*lines, f"  the fitted costs are {table.about['fit_error']:.1%} off the times, on average; microbatches timed: {timed}"]
