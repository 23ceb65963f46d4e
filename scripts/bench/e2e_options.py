"""The options of end_to_end.py: those of a launch, and those of a case, of which one launch runs several.

A case is written as `key=value` words with the long options' names; what it leaves out is as the command line says:

    --adapters fused --budget 8192 --case "" --case "adapters=none" --case "policy=flush adapters=unfused recompute=full"
"""

import argparse
import dataclasses
from itertools import groupby
from pathlib import Path

import torch
from model_shapes import SHAPES
from one_line import OneLineParser, folder, numbers, output_file, positive, share, whole
from plain_lora import ADAPTERS
from stamp import RESULTS
from synthetic_jobs import SUITE, JobSpecs

from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.config.schema import recompute as recompute_rule
from megatron_lora.errors import UserError
from scheduling.policies import POLICIES
from scheduling.types import Lengths

HF_PEFT = "hf-peft"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured run."""

    name: str
    policy: str
    adapters: str
    workload: str
    jobs: JobSpecs
    budget: int | str
    recompute: str | tuple[str, ...]
    base_weights: str
    backend: str
    warm_seconds: float
    steps: int | None
    calibrate: bool
    profile: bool

    def config(self, shape: str, parallel: ParallelConfig) -> RunConfig:
        """Return the case as a run's config, for the cost and memory models."""
        return RunConfig(
            base_model=shape,
            output_dir=".",
            parallel=parallel,
            microbatch_tokens=self.budget,
            recompute=self.recompute,
            base_weights=self.base_weights,
            backend=self.backend,
            load_weights=False,
            jobs=self.jobs.configs(),
        )


def budget(text: str) -> int | str:
    """Read a number of tokens, or auto."""
    return text if text == "auto" else whole(text)


def recompute(text: str) -> str | tuple[str, ...]:
    """Read a policy, or runs of layers: 20*full,60*cheap."""
    try:
        if "*" not in text and "," not in text:
            return recompute_rule("policy", text)
        runs = [part.rpartition("*") for part in text.split(",")]
        return recompute_rule("policies", [policy for count, _, policy in runs for _ in range(int(count or 1))])
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> OneLineParser:
    """Return the parser of both kinds of options."""
    found = OneLineParser(prog="end_to_end.py", description="Real tokens per second of whole runs.", allow_abbrev=False)
    launch = found.add_argument_group("launch")
    launch.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    launch.add_argument("--num-layers", type=whole, help="cut the model short")
    for name in ("pipeline", "tensor", "data"):
        launch.add_argument(f"--{name}", type=whole, default=1)
    launch.add_argument("--sequence", action="store_true", help="sequence parallelism")
    launch.add_argument("--layers", type=numbers(whole), help="of each stage, 38,26; default: by the cost model")
    launch.add_argument("--memory-gb", type=positive, help="what `auto` may count on; default: what is free")
    launch.add_argument("--lengths", type=Path, default=SUITE, help="file of workloads")
    launch.add_argument("--case", action="append", dest="cases", help="key=value words; may be given several times")
    launch.add_argument("--rounds", type=whole, default=1, help="how often the cases take turns")
    launch.add_argument("--output", type=output_file, default=RESULTS / "end_to_end.jsonl")
    launch.add_argument("--losses", type=output_file, help="append every case's losses to this file")
    launch.add_argument("--timeline", type=folder, help="directory for a trace of every case, for Perfetto")
    launch.add_argument("--cost", type=Path, help="cost model of these stages (profile_layers.py, or an earlier --save-cost)")
    launch.add_argument("--save-cost", type=output_file, help="write the last calibrated cost model here")
    launch.add_argument("--hardware", help="as tables shall say it; default: the devices' names")
    launch.add_argument("--commit", help="where the checkout cannot tell it")
    launch.add_argument("--peak-tflops", type=positive, default=989.0, help="of one device, dense, for MFU")
    case = found.add_argument_group("case")
    case.add_argument("--name", default="", help="of the case in the results; default: made of its settings")
    case.add_argument("--policy", default="ours", choices=[*POLICIES, HF_PEFT])
    case.add_argument("--adapters", default="fused", choices=ADAPTERS)
    case.add_argument("--workload", default="het-s4")
    case.add_argument("--jobs", type=whole, default=4)
    case.add_argument("--ranks", type=numbers(whole), default=(16,))
    case.add_argument("--dropouts", type=numbers(share), default=(0.0,))
    case.add_argument("--completion", type=float, default=0.25, help="share of each sample that is trained on")
    case.add_argument("--budget", type=budget, default=8192)
    case.add_argument("--recompute", type=recompute, default="auto", help="none, cheap, full, 20*full,60*cheap or auto: what fits")
    case.add_argument("--base-weights", default="native", choices=["native", "fp8"])
    case.add_argument("--backend", default="auto", choices=["auto", "torch", "te"], help="of norms and attention")
    case.add_argument("--warm-seconds", type=positive, default=60.0, help="length of the timed region")
    case.add_argument("--steps", type=whole, help="of each job, in place of --warm-seconds")
    case.add_argument("--calibrate", action="store_true", help="time each stage's passes alone first, and predict from them")
    case.add_argument("--profile", action="store_true", help="also profile some slots: shares of GEMM, attention, LoRA, ...")
    return found


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[Case]]:
    """Return the launch's options and its cases; exits with one line and status 2 for what is wrong."""
    options = parser().parse_args(arguments)
    defaults = vars(options) | {"cases": None}
    cases = []
    for words in options.cases or [""]:
        pairs = [word.partition("=") for word in words.split()]
        if any(not mark for _, mark, _ in pairs):
            parser().error(f"--case: {words!r} is not made of key=value words")
        flags = [part for key, _, value in pairs for part in ([f"--{key}"] if value in ("", "yes") else [f"--{key}", value])]
        chosen = parser().parse_args(flags, argparse.Namespace(**defaults))
        changed = [key for key, value in vars(chosen).items() if key in LAUNCH and value != getattr(options, key) and key != "cases"]
        if changed:
            parser().error(f"--case: {changed[0]} is the same for all cases of a launch; give it on the command line")
        cases.append(_case(chosen))
    parallel_of(options)
    return options, cases


