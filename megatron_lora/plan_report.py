"""What `megatron-lora plan` says: how the jobs of a config would share the pipeline, before anything is trained.

For the run and for each job trained alone: slots, how full they are, no-ops, and the bubble, the share of the stages' time that is
idle. A job *gains* by being co-trained when adding it to the others takes less time than training it alone.
"""

import dataclasses
from collections.abc import Sequence

from megatron_lora.checks import read_inputs
from megatron_lora.config import RunConfig, load_config
from megatron_lora.order import job_steps
from scheduling.planner import plan_stream
from scheduling.types import Lengths, Stream

WORTH = 0.02  # a gain below this share of the time is called nothing
SLOT_TOKENS = 128  # what a slot costs however few its tokens: launches and messages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A stream in numbers; `time` is the makespan in units of one token on one stage."""

    tokens: int
    slots: int
    noops: int
    fill: float
    time: float
    bubble: float


def main(config_path: str, overrides: list[str]) -> int:
    """Print the plan of a config; returns 0."""
    config = load_config(config_path, overrides)
    inputs = read_inputs(config)
    workload = lengths_of_jobs(config, inputs.data)
    stages, budget = config.parallel.pipeline, config.microbatch_tokens
    together = measure(plan(config, workload), stages, budget)
    alone = [measure(plan(config, [steps]), stages, budget) for steps in workload]
    gains = [gain(config, workload, job, together.time, alone[job].time) for job in range(len(workload))]
    print("\n".join(report(config, workload, together, alone, gains)))
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
    parallel = config.parallel
    return plan_stream(workload, parallel.pipeline, config.microbatch_tokens, delay=int(parallel.tensor * parallel.data > 1))


def measure(stream: Stream, num_stages: int, budget: int) -> Figures:
    """Count a stream and simulate it on even stages whose forward takes a unit per token, backward two."""
    tokens = [microbatch.num_tokens for microbatch in stream]
    costs = [count + SLOT_TOKENS if count else 0 for count in tokens]
    time = makespan(costs, num_stages)
    busy = 3.0 * sum(costs)
    slots = len(stream)
    return Figures(
        tokens=sum(tokens),
        slots=slots,
        noops=sum(microbatch.is_noop for microbatch in stream),
        fill=sum(tokens) / (slots * budget) if slots else 0.0,
        time=time,
        bubble=1 - busy / time if time else 0.0,
    )


def gain(config: RunConfig, workload: Lengths, job: int, together: float, alone: float) -> float:
    """Share of a job's time alone that co-training saves: 1 - (time with it - time without it) / time alone."""
    others = [steps for other, steps in enumerate(workload) if other != job]
    if not others:
        return 0.0
    without = measure(plan(config, others), config.parallel.pipeline, config.microbatch_tokens).time
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


def makespan(costs: Sequence[int], num_stages: int) -> float:
    """End of the last backward under 1F1B on even stages without communication; slot m takes costs[m] forward, twice that backward.

    Stage s runs num_stages - s - 1 forwards first, then F and B in turn; F(m) waits for stage s - 1's, B(m) for stage s + 1's.
    """
    slots = len(costs)
    forward = [[0.0] * slots for _ in range(num_stages)]
    backward = [[0.0] * slots for _ in range(num_stages)]
    clock, done_f, done_b = [0.0] * num_stages, [0] * num_stages, [0] * num_stages
    while done_b[0] < slots:
        for stage in range(num_stages):
            while done_b[stage] < slots:
                ahead = min(slots, done_b[stage] + num_stages - stage)
                if done_f[stage] < ahead:
                    slot = done_f[stage]
                    if stage and done_f[stage - 1] <= slot:
                        break
                    ready = forward[stage - 1][slot] if stage else 0.0
                    clock[stage] = forward[stage][slot] = max(clock[stage], ready) + costs[slot]
                    done_f[stage] += 1
                else:
                    slot = done_b[stage]
                    if stage + 1 < num_stages and done_b[stage + 1] <= slot:
                        break
                    ready = backward[stage + 1][slot] if stage + 1 < num_stages else 0.0
                    clock[stage] = backward[stage][slot] = max(clock[stage], ready) + 2 * costs[slot]
                    done_b[stage] += 1
    return max(clock)
