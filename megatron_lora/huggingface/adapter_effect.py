"""What an adapter does to a base model: log-probabilities of samples without it, with it as adapter_files.py reads it, and with it in peft.

    y = W x + scale * B (A x)        in float32 on the CPU, a plain product for each adapted linear of transformers' model; times
                                     m / ||W + scale * B A|| of DoRA, without the bias

`faults_of_files` compares the names and shapes in an adapter's file with the base model before anything is computed. Of log-probabilities
the root mean square over all tokens counts, in nats: of their changes through the adapter, and of differences of two that should be equal.

    base = load_base(model_dir); faults = faults_of_files(directory, linear_sizes(base))
    with applied(base, read_adapter(directory)):
        found = log_probabilities(base, samples)
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFile, of_expert
from megatron_lora.huggingface.adapter_targets import read_targets
from megatron_lora.huggingface.families import MULTIMODAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
Fault = tuple[str, str]  # its kind, and what is wrong with this adapter


def load_base(model_dir: Path) -> PreTrainedModel:
    """Load a base model with transformers, in float32 on the CPU; UserError where transformers cannot."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        of_images = config.model_type in MULTIMODAL
        loader = transformers.AutoModelForImageTextToText if of_images else transformers.AutoModelForCausalLM
        return loader.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--base: {str(model_dir)!r} cannot be loaded by transformers ({one_line(error, 160)}); fetch it again") from None


def linear_sizes(base: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return path -> (in, out) features of a model's linears."""
    return {path: (m.in_features, m.out_features) for path, m in base.named_modules() if isinstance(m, torch.nn.Linear)}


def log_probabilities(model: torch.nn.Module, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the log-probability of every token but the first of each sample, one sample after the other."""
    found = []
    with torch.inference_mode():
        for tokens in samples:
            ids = torch.tensor([tokens])
            logits = model(input_ids=ids).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


@contextlib.contextmanager
def applied(base: torch.nn.Module, adapter: AdapterFile, times: float = 1.0, without: Collection[str] = ()) -> Iterator[None]:
    """Add an adapter's products to a base model's linears, `times` its scale; leave out the modules named in `without`."""
    linears, hooks = dict(base.named_modules()), []

    def add(a_RK: torch.Tensor, b_NR: torch.Tensor, scale: float):
        return lambda module, inputs, output: output + (inputs[0] @ a_RK.float().T @ b_NR.float().T) * scale

    def resize(linear: torch.nn.Linear, a_RK: torch.Tensor, b_NR: torch.Tensor, scale: float, m_N: torch.Tensor):
        norms = (linear.weight + scale * b_NR.float() @ a_RK.float()).norm(dim=1)
        factors, bias = m_N.float() / norms, 0.0 if linear.bias is None else linear.bias
        return lambda module, inputs, output: bias + factors * (output - bias)

    try:
        for path, (a_RK, b_NR) in adapter.weights.items():
            if path.rpartition(".")[2] not in without:
                linear, given = cast(torch.nn.Linear, linears[path]), (a_RK, b_NR, adapter.scale(path) * times)
                hooks.append(linear.register_forward_hook(add(*given)))
                if path in adapter.magnitudes:  # a hook gets what the one before it returned
                    hooks.append(linear.register_forward_hook(resize(linear, *given, adapter.magnitudes[path])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def peft_log_probabilities(base: PreTrainedModel, directory: Path, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return log-probabilities through peft, which puts its layers into `base`; UserError where peft refuses the adapter."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, directory)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{directory}: peft refuses it ({one_line(error, 200)}); export the adapter again") from None
    return log_probabilities(model.eval(), samples)


def faults_of_files(directory: Path, config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]]) -> list[Fault]:
    """Compare an adapter's names and shapes with the `linears` of a base model, path -> (in, out) features."""
    file = directory / WEIGHTS_FILE
    try:
        with safe_open(file, "pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error, 160)}); save the adapter again, as safetensors") from None
    factors = {key: match for key in shapes if (match := FACTOR.fullmatch(key))}
    held = {match[1].removeprefix(PREFIX) for key, match in factors.items() if key.startswith(PREFIX)}
    if any(map(of_expert, held)):
        raise UserError(f"{directory}: adapts experts, which check-adapter does not compare; load it with peft, or merge it")
    if not held & linears.keys():
        return _names_of_none(file, list(factors), linears)
    targets = read_targets(directory / CONFIG_FILE, config)
    wanted = {path for path in linears if targets.covers(path)}
    faults, lacking, foreign = [], sorted(wanted - held), sorted(held - linears.keys())
    if lacking:
        said = f"{len(lacking)} of the {len(wanted)} linears that {CONFIG_FILE} adapts have no A and B, as {lacking[0]}"
        faults.append(("missing module", said))
    if foreign:
        faults.append(("another base", f"it holds A and B for {one_line(foreign[0], 160)}, which this base model does not have"))
    for key, match in factors.items():
        path, sizes = match[1].removeprefix(PREFIX), linears.get(match[1].removeprefix(PREFIX))
        if sizes is not None and len(shapes[key]) == 2:
            what, given, features = ("inputs", shapes[key][1], sizes[0]) if match[2] == "A" else ("outputs", shapes[key][0], sizes[1])
            if given != features:
                return [*faults, ("another base", f"{path} has {given} {what} in the adapter and {features} in this base model")]
    return faults


def _names_of_none(file: Path, keys: Sequence[str], linears: Mapping[str, tuple[int, int]]) -> list[Fault]:
    """Say why no name in a file is that of a linear: its prefix, or the model that it was made for."""
    for key in keys:
        path = max((path for path in linears if f".{path}.lora_" in f".{key}"), key=len, default=None)
        if path is not None:
            prefix = key[: key.index(f"{path}.lora_")]
            said = f"names in {file.name} begin with {one_line(repr(prefix), 80)} where PEFT's begin with {PREFIX!r}"
            return [("wrong prefix", f"{said}: they match no module, and a server loads an adapter that does nothing")]
    first = f", as {one_line(keys[0], 160)}" if keys else ": it holds no A or B"
    return [("another base", f"names in {file.name} match no linear of this base model{first}")]
