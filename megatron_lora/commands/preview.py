"""What `megatron-lora preview` prints: a few records of a job as the trainer sees them, with the targets of the loss marked."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, cast

from megatron_lora.config.rules import suggest
from megatron_lora.config.schema import JobConfig, load_config
from megatron_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_lora.data.encoded import Encoded

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


def main(config_path: str, overrides: list[str], job_name: str, num_samples: int) -> int:
    """Print the first records of a job, targets in green on a terminal and between « and » elsewhere, and what is wrong with others.

    Returns 0; UserError where a bad record would fail the job.
    """
    if num_samples < 1:
        raise UserError(f"--samples: {num_samples} is too few; use a whole number of at least 1")
    config = load_config(config_path, overrides)
    jobs = {job.name: job for job in config.jobs}
    if job_name not in jobs:
        raise UserError(f"--job: no job is called {job_name!r}{suggest(job_name, jobs)}; the jobs are {', '.join(jobs)}")
    from megatron_lora.commands.checks import check_files
    from megatron_lora.data.samples import read_all_records
    from megatron_lora.data.token_cache import cache_dir
    from megatron_lora.data.tokenizer import load_tokenizer
    from megatron_lora.data.tokenizer_checks import doubts_of
    from megatron_lora.huggingface.hub import resolve_base_model

    check_files(config)
    for dataset in jobs[job_name].datasets:
        if dataset.type == "lengths":
            raise UserError(f"--job: {job_name!r} trains on random tokens of the lengths in {dataset.path!r}, which are no text to show")
    job, tokenizer = jobs[job_name], load_tokenizer(resolve_base_model(config.base_model))
    for record in preview_records(job, tokenizer, num_samples):
        print(show_preview(record, color=sys.stdout.isatty()))
    data = read_all_records(job, tokenizer, cache_dir())
    print(f"{job_name}: {data.describe()}", *doubts_of(tokenizer), sep="\n")
    if data.num_bad:
        print(f"bad records, the first of each kind:\n{chr(10).join(data.bad)}")
    if data.num_bad and job.bad_rows == "refuse":
        raise UserError(data.bad[0])
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRecord:
    """A record as trained, in spans of (is target, text). `num_tokens` of its `num_tokens_uncut` tokens are kept."""

    where: str
    record: int
    spans: tuple[tuple[bool, str], ...]
    token_texts: tuple[tuple[int, str, bool], ...]  # (token, its text, is target)
    num_tokens_uncut: int
    trains: bool
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_texts)

    @property
    def num_targets(self) -> int:
        return sum(target for _, _, target in self.token_texts)


def preview_records(job: JobConfig, tokenizer: PreTrainedTokenizerBase, num_records: int = 3) -> tuple[PreviewRecord, ...]:
    """Encode the first good records of a job's datasets exactly as training does."""
    from megatron_lora.data.chat_template import chat_settings
    from megatron_lora.data.dataset_sources import sources_of
    from megatron_lora.data.row_formats import RecordEncoder
    from megatron_lora.data.tokenizer import require_chat_template

    encoder = RecordEncoder(tokenizer, chat_settings(job))
    preview: list[PreviewRecord] = []
    number = 0
    for position, dataset in enumerate(job.datasets):
        require_chat_template(job, dataset, tokenizer)
        for source in sources_of(dataset, f"jobs.{job.name}.datasets.{position}.path"):
            for where, record in (row for block in source.blocks() for row in block.rows()):
                number += 1
                if isinstance(record, UserError):
                    continue
                try:
                    encoded = encoder.encode(record, dataset.type, job.train_on_inputs, where)
                except UserError:
                    continue  # listed with all others of its kind
                preview.append(_preview_record(job, tokenizer, where, number - 1, encoded))
                if len(preview) == num_records:
                    return tuple(preview)
    return tuple(preview)


def _preview_record(job: JobConfig, tokenizer: PreTrainedTokenizerBase, where: str, number: int, encoded: Encoded) -> PreviewRecord:
    """Cut a record and turn its tokens back into text."""

    def text_of(tokens: list[int]) -> str:
        return cast(str, tokenizer.decode(tokens))  # a list of texts is what lists of lists give

    cut = encoded.cut(job.sequence_len)
    kept = list(zip(cut.tokens.tolist(), cut.targets.tolist(), strict=True))
    spans: list[tuple[bool, str]] = []
    label = ("desirable: " if cut.weight > 0 else "undesirable: ") if cut.num_prompt else ""
    for name, part in (("chosen: ", kept[: cut.border]), ("\nrejected: ", kept[cut.border :])) if cut.border else ((label, kept),):
        spans += [(False, name)] if name else []
        spans += [(target, text_of([token for token, _ in span])) for target, span in itertools.groupby(part, key=lambda pair: pair[1])]
    return PreviewRecord(
        where=where,
        record=number,
        spans=tuple(spans),
        token_texts=tuple((token, text_of([token]), target) for token, target in kept),
        num_tokens_uncut=len(encoded.tokens),
        trains=cut.trains,
        notes=(*encoded.notes, *[f"weight {abs(encoded.weight):g}"][: abs(encoded.weight) != 1]),
    )


def show_preview(record: PreviewRecord, color: bool) -> str:
    """Lay out a record: a heading, then its text with targets in green, or between « and » without colour."""
    opening, closing = (GREEN, PLAIN) if color else ("«", "»")
    cut = f", cut from {record.num_tokens_uncut}" if record.num_tokens < record.num_tokens_uncut else ""
    left = "two answers that are the same" if record.num_targets else "no target"
    dropped = "" if record.trains else f"; dropped, because the cut leaves {left}"
    noted = "".join(f"; {note}" for note in record.notes)
    heading = f"{record.where} (record {record.record}): {record.num_tokens} tokens{cut}, {record.num_targets} targets{dropped}{noted}"
    text = "".join(f"{opening}{text}{closing}" if target else text for target, text in record.spans)
    return f"{heading}\n{text}\n"
