"""What `megatron-lora check-adapter` does: find out whether an adapter does what it was trained to do, here and on a server.

Log-probabilities of a few samples are computed without the adapter and with it, as adapter_files.py reads it, and compared with peft's
and with those of a server that has it. What the files, the run that wrote them and the server say is compared too. Differences are
root mean squares over tokens, in nats. A server may round as it likes: what it differs by without any adapter is its
noise, the bound for the adapter is three times that, and an effect that is not above twice the bound cannot be checked.
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_lora.commands.preview import preview_records
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.row_files import read_blocks
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.token_cache import cache_dir
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.environment import version
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_effect import (
    Fault,
    applied,
    faults_of_files,
    linear_sizes,
    load_base,
    log_probabilities,
    peft_log_probabilities,
)
from megatron_lora.huggingface.adapter_files import CARD_FILE, AdapterFile, raw_config, read_adapter
from megatron_lora.huggingface.base_files import WEIGHTS, differing, digests_of_base
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.model_card import base_digest_of, serve_command, settings_of
from megatron_lora.huggingface.vllm_facts import FACTS_OF, largest_rank, readings
from megatron_lora.output import inference_server
from megatron_lora.output.final_files import STATUS, check_job_files
from megatron_lora.output.inference_server import Server, find_server
from megatron_lora.output.resume import recorded_config
from megatron_lora.output.run_directory import base_files_of, job_states

RIGHT, WRONG = 0, 1
NOISE, SAME = 1e-5, 1e-4  # nats: rounding in float32; what is equal in float32 at most differs by
OTHER_BASE = 0.3  # a base model differs by less from itself in 16 bits
NUM_SAMPLES, MOST_TOKENS = 4, 512
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and the clocks were striking thirteen.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris, which lies on the Seine.",
    "Dear Ms Miller, thank you for your letter of 3 March. We will send the spare parts within five working days.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The run that wrote an adapter: its directory and config, and the job."""

    run: Path
    config: RunConfig
    job: JobConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What is compared: log-probabilities of the samples by the base alone, and with the adapter where it can be read."""

    base: PreTrainedModel
    samples: Sequence[Sequence[int]]
    adapter: AdapterFile | None
    without: torch.Tensor
    expected: torch.Tensor


def main(directory: str, base: str | None, url: str | None, name: str | None, samples_file: str | None) -> int:
    """Print what was compared, what a server makes of the adapter, and each fault in a line; returns 0, or 1 where there is a fault."""
    if version("peft") is None:
        raise UserError("check-adapter compares with peft, which is not installed here; pip install peft")
    adapter_dir = Path(directory)
    config, origin = raw_config(adapter_dir), origin_of(adapter_dir)
    server = find_server(url) if url else None
    own_name = origin.job.name if origin else adapter_dir.resolve().name
    served = _served_name(server, name, own_name, adapter_dir) if server else own_name
    _print_facts(config, server)
    base_model = base or (origin.config.base_model if origin else str(config.get("base_model_name_or_path") or ""))
    if not base_model:
        raise UserError(f"--base: {adapter_dir} does not say which base model it is of; name its directory or hub id")
    base_dir = resolve_base_model(base_model)
    what, samples = samples_of(samples_file, origin, load_tokenizer(base_dir))
    model = load_base(base_dir)
    of_files = faults_of_files(adapter_dir, config, linear_sizes(model))
    faults = of_files + faults_of_origin(origin, adapter_dir, config, base_dir)
    adapter = None if of_files else read_adapter(adapter_dir)
    without = log_probabilities(model, samples)
    with applied(model, adapter) if adapter else contextlib.nullcontext():
        subject = Subject(model, samples, adapter, without, log_probabilities(model, samples))
    print(f"samples  {what}: {len(samples)}, {len(without):,} log-probabilities")
    faults += faults_of_effect(subject) + (faults_of_server(subject, server, served) if server else [])
    faults += faults_of_peft(subject, adapter_dir)  # last, because peft changes the model
    print(f"serve    {serve_command(str(base_model), largest_rank(config), served, directory)}")
    print(*(f"wrong    {kind}: {text}" for kind, text in faults), f"{adapter_dir}: {'WRONG' if faults else 'right'}", sep="\n", flush=True)
    return WRONG if faults else RIGHT


def origin_of(directory: Path) -> Origin | None:
    """Return the run that a job's directory, or a checkpoint in one, belongs to; None where it lies elsewhere."""
    directory = directory.resolve()
    job_dir = directory.parent if re.fullmatch(r"(checkpoint|best)-\d+", directory.name) else directory
    run = job_dir.parent.parent
    if job_dir.parent.name != "jobs" or not (run / "config.yaml").is_file():
        return None
    config = recorded_config(run)
    if (run / STATUS).exists():
        job_states(run)  # raises where it is damaged
    return next((Origin(run, config, job) for job in config.jobs if job.name == job_dir.name), None)


