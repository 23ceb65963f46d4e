"""The options of end_to_end.py: those of a launch, and those of a case, of which one launch runs several.

A case is written as `key=value` words with the long options' names; what it leaves out is as the command line says:

    --adapters fused --budget 8192 --case "" --case "adapters=none" --case "policy=flush adapters=unfused recompute=full"
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from megatron_lora.config.schema import recompute as recompute_rule
from megatron_lora.errors import UserError
from scheduling.policies import POLICIES
from scheduling.types import Lengths
from scripts.bench.model_shapes import SHAPES
from scripts.bench.plain_lora import ADAPTERS
from scripts.bench.stamp import ROOT, result_options
from scripts.bench.workloads import SUITE
from scripts.one_line import OneLineParser, folder, numbers, positive, share, whole

HF_PEFT = "hf-peft"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured run."""

    name: str
    policy: str
    adapters: str
    workload: str
    jobs: int
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    expert_r: int
    completion: float
    budget: int | str
    recompute: str | tuple[str, ...]
    activation_offloading: bool
    deterministic: bool
    base_weights: str
    backend: str
    seconds: float
    steps: int | None
    save_steps: int
    calibrate: bool
    profile: bool
    dpo: int = 0
    dora: int = 0


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
    for name in ("pipeline", "tensor", "expert", "data"):
        launch.add_argument(f"--{name}", type=whole, default=1)
    launch.add_argument("--sequence", action="store_true", help="sequence parallelism")
    launch.add_argument("--layers", type=numbers(whole), help="of each stage, 38,26; default: by the cost model")
    launch.add_argument("--lengths", type=Path, default=SUITE, help="file of workloads")
    launch.add_argument("--case", action="append", dest="cases", help="key=value words; may be given several times")
    launch.add_argument("--runs", type=folder, default=ROOT / "runs" / "bench", help="folder of the runs' directories, made anew")
    result_options(launch, "end_to_end.jsonl")
    launch.add_argument("--peak-tflops", type=positive, default=989.0, help="of one device, dense, for MFU")
    launch_names = [action.dest for action in launch._group_actions]
    case = found.add_argument_group("case")
    case.add_argument("--name", default="", help="of the case in the results; default: made of its settings")
    case.add_argument("--policy", default="ours", choices=[*POLICIES, HF_PEFT])
    case.add_argument("--adapters", default="fused", choices=ADAPTERS)
    case.add_argument("--workload", default="het-s4")
    case.add_argument("--jobs", type=whole, default=4)
    case.add_argument("--dpo", type=whole, default=0, help="number of jobs, the first ones, that train by DPO, on pairs of as many tokens")
    case.add_argument("--dora", type=whole, default=0, help="number of jobs, the last ones, whose adapters are DoRA")
    case.add_argument("--ranks", type=numbers(whole), default=(16,))
    case.add_argument("--dropouts", type=numbers(share), default=(0.0,))
    case.add_argument("--expert-r", type=int, default=0, help="rank of adapters on all experts; 0: these are frozen")
    case.add_argument("--completion", type=float, default=0.25, help="share of each sample that is trained on")
    case.add_argument("--budget", type=budget, default=8192)
    case.add_argument("--recompute", type=recompute, default="auto", help="none, cheap, full, 20*full,60*cheap or auto: what fits")
    case.add_argument("--activation-offloading", action="store_true", help="inputs of layers under full wait in host memory")
    case.add_argument("--deterministic", action="store_true", help="the same bits again")
    case.add_argument("--base-weights", default="native", choices=["native", "fp8", "fp8/bf16", "fp8/fp8", "nf4/bf16", "nf4/fp8"])
    case.add_argument("--backend", default="auto", choices=["auto", "torch", "te"], help="of norms and attention")
    case.add_argument("--seconds", type=positive, default=60.0, help="about how long the run shall take, by the cost model")
    case.add_argument("--steps", type=whole, help="of each job, in place of --seconds")
    case.add_argument("--save-steps", type=whole, default=0, help="steps between two checkpoints of each job; default: none")
    case.add_argument("--calibrate", action="store_true", help="calibrate first, and predict from that")
    case.add_argument("--profile", action="store_true", help="also profile some slots: shares of GEMM, attention, LoRA, ...")
    found.set_defaults(launch_names=launch_names)
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
        changed = [name for name in options.launch_names if name != "cases" and getattr(chosen, name) != getattr(options, name)]
        if changed:
            parser().error(f"--case: {changed[0]} is the same for all cases of a launch; give it on the command line")
        cases.append(_case(chosen))
    if options.sequence and options.tensor == 1:
        parser().error("--sequence: needs --tensor above 1")
    return options, cases


