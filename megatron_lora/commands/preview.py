"""What `megatron-lora preview` says: a few rows of a job as the trainer will see them, the targets of its loss set apart."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING

from megatron_lora.config.rules import suggest
from megatron_lora.config.schema import JobConfig, load_config
from megatron_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


def main(config_path: str, overrides: list[str], job_name: str, num_samples: int) -> int:
    """Print the first rows of a job, targets in green on a terminal and between « and » elsewhere; returns 0."""
    if num_samples < 1:
        raise UserError(f"--samples: {num_samples} is too few; use a whole number of at least 1")
    config = load_config(config_path, overrides)
    jobs = {job.name: job for job in config.jobs}
    if job_name not in jobs:
        raise UserError(f"--job: no job is called {job_name!r}{suggest(job_name, jobs)}; the jobs are {', '.join(jobs)}")
    from megatron_lora.commands.checks import check_files
    from megatron_lora.data.tokenizer import load_tokenizer
    from megatron_lora.huggingface.hub import resolve_base_model

    check_files(config)
    for dataset in jobs[job_name].datasets:
        if dataset.type == "lengths":
            raise UserError(f"--job: {job_name!r} trains on random tokens of the lengths in {dataset.path!r}, which are no text to show")
    for row in preview_rows(jobs[job_name], load_tokenizer(resolve_base_model(config.base_model)), num_samples):
        print(show_preview(row, color=sys.stdout.isatty()))
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRow:
    """A row as trained, in runs of (is target, text). `num_tokens` counts what is kept of `num_tokens_written`."""

    where: str
    row: int
    runs: tuple[tuple[bool, str], ...]
    token_texts: tuple[tuple[int, str, bool], ...]  # (token, its text, is target)
    num_tokens_written: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_texts)

    @property
    def num_targets(self) -> int:
        return sum(target for _, _, target in self.token_texts)


def preview_rows(job: JobConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int = 3) -> tuple[PreviewRow, ...]:
    """Encode the first rows of a job's datasets exactly as training does; UserError as in loading."""
    from megatron_lora.data.row_files import read_rows
    from megatron_lora.data.row_formats import RowEncoder
    from megatron_lora.data.tokenizer import require_chat_template

    encoder = RowEncoder(tokenizer)
    preview: list[PreviewRow] = []
    for dataset in job.datasets:
        require_chat_template(job.name, dataset, tokenizer)
        for where, row in itertools.islice(read_rows(dataset.path), num_rows - len(preview)):
            tokens, targets = encoder.encode(row, dataset.type, job.train_on_inputs, where)
            kept = list(zip(tokens[: job.sequence_len].tolist(), targets[: job.sequence_len].tolist(), strict=True))
            runs = [
                (target, tokenizer.decode([token for token, _ in run])) for target, run in itertools.groupby(kept, key=lambda pair: pair[1])
            ]
            texts = [(token, tokenizer.decode([token]), target) for token, target in kept]
            preview.append(
                PreviewRow(where=where, row=len(preview), runs=tuple(runs), token_texts=tuple(texts), num_tokens_written=len(tokens))
            )
        if len(preview) == num_rows:
            break
    return tuple(preview)


def show_preview(row: PreviewRow, color: bool) -> str:
    """Lay out a row: a heading, then its text with targets in green, or between « and » without colour."""
    opening, closing = (GREEN, PLAIN) if color else ("«", "»")
    cut = f", cut from {row.num_tokens_written}" if row.num_tokens < row.num_tokens_written else ""
    dropped = "; dropped, for the cut leaves no target" if not row.num_targets else ""
    heading = f"{row.where} (row {row.row}): {row.num_tokens} tokens{cut}, {row.num_targets} targets{dropped}"
    text = "".join(f"{opening}{text}{closing}" if target else text for target, text in row.runs)
    return f"{heading}\n{text}\n"
