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
import os
import statistics
import time
from collections.abc import Callable, Sequence
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
from megatron_lora.model.stage import Stage, build_stage
from megatron_lora.parallel.messages import MessageLayout, connect
from megatron_lora.parallel.process_groups import initialize_parallel, new_group, pipelines, stage_groups
from megatron_lora.planning.calibration import Calibration, calibration_file, subject_of
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.predict import memory_of, planner_cost, shape_of
from megatron_lora.planning.resolve import resolve
from megatron_lora.training.assemble import DTYPES, choose_backends, make_arena
from megatron_lora.training.jobs import Job, Jobs, read_jobs_in_turn
from megatron_lora.training.optimizer import StageGroups
from megatron_lora.training.pass_times import Stopwatch, in_turns, probe_slots, time_parts
from megatron_lora.training.saving import start_job
from megatron_lora.training.warm_up import warm_up
from scheduling.cost import CostModel, Device, Link, MeasuredCosts, Measurement, StageCost, analytic_cost, recomputing, refine
from scheduling.data_parallel import deal
from scheduling.memory import loss_chunk_rows, usable_bytes
from scheduling.types import Lengths, Microbatch
from scheduling.windows import plan_windows

LAYER, HEAD = 0, 1  # the fit's CostModel has a layer and the head in the places of two stages
PLANNED_SLOTS, FEW_SLOTS = 6, 3  # microbatches timed without, and with recomputation
REPEATS, FEW_REPEATS = {"cuda": 3, "cpu": 5}, 2  # the same two
MESSAGES = 10  # of a size
FASTEST_LINK = 1e13  # bytes/s: bounds a link whose large messages took no longer than its small ones
PROBED_STEPS = 4  # of each job, from which the planned slots are taken


def run(config: RunConfig, output: Path | None) -> None:
    """Measure as one of the config's ranks; the first one writes the table to `output` or below the cache directory, and prints it."""
    begin, on_gpu = time.perf_counter(), torch.cuda.is_available()
    config = dataclasses.replace(config, load_weights=False)
    device = initialize_parallel(config.parallel, "nccl" if on_gpu else "gloo", config.seed)
    host_group = new_group(backend="gloo")
    model_dir = resolve_base_model(config.base_model)
    architecture = read_architecture(model_dir)
    jobs = read_jobs_in_turn(config.jobs, model_dir, architecture.vocab_size, host_group)
    share = target_share((job.step_samples.samples, job.step_samples.steps) for job in jobs.values())
    all_lengths = [job.step_samples.lengths() for job in jobs.values()]
    lengths = [steps.cut(min(PROBED_STEPS, len(steps))) for steps in all_lengths]
    chosen: list = [None]
    if dist.get_rank() == 0:
        cost_device = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size)))
        resolved = resolve(config, architecture, all_lengths, cost_device, share)
        chosen = [(cost_device, resolved, *_slots(resolved, architecture, cost_device, lengths, share))]
    dist.broadcast_object_list(chosen, 0, group=host_group)
    cost_device, resolved, planned, probes = chosen[0]
    rank = _Rank(resolved, architecture, cost_device, jobs, lengths, device, host_group)
    table = rank.measure(planned, probes)
    if dist.get_rank() == 0:
        file = output or calibration_file(cache_dir(), table.subject)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, table.to_json())
        print("\n".join([*_summary(table, resolved), f"{file}: written after {time.perf_counter() - begin:.0f} s"]), flush=True)