def _case(chosen: argparse.Namespace) -> Case:
    words = [f"{chosen.jobs} jobs r {'/'.join(map(str, chosen.ranks))}", f"p {'/'.join(f'{p:g}' for p in chosen.dropouts)}"]
    words += [f"experts r {chosen.expert_r}"] if chosen.expert_r else []
    words += [str(chosen.budget), policies_in_words(chosen.recompute)]
    words += [word for word, usual in ((chosen.base_weights, "native"), (chosen.backend, "auto")) if word != usual]
    words += [word for word, on in (("offloaded", chosen.activation_offloading), ("deterministic", chosen.deterministic)) if on]
    words += [f"{chosen.dpo} by DPO"] if chosen.dpo else []
    words += [f"{chosen.dora} with DoRA"] if chosen.dora else []
    words += [f"{chosen.num_layers} layers"] if chosen.num_layers else []
    words += [f"checkpoints every {chosen.save_steps}"] if chosen.save_steps else []
    how = [chosen.policy] if chosen.policy == HF_PEFT else [chosen.policy, chosen.adapters]
    given = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(Case)}
    given["name"] = chosen.name or f"{chosen.shape} {chosen.workload}, " + ", ".join([*how, *words, layout_name(chosen)])
    return Case(**given)


def policies_in_words(recompute: str | tuple[str, ...]) -> str:
    """Say a policy, or how many layers have each."""
    if isinstance(recompute, str):
        return recompute
    return "+".join(f"{recompute.count(policy)} {policy}" for policy in dict.fromkeys(recompute))


def layout_name(options: argparse.Namespace) -> str:
    """Say the parallel layout in short: PP2 TP2+SP."""
    sizes = [("PP", options.pipeline), ("TP", options.tensor), ("EP", options.expert), ("DP", options.data)]
    words = [f"{name}{size}{'+SP' if name == 'TP' and options.sequence else ''}" for name, size in sizes if size > 1]
    return " ".join(words) or "1 GPU"


def check(options: argparse.Namespace, case: Case, workload: Lengths) -> None:
    """Refuse what cannot be run, before anything is built."""
    longest = max(tokens for steps in workload for batch in steps for tokens in batch)
    if case.budget != "auto" and int(case.budget) < longest:
        raise UserError(f"--budget: {case.budget} tokens do not hold the longest sample of {case.workload}, which has {longest}")
    if case.adapters == "unfused" and options.tensor > 1:
        raise UserError("--adapters: unfused runs with --tensor 1")
    if case.dpo and (case.policy != "ours" or case.dpo > case.jobs):
        raise UserError(f"--dpo: {case.dpo} needs --policy ours, which plans references, and as many --jobs")
    if case.dora > (case.jobs if case.policy == "ours" else 0):
        raise UserError(f"--dora: {case.dora} needs --policy ours, and as many --jobs")
    if case.policy == HF_PEFT and options.pipeline * options.tensor * options.data > 1:
        raise UserError(f"--policy: {HF_PEFT} runs on one device")
    if case.profile and not torch.cuda.is_available():
        raise UserError("--profile: measures kernels of a GPU, and none is visible")
    if not 0 <= case.expert_r <= 256:
        raise UserError(f"--expert-r: {case.expert_r} is no LoRA rank; use 1 to 256, or 0")
    if not 0 < case.completion <= 1:
        raise UserError(f"--completion: {case.completion:g} is no share; use a number above 0 and up to 1")
