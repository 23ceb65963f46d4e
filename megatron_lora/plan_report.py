"""What `megatron-lora plan` says: how the jobs of a config would share the pipeline, before anything is trained.

For the run and for each job trained alone: slots, how full they are, no-ops, and the bubble, the share of the stages' time that is
idle. A job *gains* by being co-trained when adding it to the others takes less time than training it alone.
"""

import dataclasses
from collections.abc import Sequence

from megatron_lora.checks import read_inputs
from megatron_lora.config import RunConfig, load_config
from megatron_lora.order import job_steps
from megatron_lora.plan_plot import check_plot_path, draw
from scheduling.planner import plan_stream
from scheduling.simulate import simulate
from scheduling.slot_cost import SlotCost, slot_times
from scheduling.timing import makespan
from scheduling.types import Lengths, Stream

WORTH = 0.02  # a gain below this share of the time is called nothing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A stream in numbers; `time` is the makespan in units of one token's forward on one stage."""

    tokens: int
    slots: int
    noops: int
    fill: float
    time: float
    bubble: float


def main(config_path: str, overrides: list[str], plot: str | None = None) -> int:
    """Print the plan of a config, and draw it into the file `plot`; returns 0."""
    config = load_config(config_path, overrides)
    if plot is not None:
        check_plot_path(plot)
    workload = lengths_of_jobs(config, read_inputs(config).data)
    stream = plan(config, workload)
    together = figures_of(config, stream, workload)
    alone = [figures_of(config, plan(config, [steps]), [steps]) for steps in workload]
    gains = [gain(config, workload, job, together.time, alone[job].time) for job in range(len(workload))]
    print("\n".join(report(config, workload, together, alone, gains)))
    if plot is not None:
        times = slot_times(stream, workload, SlotCost())
        draw(plot, simulate(stream, config.parallel.pipeline, times, delay=delay_of(config)), stream, [job.name for job in config.jobs])
    return 0


def lengths_of_jobs(config: RunConfig, data: Sequence) -> list[list[list[int]]]:
    """Tokens of every sample of every step: [job][step][sample]."""
    workload = []
    for job, job_data in zip(config.jobs, data, strict=True):
        lengths = job_data.lengths
        steps = job_steps(len(lengths), job.global_batch_size, job.num_epochs, job.max_steps, job.shuffle, job.seed)
        workload.append([[lengths[index] for _, index in step] for step in steps])
    return workload


def plan(config: RunConfig, workload: Lengths) -> Stream:
    """Plan a workload as training does."""
    return plan_stream(workload, config.parallel.pipeline, config.microbatch_tokens, delay_of(config))


def delay_of(config: RunConfig) -> int:
    """Slots by which a verdict is later where a norm is summed over other ranks of the stage."""
    return int(config.parallel.tensor * config.parallel.data > 1)


def figures_of(config: RunConfig, stream: Stream, workload: Lengths) -> Figures:
    """Measure a stream of a config's run."""
    return measure(stream, workload, config.parallel.pipeline, config.microbatch_tokens)


def measure(stream: Stream, workload: Lengths, num_stages: int, budget: int) -> Figures:
    """Count a stream and time it under 1F1B on even stages."""
    costs = slot_times(stream, workload, SlotCost())
    time = makespan(costs, num_stages)
    tokens, slots = sum(microbatch.num_tokens for microbatch in stream), len(stream)
    return Figures(
        tokens=tokens,
        slots=slots,
        noops=sum(microbatch.is_noop for microbatch in stream),
        fill=tokens / (slots * budget) if slots else 0.0,
        time=time,
        bubble=1 - 2 * sum(costs) / time if time else 0.0,
    )


def gain(config: RunConfig, workload: Lengths, job: int, together: float, alone: float) -> float:
    """Share of a job's time alone that co-training saves: 1 - (time with it - time without it) / time alone."""
    others = [steps for other, steps in enumerate(workload) if other != job]
    if not others:
        return 0.0
    without = figures_of(config, plan(config, others), others).time
    return 1 - (together - without) / alone


def report(config: RunConfig, workload: Lengths, together: Figures, alone: Sequence[Figures], gains: Sequence[float]) -> list[str]:
    """Lay the figures out as lines: a table, then what it means in plain words."""
    width = max(len("together"), *(len(job.name) for job in config.jobs))
    lines = [f"{'':{width}}  {'steps':>6} {'tokens':>10} {'slots':>7} {'fill':>6} {'no-ops':>7} {'bubble':>7} {'gain':>6}"]

    def row(name: str, steps: int, figures: Figures, gained: str) -> str:
        f = figures
        return f"{name:{width}}  {steps:>6} {f.tokens:>10,} {f.slots:>7} {f.fill:>6.0%} {f.noops:>7} {f.bubble:>7.1%} {gained:>6}"

    for job, steps, figures, gained in zip(config.jobs, workload, alone, gains, strict=True):
        lines.append(row(job.name, len(steps), figures, f"{gained:.0%}" if len(config.jobs) > 1 else ""))
    after_each_other = sum(figures.time for figures in alone)
    saved = 1 - together.time / after_each_other
    lines.append(row("together", sum(map(len, workload)), together, f"{saved:.0%}" if len(config.jobs) > 1 else ""))
    stages = config.parallel.pipeline
    lines.append("")
    lines.append(
        f"{stages} {'stage' if stages == 1 else 'stages'}, {config.microbatch_tokens} tokens per microbatch; a job's line is the job alone."
    )
    lines.append("Times are predicted from tokens, for even stages.")
    return [*lines, *advice(config, saved, gains)]


def advice(config: RunConfig, saved: float, gains: Sequence[float]) -> list[str]:
    """Say in words whether co-training pays."""
    if len(config.jobs) == 1:
        return ["One job: there is nothing to co-train it with."]
    if saved < WORTH:
        return ["Co-training gains nothing here: one after another the jobs would take the same time."]
    lines = [f"Together the jobs take {saved:.0%} less time than one after another."]
    idle = [job.name for job, gained in zip(config.jobs, gains, strict=True) if gained < WORTH]
    if idle:
        lines.append(f"Does not gain by being co-trained: {', '.join(idle)}.")
    return lines
