"""One case of end_to_end.py: adapters on the shared base, a warm-up, perhaps calibration, the timed run."""

import dataclasses
import gc
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from e2e_base import Base
from e2e_figures import Usage, memory, prediction, rates
from e2e_options import Case
from e2e_run import NoOptimizer, Outcome, execute, joined, plan_settings
from gauges import gauged
from kernel_shares import Marked, Profiled
from pass_times import features, measure_stage, probe_slots
from plain_lora import use_adapters
from synthetic_jobs import head, make_jobs, take

from megatron_lora.commands.plan import runs_of
from megatron_lora.config.schema import RunConfig
from megatron_lora.data.collate import collate
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.output.timeline import write_timeline
from megatron_lora.planning.forecast import Workload
from megatron_lora.planning.predict import cost_of, planner_cost
from megatron_lora.training.assemble import make_arena
from megatron_lora.training.jobs import TrainingJob
from megatron_lora.training.optimizer import JobOptimizer
from scheduling.cost import CostModel, Measurement, refine
from scheduling.memory import tokens_in_flight
from scheduling.slot_cost import SlotCost
from scheduling.types import Lengths, Microbatch, Stream

WARM_SLOTS, PROFILED_SLOTS, PROBED_SLOTS = 8, 4, 8
WARM_AGAIN = {"times": 1, "slots": 3}  # in later rounds of a launch
CALIBRATIONS = 2  # the second over the microbatches that the first one's figures make
PROBED_STEPS = 4  # of each job, from which the probed slots are taken
SPARE = 1.1  # more steps than the warm-up's speed asks for