def _slots(
    config: ResolvedConfig, architecture: Architecture, cost_device: Device, lengths: Lengths, share: float
) -> tuple[list[list[Microbatch]], ...]:
    """Return [replica][slot]: its part of some slots as the run would plan them, and of slots that differ more from each other."""
    cost, parallel = planner_cost(config, architecture, cost_device, share), config.parallel
    dealt, capacity = deal(lengths, parallel.data, cost), config.microbatch_tokens
    window = next(plan_windows(dealt.rounds, parallel.pipeline, capacity, delay=parallel.norm_delay, cost=cost))
    own = sorted((slot for slot in dict.fromkeys(window) if slot.num_tokens), key=lambda slot: slot.num_tokens)
    if len(own) > PLANNED_SLOTS:
        own = [own[i * (len(own) - 1) // (PLANNED_SLOTS - 1)] for i in range(PLANNED_SLOTS)]
    probes = probe_slots(dealt.rounds, capacity)
    return tuple([[dealt.part(slot, k) for slot in slots] for k in range(parallel.data)] for slots in (own, probes))


class _Rank:
    """A stage with its jobs, ready to be timed."""

    def __init__(
        self,
        config: ResolvedConfig,
        architecture: Architecture,
        cost_device: Device,
        jobs: Jobs,
        lengths: Lengths,
        device: torch.device,
        host_group: dist.ProcessGroup,
    ):
        """Build the stage of this rank, with the jobs' adapters; `cost_device` is the planner's model of `device`."""
        parallel = config.parallel
        self.config = config
        self.architecture = architecture
        self.cost_device = cost_device
        self.jobs = jobs
        self.lengths = lengths
        self.device = device
        self.host_group = host_group
        self.dtype = DTYPES[config.precision]
        self.multiple = parallel.row_multiple
        self.replica = parallel.replica_of(dist.get_rank())
        self.stage = self._build()
        arena = make_arena(self.stage, parallel, [job.adapter_spec() for job in jobs.values()])
        groups = StageGroups(**stage_groups(parallel))
        for row, job in enumerate(jobs.values()):
            start_job(job, arena, row, groups)
        if device.type == "cuda":
            warm_up(self.stage, arena, config.microbatch_tokens, self.multiple)

    def _build(self) -> Stage:
        """Build this rank's stage with as many of its layers as fit in memory without recomputation."""
        plain = dataclasses.replace(self.config, recompute="none")
        counts, budget = list(plain.layers_per_stage), plain.microbatch_tokens
        for stage, memory in enumerate(memory_of(plain, self.architecture, self.cost_device)):
            per_layer = memory.layer.kept("none") * budget
            over = memory.total(budget, budget) - usable_bytes(self.cost_device)
            counts[stage] = max(1, counts[stage] - max(0, -int(-over // per_layer)))
        short = dataclasses.replace(
            self.architecture, num_layers=sum(counts), sliding_windows=self.architecture.sliding_windows[: sum(counts)]
        )
        parallel = dataclasses.replace(plain.parallel, layers_per_stage=tuple(counts))
        backends = choose_backends(self.config, short, self.dtype, self.device)
        return build_stage(
            short,
            None,
            parallel,
            dtype=self.dtype,
            device=self.device,
            load_weights=False,
            base_weights=self.config.base_weights,
            backends=backends,
        )

    def measure(self, planned: Sequence[Sequence[Microbatch]], probes: Sequence[Sequence[Microbatch]]) -> Calibration:
        """Return the table, the same on all ranks."""
        own, others = (list(filter(lambda slot: slot.num_tokens, listed[self.replica])) for listed in (planned, probes))
        shape = shape_of(self.architecture)
        body, head = self._time("none", [*own, *others], REPEATS[self.device.type])
        layer_guess, head_guess = analytic_cost(shape, self.cost_device, (1, 0)).stages
        # The fit scales a guess's terms and cannot find one that is 0: the head gets launches, and a backward, which scales a gradient.
        forward = dataclasses.replace(head_guess.forward, fixed=self.cost_device.layer_launch_s)
        head_guess = StageCost(forward, dataclasses.replace(forward, per_token=0.02 * forward.per_token))
        fitted = refine(CostModel((layer_guess, head_guess)), [*body, *head])
        layers = {"none": fitted.stages[LAYER]}
        for policy in ("cheap", "full"):
            measured, _ = self._time(policy, own[-FEW_SLOTS:], FEW_REPEATS)
            layers[policy] = refine(CostModel((recomputing(layers["none"], policy),)), measured).stages[LAYER]
        links = self._links()
        costs = MeasuredCosts(layers=tuple(layers.items()), head=fitted.stages[HEAD], step_s=self._step_s(), hop=links.get("stage"))
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "packages": versions(),
            "memory_bytes": self.cost_device.memory_bytes,
            "fit_error": _fit_error(fitted, body),
        }
        return Calibration(subject=subject_of(self.config, self.architecture, self.cost_device), costs=costs, links=links, about=about)

    def _time(self, policy: str, slots: Sequence[Microbatch], repeats: int) -> tuple[list[Measurement], list[Measurement]]:
        """Return all ranks' times of a layer, and of the head, over microbatches under a policy."""
        self.stage.set_recompute(policy)
        loads = [partial(collate, slot, self.jobs, multiple=self.multiple, device=self.device) for slot in slots]
        works = [partial(time_parts, self.stage, load, self.multiple) for load in loads]
        dist.barrier(group=self.host_group)
        body, head = [], []
        for slot, load, times in zip(slots, loads, in_turns(self.device, works, repeats), strict=True):
            squares = sum(self.lengths[s.job][s.step][sample] ** 2 for s in slot.segments for sample in s.samples)
            ranked = sum(segment.num_tokens * self.jobs[segment.job].config.r for segment in slot.segments)
            head_rows = self._head_rows(load().targets, slot.num_tokens) if "loss" in times else 0
            for backward, layers, top in ((False, "forward", "loss"), (True, "backward", "loss's backward")):
                seconds = times[layers] / len(self.stage.layers)
                body.append(Measurement(LAYER, backward, slot.num_tokens, squares, ranked, seconds))
                if top in times:
                    head.append(Measurement(HEAD, backward, head_rows, 0, 0, times[top]))
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (body, head), group=self.host_group)
        return [m for of_rank, _ in gathered for m in of_rank], [m for _, of_rank in gathered for m in of_rank]

    def _head_rows(self, targets: torch.Tensor | None, tokens: int) -> int:
        """Return the rows that the head multiplies: its targets, in chunks of equal rows, of which the last one is padded."""
        assert targets is not None, "a planned microbatch lists its targets"
        widest = -(-self.architecture.vocab_size // self.config.parallel.tensor)
        height = min(loss_chunk_rows(widest, self.dtype.itemsize), -(-tokens // self.multiple) * self.multiple)
        return -(-len(targets) // height) * height

    def _step_s(self) -> float:
        """Return the seconds of one job's optimizer step, sums over ranks included: the slowest rank's mean over jobs."""

        def step(job: Job, watch: Stopwatch) -> None:
            def work() -> None:
                job.optimizer.start_reduction(torch.zeros((), device=self.device))
                job.optimizer.step(0, job.optimizer.finish_reduction()[0])

            watch.time("step", work)

        works = [partial(step, job) for job in self.jobs.values()]
        own = statistics.fmean(times["step"] for times in in_turns(self.device, works, REPEATS[self.device.type]))
        return _slowest(own, self.host_group)

    def _links(self) -> dict[str, Link]:
        """Time messages of a header alone and of a full microbatch: between stages, and summed over tensor ranks."""
        parallel, rows = self.config.parallel, -(-self.config.microbatch_tokens // self.multiple)
        width = self.architecture.hidden_size
        found = {}
        if parallel.pipeline > 1:
            layout = MessageLayout(max_endings=len(self.jobs), hidden_size=width, dtype=self.dtype)
            found["stage"] = self._link(self._round_trip(layout, 2 * (parallel.pipeline - 1)), rows, width)
        if parallel.tensor > 1:
            group = stage_groups(parallel)["tensor"]

            def summed(num_rows: int) -> float:
                dist.all_reduce(torch.zeros(max(1, num_rows * width), dtype=self.dtype, device=self.device), group=group)
                return 1.0

            found["tensor"] = self._link(summed, rows * self.multiple, width)
        return found

    def _link(self, send: Callable[[int], float], rows: int, width: int) -> Link:
        """Fit a link to `send(rows)`, which sends that number of rows and returns how many links they crossed."""
        seconds = []
        for num_rows in (0, rows):
            taken = []
            for _ in range(MESSAGES + 2):
                dist.barrier(group=self.host_group)
                Stopwatch(self.device).seconds()
                start = time.perf_counter()
                hops = send(num_rows)
                Stopwatch(self.device).seconds()
                taken.append((time.perf_counter() - start) / hops)
            seconds.append(_slowest(statistics.median(taken[2:]), self.host_group))
        num_bytes = rows * width * self.dtype.itemsize
        return Link(latency_s=seconds[0], bytes_per_s=num_bytes / max(seconds[1] - seconds[0], num_bytes / FASTEST_LINK))

    def _round_trip(self, layout: MessageLayout, hops: int) -> Callable[[int], float]:
        """Return what sends a message through all stages and back over a run's links, and returns the `hops` that it took."""
        links, slot = connect(pipelines(self.config.parallel), layout, self.device), 0

        def send(rows: int) -> float:
            nonlocal slot
            for receiver, sender in ((links.forward_in, links.forward_out), (links.backward_in, links.backward_out)):
                if receiver is not None:
                    receiver.post(rows)
                    receiver.take(slot)
                if sender is not None:
                    sender.post(layout.blank(slot, rows, self.device))
            links.drain()
            slot += 1
            return hops

        return send


def _slowest(seconds: float, host_group: dist.ProcessGroup) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host_group)
    return float(found)


def _fit_error(fitted: CostModel, body: Sequence[Measurement]) -> float:
    """Return the mean of |fitted / measured - 1| over the layers' times."""
    layer = fitted.stages[LAYER]
    costs = [(layer.backward if m.backward else layer.forward).seconds(m.tokens, m.squares, m.rank_tokens) / m.seconds for m in body]
    return statistics.fmean(abs(cost - 1) for cost in costs)


def _summary(table: Calibration, config: ResolvedConfig) -> list[str]:
    """Return the lines that say what was measured, for a full microbatch of four equal samples."""
    tokens = config.microbatch_tokens
    usual = tokens, tokens**2 / 4, tokens * statistics.fmean(job.r for job in config.jobs)

    def both_passes(cost: StageCost, *features: float) -> str:
        return f"{cost.forward.seconds(*features) * 1e3:.3f} + {cost.backward.seconds(*features) * 1e3:.3f} ms"

    lines = [f"{table.subject['device']}, a microbatch of {tokens} tokens, forward + backward:"]
    lines += [f"  a layer, recompute {policy}: {both_passes(cost, *usual)}" for policy, cost in table.costs.layers]
    lines.append(f"  the head, every token a target: {both_passes(table.costs.head, tokens, 0)}")
    lines.append(f"  an optimizer step: {table.costs.step_s * 1e3:.3f} ms")
    for name, link in table.links.items():
        what = {"stage": "a message between stages", "tensor": "a sum over tensor ranks"}[name]
        lines.append(f"  {what}: {link.latency_s * 1e6:.0f} us, and {link.bytes_per_s / 1e9:.2f} GB/s")
    return [*lines, f"  the fitted costs are {table.about['fit_error']:.1%} off the times, on average"]
