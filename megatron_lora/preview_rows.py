"""What a job will be trained on, for human eyes: a few rows as text, with what the loss sees set apart.

for row in preview_rows(job, load_tokenizer(base_model), num_rows=3):
    print(show_preview(row, color=sys.stdout.isatty()))
"""

import dataclasses
import itertools

from transformers import PreTrainedTokenizerBase

from megatron_lora.config import JobConfig
from megatron_lora.data import require_chat_template
from megatron_lora.formats import RowEncoder
from megatron_lora.rows import read_rows

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


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