class CaseRun:
    """A case on a base: `prepare` puts its adapters there, `measure` runs it, `close` takes the adapters away."""

    def __init__(self, base: Base, case: Case, config: RunConfig, workload: Lengths, cost: CostModel | None):
        """`config` is resolved; `cost` predicts in place of the device's table figures."""
        self.base, self.case, self.config, self.workload = base, case, config, workload
        self.architecture = base.architecture
        self.cost = cost or cost_of(config, base.architecture, base.model, case.jobs.completion)
        self.cost_from = "file" if cost else "table figures"
        self.weights = planner_cost(config, base.architecture, base.model, case.jobs.completion)
        self.settings = plan_settings(config, self.weights)
        self.ranks = tuple(job.r for job in config.jobs)
        self.arena: Arena | None = None
        self.calibration_gauges: dict[str, list[float]] = {}

    def prepare(self) -> None:
        """Put the case's adapters on the base."""
        self.base.build(self.config)
        stage = self.base.stage
        stage.set_recompute(self.config.recompute)
        use_adapters(stage, self.case.adapters)
        if self.case.adapters != "none":
            jobs = self._jobs(take(self.workload, self.case.jobs.count, 1))
            self.arena = make_arena(stage, self.base.parallel, [job.adapter() for job in jobs])
            for slot, job in enumerate(jobs):
                self.arena.initialise(slot, job.step_samples.seed)

    def close(self) -> None:
        """Let go of the case's adapters."""
        if self.arena is not None:
            use_adapters(self.base.stage, "none")
        self.arena = None
        gc.collect()
        if self.base.cuda:
            torch.cuda.empty_cache()

    def _jobs(self, lengths: Lengths) -> tuple[TrainingJob, ...]:
        return make_jobs(lengths, self.config.jobs, self.architecture.vocab_size, self.case.jobs.completion)

    def _optimizers(self, jobs: Sequence[TrainingJob], learning_rate: float | None = None) -> list:
        if self.arena is None:
            return [NoOptimizer(self.base.device, self.base.groups.data) for _ in jobs]
        settings = [job.optimizer() for job in jobs]
        if learning_rate is not None:
            settings = [dataclasses.replace(each, learning_rate=learning_rate) for each in settings]
        return [JobOptimizer(self.arena, slot, each, self.base.groups) for slot, each in enumerate(settings)]

    def _run(self, lengths: Lengths, learning_rate: float | None = None) -> Outcome:
        jobs = self._jobs(lengths)
        return execute(self.base, jobs, self._optimizers(jobs, learning_rate), self.case.policy, self.settings, self._real)

    @property
    def _real(self) -> SlotCost:
        """What baselines weigh slots with: the cost model that also times them, and what it has no terms for as our planner has it."""
        return self.cost.slot_cost(sum(self.ranks) / len(self.ranks), self.weights.per_segment, self.weights.tiles)

    def _some(self, slots: int) -> Lengths:
        """Return lengths for about so many slots, more where the pipeline is deep."""
        slots = max(slots, 3 * self.base.parallel.pipeline) * self.base.parallel.data
        return head(take(self.workload, self.case.jobs.count, 1), slots * self.settings.capacity)

    def profile(self) -> dict[str, list[dict[str, float]]]:
        """Return every rank's shares of kernels by kind over some slots, and the seconds of the longest by name."""
        jobs, profiled = self._jobs(self._some(PROFILED_SLOTS)), Profiled()
        optimizers = [Marked(optimizer) for optimizer in self._optimizers(jobs)]
        execute(self.base, jobs, optimizers, self.case.policy, self.settings, self._real, profiled)
        return {"profile": self.base.gather(profiled.shares), "profile_kernels": self.base.gather(profiled.kernels)}

    def warm_up(self, times: int = 2, slots: int = WARM_SLOTS) -> float:
        """Run some slots a few times at a learning rate of 0, which moves no weight; return the real tokens per second of the last."""
        lengths = self._some(slots)
        tokens = sum(map(sum, (steps[0] for steps in lengths)))
        for _ in range(times):
            outcome = self._run(lengths, learning_rate=0.0)
            self.base.say(f"  warm-up: {tokens:,} tokens in {outcome.seconds:.1f} s")
        self._clear()
        filling = self.settings.num_stages - 1 if self.case.policy != "flush" else 0  # which a long run does not repeat
        return tokens / outcome.seconds * (len(outcome.stream) + filling) / len(outcome.stream)

    def _clear(self) -> None:
        """Forget what a warm-up or a calibration left in the optimizers' buffers."""
        if self.arena is not None:
            for buffer in (self.arena.grad, self.arena.exp_avg, self.arena.exp_avg_sq):
                buffer.zero_()

    def calibrate(self, broadly: bool = False) -> None:
        """Fit the cost model to passes that each stage makes by itself, over microbatches as the policy makes them of the first steps.

        How full they are, and how many jobs share one, differs from policy to policy, and what a segment more costs is no term of the
        model. A baseline sizes its microbatches by the model, so that those of the fitted one may be of sizes that were not timed: then
        they are timed too. `broadly`: over microbatches of all sizes and mixes too, for a model that serves other runs.
        """
        lengths, analytic, start = take(self.workload, self.case.jobs.count, PROBED_STEPS), self.cost, time.perf_counter()
        broad = probe_slots(lengths, self.settings.capacity) if broadly else ()
        timed: set[Microbatch] = set()
        measured: list[Measurement] = []
        with gauged(self.base.cuda and self.base.rank == 0) as self.calibration_gauges:
            for _ in range(CALIBRATIONS):
                own = sorted((slot for slot in dict.fromkeys(self._planned(lengths)) if slot.num_tokens), key=lambda slot: slot.num_tokens)
                new = [slot for slot in dict.fromkeys((*broad, *spread(own, PROBED_SLOTS))) if slot not in timed]
                timed.update(new)
                measured += self._timed(new, lengths)
                self.cost, self.cost_from = refine(analytic, measured), "calibration"
        self._clear()
        self.base.say(f"  calibrated in {time.perf_counter() - start:.1f} s")

    def _timed(self, slots: Sequence[Microbatch], lengths: Lengths) -> list[Measurement]:
        """Return the seconds of every stage's passes over slots, which make up the same lengths."""
        parallel, rows = self.base.parallel, [job.step_samples for job in self._jobs(lengths)]
        multiple = parallel.tensor if parallel.sequence else 1
        measured = measure_stage(
            self.base.stage,
            self.base.position.stage,
            slots,
            partial(collate, jobs=rows, multiple=multiple, device=self.base.device),
            multiple,
            lambda slot: features(slot, lengths, [r if self.arena is not None else 0 for r in self.ranks]),
        )
        return [each for of_rank in self.base.gather(measured) for each in of_rank]

    def _planned(self, lengths: Lengths) -> Stream:
        """Return the policy's stream for these lengths, this replica's part of it."""
        stream, workload = None, self.workload_of(lengths)
        if self.base.rank == 0 and self.case.policy == "ours":
            (stream,) = runs_of("ours", workload)
        elif self.base.rank == 0:
            stream = joined(self.case.policy, lengths, self.settings, self._real)
        return tuple(workload.dealt.part(microbatch, self.base.replica) for microbatch in self.base.share(stream))

    def timed_lengths(self, tokens_per_s: float) -> Lengths:
        """Return the lengths of the timed run: as many steps as were asked for, or as fill the time."""
        count, whole = self.case.jobs.count, len(self.workload[0])
        per_step = sum(sum(batch) for steps in take(self.workload, count, whole) for batch in steps) / whole
        steps = self.case.steps or max(1, math.ceil(SPARE * self.case.warm_seconds * tokens_per_s / per_step))
        return take(self.workload, count, steps)

    def measure(self, lengths: Lengths, trace: Path | None) -> tuple[dict, Outcome]:
        """Run it; return its figures (on the first rank) and what was executed."""
        if self.base.cuda:
            torch.cuda.reset_peak_memory_stats()
        before = _allocator()
        with gauged(self.base.cuda and self.base.rank == 0) as gauges:
            outcome = self._run(lengths)
        grown = {key: value - before[key] for key, value in _allocator().items()}
        usage = Usage(
            peak=_peak("allocated"),
            reserved=_peak("reserved"),
            in_flight=tokens_in_flight(outcome.own, self.base.position.stage, self.settings.num_stages),
            largest=max(slot.num_tokens for slot in outcome.own),
            **grown,
        )
        usages = self.base.gather(usage)
        if trace is not None and self.base.rank == 0:
            trace.parent.mkdir(parents=True, exist_ok=True)
            write_timeline(trace, [[dict(event) for event in events] for events in outcome.events])
        if self.base.rank > 0:
            return {}, outcome
        figures = rates(self.base, self.settings, lengths, outcome)
        figures["transports"] = self.base.links.transports
        figures["gauges"] = gauges
        figures["memory"] = memory(self.base, self.config, usages, self.case.adapters)
        predicted = prediction(self.base, self.workload_of(lengths), self.settings, outcome)
        figures["prediction"] = predicted | {"cost_from": self.cost_from, "gauges": self.calibration_gauges}
        return figures, outcome

    def workload_of(self, lengths: Lengths) -> Workload:
        """Return lengths as the simulator takes them, by this case's cost model."""
        workload = Workload.of(self.config, lengths, self.cost, self.weights)
        return workload if self.arena is not None else dataclasses.replace(workload, ranks=(0,) * len(self.ranks))


def spread(items: Sequence, count: int) -> list:
    """Return at most so many of the items, the first and the last among them, evenly."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _peak(kind: str) -> int:
    return getattr(torch.cuda, f"max_memory_{kind}")() if torch.cuda.is_available() else 0


def _allocator() -> dict[str, int]:
    """Return how often the allocator had to free its cache, and how often it asked the device for memory."""
    stats = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return {"retries": stats.get("num_alloc_retries", 0), "segments": stats.get("num_device_alloc", 0)}
