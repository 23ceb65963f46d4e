"""The tokenizer of a base model: loaded from its directory, and refused where it cannot serve.

Samples need its character offsets, so only fast tokenizers are taken:

    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct")
    tokenizer = tokenizer_for(config.jobs, model_dir)       # None where no dataset needs one
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.row_formats import CHAT_TYPES
from megatron_lora.errors import UserError


def load_tokenizer(base_model: str | Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a base model's directory; UserError when there is none."""
    directory = Path(base_model)
    if not directory.is_dir():
        raise UserError(f"base_model: {base_model} is not a directory; give the directory that holds the model and its tokenizer")
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            whole = isinstance(json.loads(file.read_bytes()), dict)
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"base_model: {file} is damaged; copy it again from where the model came from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers reads the model's files with hardly a check of its own: whatever it raises is about them
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"base_model: the tokenizer in {directory} cannot be loaded ({said}); add the model's tokenizer.json") from None
    if not tokenizer.is_fast:
        raise UserError(f"base_model: the tokenizer in {directory} gives no character offsets; add the model's tokenizer.json")
    tokenizer.model_max_length = 2**60  # rows are cut by sequence_len, here, so a warning about it would only mislead
    return tokenizer


def tokenizer_for(jobs: Iterable[JobConfig], base_model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that the jobs' datasets need; None where all of them are lengths."""
    needed = any(dataset.type != "lengths" for job in jobs for dataset in job.datasets)
    return load_tokenizer(base_model) if needed else None


def require_chat_template(job: str, dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations for a tokenizer that has no chat template, or several and none of them the default."""
    if dataset.type not in CHAT_TYPES:
        return
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"jobs.{job}.datasets: {dataset.path} is of type {dataset.type} and the base model's tokenizer has no chat template; "
            "use an instruct model, or data of type prompt_completion"
        ) from None