LAUNCH = (
    "shape",
    "num_layers",
    "pipeline",
    "tensor",
    "data",
    "sequence",
    "layers",
    "lengths",
    "output",
    "losses",
    "timeline",
    "cost",
    "memory_gb",
    "rounds",
    "save_cost",
    "hardware",
    "commit",
    "peak_tflops",
)


def _case(chosen: argparse.Namespace) -> Case:
    words = [f"{chosen.jobs} jobs r {'/'.join(map(str, chosen.ranks))}", f"p {'/'.join(f'{p:g}' for p in chosen.dropouts)}"]
    words += [str(chosen.budget), policies_in_words(chosen.recompute)]
    words += [word for word, usual in ((chosen.base_weights, "native"), (chosen.backend, "auto")) if word != usual]
    how = [chosen.policy] if chosen.policy == HF_PEFT else [chosen.policy, chosen.adapters]
    return Case(
        name=chosen.name or f"{chosen.shape} {chosen.workload}, " + ", ".join([*how, *words, layout_name(chosen)]),
        policy=chosen.policy,
        adapters=chosen.adapters,
        workload=chosen.workload,
        jobs=JobSpecs(count=chosen.jobs, ranks=chosen.ranks, dropouts=chosen.dropouts, completion=chosen.completion),
        budget=chosen.budget,
        recompute=chosen.recompute,
        base_weights=chosen.base_weights,
        backend=chosen.backend,
        warm_seconds=chosen.warm_seconds,
        steps=chosen.steps,
        calibrate=chosen.calibrate,
        profile=chosen.profile,
    )


def policies_in_words(recompute: str | tuple[str, ...]) -> str:
    """Say a policy, or how many layers have each."""
    if isinstance(recompute, str):
        return recompute
    return "+".join(f"{recompute.count(policy)} {policy}" for policy in dict.fromkeys(recompute))


def policies_in_runs(recompute: str | tuple[str, ...]) -> str:
    """Write policies as --recompute reads them."""
    return recompute if isinstance(recompute, str) else ",".join(f"{len(list(run))}*{policy}" for policy, run in groupby(recompute))


def layout_name(options: argparse.Namespace) -> str:
    """Say the parallel layout in short: PP2 TP2+SP."""
    sizes = [("PP", options.pipeline), ("TP", options.tensor), ("DP", options.data)]
    words = [f"{name}{size}{'+SP' if name == 'TP' and options.sequence else ''}" for name, size in sizes if size > 1]
    return " ".join(words) or "1 GPU"


def parallel_of(options: argparse.Namespace) -> ParallelConfig:
    """Return the launch's layout."""
    if options.sequence and options.tensor == 1:
        raise UserError("--sequence: needs --tensor above 1")
    return ParallelConfig(
        pipeline=options.pipeline, tensor=options.tensor, data=options.data, sequence=options.sequence, layers_per_stage=options.layers
    )


def check(options: argparse.Namespace, cases: list[Case], workloads: list[Lengths]) -> None:
    """Refuse what cannot be run, before anything is built."""
    parallel = parallel_of(options)
    if options.save_cost and not any(case.calibrate for case in cases):
        raise UserError("--save-cost: writes what --calibrate measures; give both")
    for case, workload in zip(cases, workloads, strict=True):
        longest = max(tokens for steps in workload for batch in steps for tokens in batch)
        if case.budget != "auto" and case.budget < longest:
            raise UserError(f"--budget: {case.budget} tokens do not hold the longest sample of {case.workload}, which has {longest}")
        if case.adapters == "unfused" and parallel.tensor > 1:
            raise UserError("--adapters: unfused runs with --tensor 1")
        if case.policy == HF_PEFT and parallel.world_size > 1:
            raise UserError(f"--policy: {HF_PEFT} runs on one device")
        if case.adapters == "none" and case.policy == HF_PEFT:
            raise UserError(f"--policy: {HF_PEFT} trains adapters; leave --adapters away")
        if case.profile and not torch.cuda.is_available():
            raise UserError("--profile: measures kernels of a GPU, and none is visible")
        if not 0 < case.jobs.completion <= 1:
            raise UserError(f"--completion: {case.jobs.completion:g} is no share; use a number above 0 and up to 1")