def samples_of(file: str | None, origin: Origin | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[list[int]]]:
    """Return what the samples are, and their tokens: of a file, else of the job's validation or training data, else of TEXTS."""
    encoder, what, found = RecordEncoder(tokenizer), "default texts", []
    if file is not None:
        what = file
        for where, record in islice((row for block in read_blocks(file) for row in block.rows()), NUM_SAMPLES):
            if isinstance(record, UserError):
                raise record
            found.append(encoder.encode(record, "messages" if "messages" in record else "text", False, where).tokens.tolist())
    elif origin is not None:
        datasets = origin.job.val_datasets or origin.job.datasets
        job = dataclasses.replace(origin.job, datasets=tuple(dataset for dataset in datasets if dataset.type != "lengths"))
        try:
            found = [[token for token, _, _ in record.token_texts] for record in preview_records(job, tokenizer, NUM_SAMPLES)]
            what = f"{'validation' if job.val_datasets else 'training'} data of {job.name}" if found else what
        except UserError as error:
            what += f" (the job's data cannot be read: {error})"
    if file is None and not found:
        found = [encoder.encode({"text": text}, "text", False, "text").tokens.tolist() for text in TEXTS]
    found = [tokens[:MOST_TOKENS] for tokens in found if len(tokens) > 1]
    if not found:
        raise UserError(f"--samples: {file!r} holds no record of two tokens; write lines of {{'text': ...}} or {{'messages': [...]}}")
    return what, found


def faults_of_origin(origin: Origin | None, directory: Path, config: dict, base_dir: Path) -> list[Fault]:
    """Compare an adapter and a base model with what the run that wrote the adapter, or the adapter's card, says of them."""
    faults: list[Fault] = []
    card, trained = base_digest_of(directory / CARD_FILE), settings_of(directory / CARD_FILE)
    before = base_files_of(origin.run) if origin else {WEIGHTS: card} if card else {}
    if origin is not None:
        job = origin.job
        trained = {"r": job.lora_rank, "lora_alpha": job.largest_alpha * job.times_alpha, "use_rslora": job.use_rslora}
        is_final = directory.resolve().name == job.name
        trained |= {"lora_alpha": job.lora_rank, "use_rslora": False} if job.export == "portable" and is_final else {}
        if job.linears and not is_final:
            del trained["lora_alpha"]  # a checkpoint has the arena's scales
    for key, value in trained.items():
        if config.get(key, False) != value:
            said = f"the run wrote {value}" if origin else f"its card says {value}"
            faults.append(("wrong alpha", f"{key} is {config.get(key)} in the adapter, and {said}"))
    if origin is not None:
        try:
            check_job_files(directory)
        except UserError as error:
            faults.append(("changed", str(error)))
    now = digests_of_base(base_dir, WEIGHTS in before, cache_dir()) if before else {}
    if differ := [name for name in differing(before, now) if origin or name == WEIGHTS]:
        faults.append(("another base", f"{', '.join(differ)} in {base_dir} are not what it was trained on (by SHA-256)"))
    known = "not what it was trained on" if differ else "that of its training" if before else "nothing records whether it was trained on it"
    print(f"base     {base_dir}: {known}")
    return faults


def faults_of_effect(subject: Subject) -> list[Fault]:
    """Check that an adapter changes what the base model says."""
    if subject.adapter is None:
        return []
    pairs, effect = subject.adapter.weights.values(), rms(subject.expected - subject.without)
    print(f"effect   {effect:.2g} nats, of {len(pairs)} linears with r {subject.adapter.r}")
    for number, factor in enumerate("" if subject.adapter.magnitudes else "AB"):
        if not any(pair[number].any() for pair in pairs):
            return [("no effect", f"every {factor} is zero: it leaves the base model as it is")]
    if not effect >= 3 * NOISE:
        return [("no effect", f"it changes these log-probabilities by {effect:.1g} nats, no more than rounding; try other --samples")]
    return []


