"""The tokenizer of a base model, loaded from its directory; one that cannot be used is refused.

Targets are found by character offsets, which only fast tokenizers give:

    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct")
    tokenizer = tokenizer_for(config.jobs, model_dir)       # None where no dataset needs one
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.chat_template import GIVEN_TO_TEMPLATES, ChatTemplate, chat_settings
from megatron_lora.data.named_templates import NAMED_TEMPLATES
from megatron_lora.data.row_formats import TEMPLATE_TYPES
from megatron_lora.data.tokenizer_checks import check_spaces
from megatron_lora.errors import UserError
from megatron_lora.files import check_regular


def load_tokenizer(base_model: str | Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a base model's directory; UserError when there is none."""
    directory = Path(base_model)
    if not directory.is_dir():
        raise UserError(f"base_model: {base_model} is not a directory; give the directory that holds the model and its tokenizer")
    check_regular(directory)
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            is_object = isinstance(json.loads(file.read_bytes()), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise UserError(f"base_model: {file} is damaged; copy it again from where the model came from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # unsaid, it asks, and a `y` runs code of the model
    except Exception as error:  # transformers hardly checks the files that it reads: whatever it raises is about them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"base_model: the tokenizer in {directory} cannot be loaded ({reason}); add the model's tokenizer.json") from None
    tokenizer.model_max_length = 2**60  # records are cut at sequence_len, so a warning about this length would mislead
    if not tokenizer.is_fast:
        raise UserError(f"base_model: the tokenizer in {directory} gives no character offsets; add the model's tokenizer.json")
    check_spaces(tokenizer, directory)
    return tokenizer


def tokenizer_for(jobs: Iterable[JobConfig], base_model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that the jobs' datasets need; None where all of them are lengths."""
    needed = any(dataset.type != "lengths" for job in jobs for dataset in (*job.datasets, *job.val_datasets))
    return load_tokenizer(base_model) if needed else None


def require_chat_template(job: JobConfig, dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for conversations when there is no chat template, several without a default, or kwargs that it does not use."""
    if dataset.type not in TEMPLATE_TYPES:
        return
    template = ChatTemplate(tokenizer, chat_settings(job))
    for name in GIVEN_TO_TEMPLATES & (job.chat_template_kwargs or {}).keys():
        raise UserError(f"jobs.{job.name}.chat_template_kwargs: {name!r} is given to every chat template; remove it")
    try:
        unknown = template.unknown()
    except ValueError:
        raise UserError(
            f"jobs.{job.name}.datasets: {dataset.path} is of type {dataset.type} and the base model's tokenizer has no chat template; "
            f"use an instruct model, data of type prompt_completion, or set jobs.{job.name}.chat_template to a file or one of "
            f"{', '.join(NAMED_TEMPLATES)}"
        ) from None
    if unknown:
        raise UserError(
            f"jobs.{job.name}.chat_template_kwargs: the chat template does not use {unknown[0]!r}; remove it, or correct its name"
        )
