"""What `megatron-lora plan` prints: how the jobs of a config would share the pipeline, before anything is trained.

A job's line is the job alone, as other trainers run it: a flush after each of its steps, over its
best number of microbatches. The line "one by one" is all of these one after another. The line
"together" is one run of all jobs under the chosen policy. A job has a share of that run's time, by
its share of the work; its gain is its time alone divided by that. The last line's gain is the time
one by one divided by the time together.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_lora.commands.checks import read_inputs, say_failed
from megatron_lora.config.objective_keys import KtoConfig
from megatron_lora.config.rules import one_of
from megatron_lora.config.schema import JobConfig, RunConfig, load_config
from megatron_lora.config.sweep_keys import by_sweep
from megatron_lora.data.evaluation import evaluation_steps, longest_of
from megatron_lora.data.sample_arrays import JobSamples, target_share
from megatron_lora.data.samples import JobData
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.parallel.partition import layers_of_stages
from megatron_lora.planning.calibration import Calibration, calibrated, device_of, differing, find_calibration, read_calibration
from megatron_lora.planning.devices import named_device, size, this_device, this_gpu
from megatron_lora.planning.forecast import Figures, Forecast, Workload, forecast
from megatron_lora.planning.plan_picture import check_plot_path, draw
from megatron_lora.planning.predict import cost_of, memory_of, message_and_step_seconds, planner_cost
from megatron_lora.planning.resolve import adapter_memory_line, describe, host_memory_line, resolve
from megatron_lora.training.rungs import expected_share
from scheduling.cost import DEVICES, Device
from scheduling.data_parallel import deal
from scheduling.memory import RESERVED
from scheduling.policies import POLICIES, Runs
from scheduling.windows import WindowPlanner

MIN_GAIN = 0.02  # a smaller gain is reported as none
DETERMINISTIC = "deterministic: true; attention is torch's, in a fixed order of sums, which the seconds do not count"


def main(config_path: str, overrides: list[str], *, policy: str, plot: str | None, device_name: str | None, cost_file: str | None) -> int:
    """Print the plan of a config, and draw it into the file `plot`; returns 0."""
    one_of(*POLICIES)("--policy", policy)
    named = None if device_name is None else named_device("--device", device_name)
    if plot is not None:
        check_plot_path(plot)
    given = load_config(config_path, overrides)
    costs = None if cost_file is None else read_calibration(Path(cost_file), "--cost")
    inputs = read_inputs(given, may_fail={job.name for job in given.jobs})
    say_failed(inputs)
    given = dataclasses.replace(given, jobs=tuple(job for job in inputs.jobs if job.name not in inputs.failed))
    device, known, costs = choose_device(named, costs, given, inputs.architecture)
    samples = [job_data.steps_of(job) for job, job_data in zip(given.jobs, inputs.data, strict=True)]
    lengths = [of_job.lengths() for of_job in samples]
    share = target_share((of_job.samples, of_job.steps) for of_job in samples)
    others = longest_of((job, data.samples, data.validation_samples) for job, data in zip(given.jobs, inputs.data, strict=True))
    held = [*lengths, *others]  # what a microbatch must hold
    config = resolve(given, inputs.architecture, held, device, share)
    cost = cost_of(config, inputs.architecture, device, share)
    weights = planner_cost(config, inputs.architecture, device, share)
    workload = Workload(config=config, dealt=deal(lengths, config.parallel.data, weights), cost=cost, weights=weights)
    seconds = message_and_step_seconds(config, inputs.architecture, device)
    together, solo = (forecast(runs_of(each, workload), workload, *seconds) for each in (policy, "flush"))
    chosen = [*describe(given, config), *adapter_memory_line(given, config, inputs.architecture, device)]
    chosen += adapter_lines(config.jobs, inputs.architecture)
    lines = [*chosen, *table(config, policy, workload, solo, together), *validation_lines(config, inputs.data), ""]
    lines += stage_table(config, inputs.architecture, device, together)
    lines += [*host_memory_line(given, config, inputs.architecture, device), *[DETERMINISTIC][: config.deterministic], ""]
    lines += [basis(device, known, costs, share), *advice(config, policy, solo, together), *sweep_lines(config, together)]
    print("\n".join(lines))
    if plot is not None:
        draw(plot, [("predicted", together.timeline)], together.stream, [job.name for job in config.jobs], "seconds")
    return 0


def adapter_lines(jobs: Sequence[JobConfig], architecture: Architecture) -> list[str]:
    """Return a line for each size that adapters have: their parameters, and the bytes of what a job writes, all of it in fp32."""
    sizes: dict[int, list[str]] = {}
    for job in jobs:
        sizes.setdefault(num_parameters(job, architecture), []).append(job.name)
    lines = []
    for number, names in sorted(sizes.items()):
        whose = names[0] if len(names) == 1 else f"each of {len(names)} adapters" if len(names) > 3 else ", ".join(names)
        lines.append(f"{whose}: {number:,} parameters, {size(4 * number)}, and {size(12 * number)} a checkpoint")
    return lines


def num_parameters(job: JobConfig, architecture: Architecture) -> int:
    """Return the weights of a job's adapter."""
    sizes, dora = architecture.module_sizes, job.adapter == "dora"  # module -> (inputs, outputs)
    if job.linears is not None:
        of_layer = ((len(each.layers), job.halves * each.r, sizes[each.module]) for each in job.linears.of)
        return sum(num_layers * (r * sum(size) + dora * size[1]) for num_layers, r, size in of_layer)
    outside = sum(job.lora_rank * sum(size) + dora * size[1] for module, size in sizes.items() if module in job.target_modules)
    hidden, width = architecture.hidden_size, architecture.ffn_size
    experts = architecture.num_experts * job.expert_rank * (hidden + width)
    return architecture.num_layers * (outside + experts * sum(module in architecture.expert_modules for module in job.target_modules))


