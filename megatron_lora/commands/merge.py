"""`merge`: adapters into their base model, as a model directory that needs no adapter any more (huggingface/merge.py).

megatron-lora merge runs/mine/jobs/summaries merged
megatron-lora merge runs/mine/jobs/summaries=0.7 runs/mine/jobs/names=0.3 merged --base models/base
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_lora.data.token_cache import cache_dir
from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter
from megatron_lora.huggingface.base_files import WEIGHTS, digests_of_base
from megatron_lora.huggingface.hub import resolve_base_model
from megatron_lora.huggingface.merge import merge
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.output.final_files import check_job_files


def main(words: Sequence[str], out: str, base: str | None) -> int:
    """Merge adapters, each with its weight, into a model directory that does not exist yet; returns 0."""
    named = dict(map(split_weight, words))
    if len(named) < len(words):
        raise UserError(f"{' '.join(words)}: an adapter stands there twice; name it once, with the sum of its weights")
    adapters = {name: _read(name) for name in named}
    bases = {adapter.base_model for adapter in adapters.values()}
    if base is None and (len(bases) > 1 or "" in bases):
        raise UserError(f"{' '.join(named)}: name {'several base models' if len(bases) > 1 else 'no base model'}; give one with --base")
    model_dir = resolve_base_model(base or bases.pop())
    architecture = read_base_model(model_dir)
    check_base(adapters, model_dir)
    merge(model_dir, architecture, [(adapters[name], weight) for name, weight in named.items()], Path(out))
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in named.items())
    print(f"{out}: {model_dir} + {terms}")
    return 0


def split_weight(word: str) -> tuple[str, float]:
    """Return an adapter's directory and weight; without `=WEIGHT`, or where a directory has that name, the weight is 1."""
    name, equals, text = word.rpartition("=")
    if not equals or Path(word).is_dir():
        return word, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{word!r}: {text!r} is no weight; write ADAPTER=WEIGHT with a number, such as {name}=0.5")
    return name, weight


def _read(name: str) -> AdapterFile:
    check_job_files(Path(name))  # if it is that of a run's job
    return read_adapter(name)


def check_base(adapters: dict[str, AdapterFile], model_dir: Path) -> None:
    """Raise UserError for an adapter whose card names other weights of the base model than those in a directory."""
    known = {name: adapter.base_digest for name, adapter in adapters.items() if adapter.base_digest}
    digest = digests_of_base(model_dir, load_weights=True, cache=cache_dir())[WEIGHTS] if known else ""
    for name, expected in known.items():
        if expected != digest:
            raise UserError(
                f"{name}: was trained on base weights of SHA-256 {expected[:12]}..., and {str(model_dir)!r} holds {digest[:12]}...; "
                "name its own base model with --base"
            )
