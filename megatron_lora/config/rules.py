"""What one value of a config may be: rules from (key path, value) to the checked value.

A rule returns the value to store or raises UserError with one line: the key, the value, what would be right. It also says in words
what it accepts, for docs/config.md. Types are strict: `true` is not a number, `16.0` is not a whole number, `"1e-4"` in quotes is
text. Rules are made by the functions below and stand beside the fields that they guard, in schema.py's dataclasses:

    r: int = key(16, whole_number("a LoRA rank", 1, 256), "rank of A and B")
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from megatron_lora.errors import UserError, one_line

Check = Callable[[str, object], Any]

RECOMPUTE = ("none", "cheap", "full")
BASE_WEIGHTS = {  # (storage, compute) -> its word
    **{("bf16", "bf16"): "native", ("bf16", "fp8"): "fp8"},
    **{(storage, compute): f"{storage}/{compute}" for storage in ("fp8", "nf4") for compute in ("bf16", "fp8")},
}
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", *EXPERT_MODULES)
MODULES = (*TARGET_MODULES, "qkv_proj", "gate_up_proj")  # of all families
PAIR_METRICS = {"eval_rewards/accuracies": "max", "eval_rewards/margins": "max"}  # of preference objectives
# Of an evaluation -> which of its values is the best.
METRICS = {"eval_loss": "min", "eval_perplexity": "min", "eval_accuracy": "max", **PAIR_METRICS}
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

OTHER_WORDS = {  # what other trainers call a key of ours
    "adam_eps": "adam_epsilon",
    "alpha": "lora_alpha",
    "batch_size": "global_batch_size",
    "base_model_name_or_path": "base_model",
    "dropout": "lora_dropout",
    "dtype": "precision",
    "epochs": "num_epochs",
    "evals_per_epoch": "eval_steps",
    "gradient_accumulation_steps": "global_batch_size",
    "expert_model_parallel_size": "parallel.expert",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "load_best_model_at_end": "keep",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "metric_for_best_model": "metric",
    "micro_batch_size": "microbatch_tokens",
    "model": "base_model",
    "model_name_or_path": "base_model",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "global_batch_size",
    "pipeline_parallel_size": "parallel.pipeline",
    "rank": "r",
    "steps": "max_steps",
    "tensor_parallel_size": "parallel.tensor",
    "greater_is_better": "mode",
    "test_datasets": "val_datasets",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A check of one value, and what it accepts in words."""

    accepts: str
    check: Check

    def __call__(self, path: str, value: object) -> Any:
        """Return the value to store; UserError in one line that names `path` where the value is not accepted."""
        return self.check(path, value)


def accepts(words: str) -> Callable[[Check], Rule]:
    """Make the decorated check a rule that accepts `words`."""
    return lambda check: Rule(words, check)


def code(word: str) -> str:
    """Write a word as it stands in Markdown where it is to be typed."""
    return f"`{word}`"