def choose_device(
    named: Device | None, costs: Calibration | None, config: RunConfig, architecture: Architecture
) -> tuple[Device, bool, Calibration | None]:
    """Return the device to predict for, whether it was asked for or is here, and the cost table that its costs are from, if any.

    A table that is given must be of this config; without one, this user's is taken where there is one of the device.
    """
    if costs is not None:
        if differs := differing(costs, config, architecture, device_of(costs)):
            raise UserError(f"--cost: the table {differs}; calibrate this config")
        return calibrated(named or device_of(costs), costs), True, costs
    from megatron_lora.data.token_cache import cache_dir

    asked = named or this_gpu()
    candidates = [asked] if asked else [this_device(config.parallel.world_size), DEVICES["h100"]]
    for device in candidates:
        if found := find_calibration(cache_dir(), config, architecture, device):
            return calibrated(device, found), True, found
    return candidates[-1], asked is not None, None


def runs_of(policy: str, workload: Workload) -> Runs:
    """Plan the workload by a policy: `ours` as training does, in rolling windows with the planner's weights; others with the real cost."""
    jobs, parallel, rounds = workload.config.jobs, workload.config.parallel, workload.dealt.rounds
    stages, capacity = parallel.pipeline, workload.config.microbatch_tokens
    if policy != "ours":
        return POLICIES[policy](rounds, stages, capacity, workload.cost.slot_cost(sum(job.lora_rank for job in jobs) / len(jobs)))
    planner = WindowPlanner(stages, capacity, delay=parallel.norm_delay, cost=workload.weights)
    return (sum(planner.plan_all(rounds), ()),)