def faults_of_peft(subject: Subject, directory: Path) -> list[Fault]:
    """Compare with what peft computes of the same directory."""
    if subject.adapter is None:
        return []
    apart = rms(peft_log_probabilities(subject.base, directory, subject.samples) - subject.expected)
    print(f"peft     {version('peft')} differs by {apart:.1e}")
    bound = max(NOISE, min(SAME, rms(subject.expected - subject.without) / 10))
    return (
        [] if apart <= bound else [("differs", f"peft's log-probabilities are {apart:.2g} nats from ours, where {bound:.1g} is rounding")]
    )


def faults_of_server(subject: Subject, server: Server, name: str) -> list[Fault]:
    """Compare with what a server computes, without the adapter and with the one that it serves as `name`."""
    model = server.models[name]
    base = model.base or next((each for each, found in server.models.items() if found.base is None), "")

    def ask(model: str) -> torch.Tensor:
        return torch.tensor([value for tokens in subject.samples for value in inference_server.log_probabilities(server, model, tokens)])

    alone, found = ask(base), ask(name)
    noise, moved, effect = rms(alone - subject.without), rms(found - alone), rms(subject.expected - subject.without)
    print(f"server   {name!r} is {model.directory or 'an adapter'} on {base!r}; without it the base differs by {noise:.1e}")
    if not noise <= OTHER_BASE:
        return [("another base", f"the server's {base!r} is {noise:.2g} nats from this base model without any adapter: it is another one")]
    bound = max(3 * noise, SAME)
    if moved <= min(bound, max(NOISE, effect / 10)):
        return [("no effect", f"the server answers as if {name!r} were not there: {moved:.1g} nats from its base model")]
    if subject.adapter is None:
        return []
    apart = rms(found - subject.expected)
    print(f"server   with the adapter it differs by {apart:.1e} (bound {bound:.1e})")
    if effect < 2 * bound:
        said = f"the adapter moves these samples by {effect:.2g} nats, and the server's rounding may be {bound:.2g}"
        return [("not visible", f"{said}; give --samples on which it acts, or serve with --dtype float32")]
    return [] if apart <= bound else [_explain(subject, found, apart, bound)]


def _explain(subject: Subject, found: torch.Tensor, apart: float, bound: float) -> Fault:
    """Say what would make a server's answers ours: another scale, or a module that it leaves out."""
    adapter, tried = subject.adapter, []
    assert adapter is not None

    def compute(times: float = 1.0, without: tuple[str, ...] = ()) -> torch.Tensor:
        with applied(subject.base, adapter, times, without):
            return log_probabilities(subject.base, subject.samples)

    root = adapter.r**0.5
    times = min((0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, root, 1 / root), key=lambda each: rms(found - compute(each)))
    for _ in range(6):  # Gauss-Newton
        at = compute(times)
        alpha = f"the server answers as with lora_alpha {adapter.lora_alpha * times:.4g}, and the adapter has {adapter.lora_alpha:g}"
        tried.append((rms(found - at), "wrong alpha", f"{alpha}: it serves another copy, or reads use_rslora otherwise"))
        slope = (compute(times * 1.001) - at) / (times * 0.001)
        times += max(-times / 2, min(times, float((found - at) @ slope / (slope @ slope).clamp_min(1e-30))))
    for module in adapter.target_modules:
        left = f"the server answers as if {module} had no A and B: it serves another copy, or leaves them out"
        tried.append((rms(found - compute(without=(module,))), "missing module", left))
    least, kind, text = min(tried)
    return (kind, text) if least <= bound else ("differs", f"the server is {apart:.2g} nats from ours, where {bound:.1g} is rounding")


def rms(values: torch.Tensor) -> float:
    """Return the root mean square."""
    return float(values.double().square().mean().sqrt())


def _served_name(server: Server, name: str | None, own: str, directory: Path) -> str:
    """Return the name by which a server has an adapter: the one given, else that of its directory, else its own."""
    here = [served for served, model in server.models.items() if model.directory == str(directory.resolve())]
    chosen = name or (here or [own])[0]
    if chosen not in server.models:
        served = ", ".join(server.models) or "nothing"
        raise UserError(f"--name: {server.url} does not serve {chosen!r}; it serves {served}: name one, or load the adapter there")
    return chosen


def _print_facts(config: dict, server: Server | None) -> None:
    """Print what vLLM makes of an adapter's fields."""
    known = server is None or (server.version or "").startswith(f"{FACTS_OF}.")
    if server and not known:
        print(f"vLLM     {server.version or 'the server does not say its version'}; the following are facts of {FACTS_OF}")
    for verb, fields in readings(config).items():
        print(f"vLLM     {server.version if server and known else FACTS_OF} {verb} {', '.join(fields) or 'nothing'}")