def show(value: object) -> str:
    """Write a value as in YAML, on one line of at most 60 characters."""
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else repr(list(value) if isinstance(value, tuple) else value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def key_name(name: str) -> str:
    """Write a key that a user chose on one line, in quotes where it has characters that cannot be shown."""
    return one_line(name if name.isprintable() else repr(name), 60)


def whole_number(what: str, low: int, high: int | None = None) -> Rule:
    """Accept an int from `low` to `high`; `what` says what the number is, as in "a LoRA rank"."""
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"

    @accepts(f"a whole number {span}")
    def rule(path: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise UserError(f"{path}: {show(value)} is not {what}; use a whole number {span}")
        return value

    return rule


def number(what: str, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Accept a finite int or float from `low` to `high`; `above` and `below` exclude the ends."""
    if high == math.inf:
        span = f"above {low:g}" if above else f"of at least {low:g}"
    else:
        span = f"{'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"

    @accepts(f"a number {span}")
    def rule(path: str, value: object) -> float:
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not low <= value <= high
            or (above and value == low)
            or (below and value == high)
        ):
            quoted = "; it is text in quotes here" if isinstance(value, str) and _reads_as_number(value) else ""
            raise UserError(f"{path}: {show(value)} is not {what}; use a number {span}{quoted}")
        return float(value)

    return rule


def truth() -> Rule:
    """Accept true or false."""

    @accepts("true or false")
    def rule(path: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {show(value)} is neither true nor false; use one of the two, without quotes")
        return value

    return rule


def text(what: str) -> Rule:
    """Accept non-empty text."""

    @accepts(what)
    def rule(path: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            quote = ", in quotes" if isinstance(value, (int, float)) else ""
            raise UserError(f"{path}: {show(value)} is not {what}; write one as text{quote}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{path}: {show(value)} holds half of a character (a lone surrogate escape); remove it")
        return value

    return rule


def path_of(what: str) -> Rule:
    """Accept the path of something; a leading ~ becomes the user's home directory."""
    words = text(what)
    return Rule(what, lambda path, value: os.path.expanduser(words(path, value)))


def one_of(*choices: str) -> Rule:
    """Accept one of a few words, with a suggestion when another is close."""

    @accepts(" or ".join(map(code, choices)) if len(choices) < 3 else f"one of {', '.join(map(code, choices))}")
    def rule(path: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{path}: {show(value)} is unknown{suggest(value, choices)}; use {' or '.join(choices)}")
        return value

    return rule


def list_of(what: str, item: Rule, *, empty: bool = False) -> Rule:
    """Accept a list whose entries obey `item`; the result is a tuple."""

    @accepts(f"a list of {what}")
    def rule(path: str, value: object) -> tuple:
        if not isinstance(value, list) or (not value and not empty):
            raise UserError(f"{path}: {show(value)} is not a list of {what}; write [{what}, ...] with at least one entry")
        return tuple(item(f"{path}.{position}", entry) for position, entry in enumerate(value))

    return rule


def subset_of(what: str, choices: tuple[str, ...]) -> Rule:
    """Accept a non-empty list of distinct words out of `choices`; the result is in the order of `choices`."""
    words = list_of(what, one_of(*choices))

    @accepts(f"a list of any of {', '.join(map(code, choices))}")
    def rule(path: str, value: object) -> tuple[str, ...]:
        chosen = words(path, value)
        for word in chosen:
            if chosen.count(word) > 1:
                raise UserError(f"{path}: {word!r} is in the list twice; remove one of the two")
        return tuple(word for word in choices if word in chosen)

    return rule


def mapping_of(what: str) -> Rule:
    """Accept a mapping of names to values of YAML's own types."""

    @accepts(f"a mapping of {what} to values")
    def rule(path: str, value: object) -> dict[str, object]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{path}: {show(value)} is not a mapping of {what} to values; write {{name: value}}")
        return value

    return rule


def null_or(rule: Rule) -> Rule:
    """Accept null, or what `rule` accepts."""
    return Rule(f"{rule.accepts}, or null", lambda path, value: None if value is None else rule(path, value))


def auto_or(rule: Rule) -> Rule:
    """Accept `auto`, or what `rule` accepts."""

    @accepts(f"{rule.accepts}, or `auto`")
    def either(path: str, value: object) -> object:
        try:
            return "auto" if value == "auto" else rule(path, value)
        except UserError as error:
            raise UserError(f"{error}, or auto") from None

    return either


@accepts("1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or digit")
def job_name(path: str, value: object) -> str:
    """Accept a name that is safe as a folder name on any system."""
    if not isinstance(value, str) or not JOB_NAME.fullmatch(value):
        raise UserError(
            f"{path}: {show(value)} cannot name a job; use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return value


@accepts(f"`auto`, {', '.join(map(code, RECOMPUTE))}, or a list of the last {len(RECOMPUTE)}, one for each layer")
def recompute(path: str, value: object) -> str | tuple[str, ...]:
    """Accept auto, a recomputation policy for all layers, or a list of one for each layer of the model."""
    if isinstance(value, list):
        return list_of("policies, one per layer", one_of(*RECOMPUTE))(path, value)
    return one_of("auto", *RECOMPUTE)(path, value)


@accepts("`native`, `fp8`, or `{storage: bf16, fp8 or nf4, compute: bf16 or fp8}`, also written `nf4/bf16`")
def base_weights(path: str, value: object) -> str:
    """Return the word of a way to store and multiply the frozen weights."""
    if isinstance(value, dict):
        if unknown := value.keys() - {"storage", "compute"}:
            raise UserError(f"{path}.{key_name(min(unknown))}: unknown key; use storage and compute")
        storage = one_of("bf16", "fp8", "nf4")(f"{path}.storage", value.get("storage", "bf16"))
        pair = storage, one_of("bf16", "fp8")(f"{path}.compute", value.get("compute", "bf16"))
        return BASE_WEIGHTS[pair]
    return one_of(*BASE_WEIGHTS.values())(path, value)


def storage_and_compute(base_weights: str) -> tuple[str, str]:
    """Return what a word of base_weights stores and multiplies; bf16 stands for `precision`."""
    return next(pair for pair, word in BASE_WEIGHTS.items() if word == base_weights)


@accepts("0, a share above 0 and below 1, or a whole number")
def val_set_size(path: str, value: object) -> float | int:
    """Accept a share of a job's records, or a number of them."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    raise UserError(f"{path}: {show(value)} is no part of a job's records; use a share below 1 (0.02), a whole number of records, or 0")


def suggest(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" when one of the known words is close to `word`, else an empty string."""
    known = list(known)
    close = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=0.6)
    other = OTHER_WORDS.get(str(word).lower(), "")
    if other.split(".")[0] in known:
        close = [other]
    return f" (did you mean {close[0]}?)" if close else ""


def _reads_as_number(value: str) -> bool:
    """Whether text would be a number without its quotes."""
    try:
        float(value)
    except ValueError:
        return False
    return True