def table(config: RunConfig, policy: str, workload: Workload, solo: Forecast, together: Forecast) -> list[str]:
    """Return a line for each job alone, one for all jobs one by one, and one for all jobs together."""
    names = [*(job.name for job in config.jobs), "one by one", f"together, {policy}"]
    width = max(map(len, names))
    columns = ("steps", "tokens", "slots", "fill", "uneven", "padding", "no-ops", "bubble", "seconds", "tokens/s", "gain")
    widths = (6, 11, 7, 6, 7, 8, 7, 7, 9, 10, 6)
    lines = [" ".join([" " * width, *(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))])]

    def row(name: str, steps: int, f: Figures, gain: float | None) -> str:
        cells = (
            *(f"{steps}", f"{f.tokens:,}", f"{f.slots}", f"{f.fill:.0%}", f"{f.uneven:.0%}", f"{f.padding:.1%}", f"{f.noops}"),
            *(f"{f.bubble:.1%}", amount(f.seconds), amount(f.tokens / f.seconds), "" if gain is None else f"{gain:.2f}x"),
        )
        return " ".join([f"{name:{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))])

    gains = gains_of(solo, together)
    steps_of = [len(dealt.lengths) for dealt in workload.dealt.jobs.values()]
    lines += [row(names[job], steps, solo.of_job(job), gains[job]) for job, steps in enumerate(steps_of)]
    lines.append(row(names[-2], sum(steps_of), solo.figures, None))
    return [*lines, row(names[-1], sum(steps_of), together.figures, solo.figures.seconds / together.figures.seconds)]


def validation_lines(config: RunConfig, data: Sequence[JobData]) -> list[str]:
    """Return a line for each job with validation data, a reference or mismatched slots, and an empty one behind them."""
    lines = []
    for job, job_data in zip(config.jobs, data, strict=True):
        if job.reference is not None:
            tokens = tokens_once(job_data.steps_of(job))
            lines.append(f"{job.name}: its reference runs {tokens:,} tokens forward, once, which the seconds do not count")
        if isinstance(job.preference, KtoConfig):
            lines.append(f"{job.name}: each step runs as many tokens forward twice more, to compare, which the seconds do not count")
        if times := len(evaluation_steps(job, job_data.steps_of(job).steps)):
            samples = job_data.validation_samples
            size = f"{len(samples):,} samples for validation, {samples.lengths.sum():,} tokens"
            lines.append(f"{job.name}: {size}, evaluated {times} times, which the seconds do not count")
    return [*lines, ""] if lines else []


def tokens_once(of: JobSamples) -> int:
    """Return the tokens of all samples that a job's steps take, each counted once."""
    seen: set[int] = set()
    for step in of.steps:
        seen |= {sample for _, sample in step}
        if len(seen) == len(of.samples):
            break
    return int(of.samples.lengths[sorted(seen)].sum())


def sweep_lines(config: RunConfig, together: Forecast) -> list[str]:
    """Return a line for each sweep: what its points cost if all train to their end, and what is expected of it."""
    lines, shares = [], dict(zip((job.name for job in config.jobs), together.shares(), strict=True))
    for name, points in by_sweep(config.jobs).items():
        sweep, seconds = points[0].point.sweep, together.figures.seconds * sum(shares[job.name] for job in points)
        num = sweep.num_points if sweep.strategy == "optuna" else len(points)  # those that it will name cost as much as the first ones
        seconds *= num / len(points)
        known = f"sweep {name}: {num} points, {amount(seconds)} s if all train to their end"
        early = expected_share(sweep, len(points))
        lines.append(f"{known}; {amount(early * seconds)} s expected by {sweep.strategy}, {early:.0%} of it" if sweep.rungs else known)
    return lines


def gains_of(solo: Forecast, together: Forecast) -> list[float]:
    """Return each job's time alone divided by its share of the time together."""
    shares = together.shares()
    return [solo.of_job(job).seconds / (shares[job] * together.figures.seconds) for job in range(len(shares))]


def stage_table(config: RunConfig, architecture: Architecture, device: Device, together: Forecast) -> list[str]:
    """Return a line for each stage, with its layers, idle share and memory, and a warning if the memory does not suffice."""
    columns = ("stage", "layers", "bubble", "weights", "adapters", "activations", "memory")
    lines = ["".join(f"{column:>{len(column) + 4}}" for column in columns)[4:]]
    too_large = []
    layers = layers_of_stages(architecture.num_layers, config.parallel)
    for stage, memory in enumerate(memory_of(config, architecture, device)):
        in_flight, largest = together.tokens_in_flight(stage), together.largest_slot
        total = memory.total(in_flight, largest)
        activations = total - memory.weights - memory.adapters
        cells = (
            *(f"{stage}", f"{len(layers[stage])}", f"{together.timeline.bubble(stage):.1%}"),
            *(size(each) for each in (memory.weights, memory.adapters, activations, total)),
        )
        lines.append("".join(f"{cell:>{len(column) + 4}}" for cell, column in zip(cells, columns, strict=True))[4:])
        if total > device.memory_bytes * (1 - RESERVED):
            too_large.append(f"stage {stage} needs {size(total)}")
    if too_large:
        lines.append(
            f"Too much for {size(device.memory_bytes)} on {device.name}: {', '.join(too_large)}; lower microbatch_tokens, set recompute, "
            "or use more stages or tensor ranks."
        )
    return lines


def basis(device: Device, known: bool, costs: Calibration | None, target_share: float) -> str:
    """Say what the seconds stand on."""
    counted = f"The loss is counted for {target_share:.0%} of the tokens, those that are targets."
    if costs is not None:
        return f"Seconds are by {costs.describe()}, messages between stages and steps included. {counted} Memory is for {device.name}."
    if not known:
        where = f"This machine has no GPU: seconds and memory are predicted for {device.name} (choose with --device)"
        return f"{where}, without communication. {counted}"
    return f"Seconds and memory are predicted for {device.name}, without communication. {counted}"


def advice(config: RunConfig, policy: str, solo: Forecast, together: Forecast) -> list[str]:
    """Say in words whether co-training pays, and for which jobs it does not."""
    stages, gain = config.parallel.pipeline, solo.figures.seconds / together.figures.seconds
    where = {1: "One GPU" if config.parallel.world_size == 1 else "One stage"}.get(stages, f"{stages} stages")
    if gain < 1 + MIN_GAIN:
        if len(config.jobs) == 1:
            reason = ", and one job, which has no other to share with"
        else:
            reason = ", and each job fills its microbatches" if stages == 1 else ", and each job keeps them busy"
        return [f"{where}{reason if policy == 'ours' else ''}: expect {gain:.1f}x."]
    lines = [f"{where}, {config.microbatch_tokens} tokens per microbatch: expect {gain:.2f}x over the jobs one by one."]
    if len(config.jobs) > 1:
        idle = [job.name for job, job_gain in zip(config.jobs, gains_of(solo, together), strict=True) if job_gain < 1 + MIN_GAIN]
        lines += [f"Does not gain by being co-trained: {', '.join(idle)}."] if idle else []
    return lines


def amount(value: float) -> str:
    """Write a number with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
