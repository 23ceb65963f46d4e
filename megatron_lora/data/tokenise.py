"""The records of one file or hub split to tokens: block after block, by several processes where there is much to do.

    builder = tokenise(source, "messages", encoder, train_on_inputs, sequence_len, drop_bad=False, builder=DatasetBuilder(directory))

The result does not depend on the number of processes. What takes long says on stderr how far it is.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_lora.data.chat_template import ChatSettings
from megatron_lora.data.dataset_sources import Source
from megatron_lora.data.length_records import LengthEncoder
from megatron_lora.data.row_files import Block
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.token_cache import Chunk, DatasetBuilder
from megatron_lora.data.worker_pool import map_in_order
from megatron_lora.environment import num_cores
from megatron_lora.errors import UserError

POOL_BYTES = 1 << 24  # of records: with fewer, starting processes takes longer than they save
MOST_NOTES = 50  # of one dataset; others are counted together
MOST_BAD_KINDS, BAD_OF_A_KIND = 20, 3  # listed
FIRST_WORD_S, NEXT_WORD_S = 5.0, 15.0
Encoder = RecordEncoder | LengthEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What of a job's config decides its tokens, besides the tokenizer."""

    format: str
    train_on_inputs: bool
    sequence_len: int
    chats: ChatSettings


def tokenise(source: Source, settings: Settings, encoder: Encoder, drop_bad: bool, builder: DatasetBuilder, *, pool: bool) -> None:
    """Encode, cut and count all records of a source; UserError for a bad one unless they are dropped. `pool`: processes may help."""
    work = partial(encode_block, encoder, settings, str(source), drop_bad)
    workers = num_cores() if pool and source.num_bytes() >= POOL_BYTES else 1
    progress = _Progress(str(source))
    blocks = source.blocks()
    for block, chunk in map_in_order(work, blocks, workers) if workers > 1 else ((block, work(block)) for block in blocks):
        if isinstance(chunk, UserError):
            raise chunk
        builder.add(chunk)
        progress.tell(block.done)
    if not builder.num_records:
        raise UserError(f"{source}: holds no records; give a file with at least one")
    _shorten(builder)


def encode_block(encoder: Encoder, settings: Settings, source: str, drop_bad: bool, block: Block) -> Chunk | UserError:
    """Encode, cut and count consecutive records; returns the first bad one's error unless they are dropped."""
    tokens, targets, records, kept_ones = [np.empty(0, np.int32)], [np.empty(0, bool)], [], []
    notes: Counter[str] = Counter()
    bad: list[str] = []
    counts = Counter(num_records=0, num_truncated=0, num_dropped=0, num_bad=0)
    for number, (where, record) in enumerate(block.rows()):
        counts["num_records"] += 1
        try:
            if isinstance(record, UserError):
                raise record
            encoded = encoder.encode(record, settings.format, settings.train_on_inputs, where)
        except UserError as error:
            if not drop_bad:
                return error
            counts["num_bad"] += 1
            bad.append(str(error).removeprefix(source))
            continue
        notes.update(encoded.notes)
        kept = encoded.cut(settings.sequence_len)
        if kept.trains:
            tokens.append(kept.tokens)
            targets.append(kept.targets)
            records.append(number)
            kept_ones.append((kept.border, kept.num_prompt, kept.weight))
            counts["num_truncated"] += kept is not encoded
        else:
            counts["num_dropped"] += 1
    return Chunk(
        tokens=np.concatenate(tokens),
        targets=np.concatenate(targets),
        lengths=np.array([len(part) for part in tokens[1:]], dtype=np.int64),
        records=np.array(records, dtype=np.int64),
        borders=np.array([border for border, _, _ in kept_ones], dtype=np.int32),
        num_prompt=np.array([num_prompt for _, num_prompt, _ in kept_ones], dtype=np.int32),
        weights=np.array([weight for _, _, weight in kept_ones], dtype=np.float32),
        counts=counts,
        notes=notes,
        bad=first_of_each_kind(bad),
    )


def first_of_each_kind(errors: Iterable[str]) -> list[str]:
    """Keep the first errors of each kind, in their order. Errors of a kind name the same field and the same remedy."""
    kept: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for error in errors:
        field = re.search(r"'[^']*'", error)
        kind = (field[0] if field else "", error.rpartition("; ")[2])
        if seen[kind] < BAD_OF_A_KIND and (kind in seen or len(seen) < MOST_BAD_KINDS):
            kept.append(error)
            seen[kind] += 1
    return kept


def _shorten(builder: DatasetBuilder) -> None:
    """Keep what a header has room for: the first bad records of each kind, and the most frequent notes."""
    builder.bad = first_of_each_kind(builder.bad)
    frequent = builder.notes.most_common(MOST_NOTES)
    others = builder.notes.total() - sum(count for _, count in frequent)
    builder.notes = Counter(dict(frequent)) + Counter({"other notes": others})


class _Progress:
    """Says how far the reading of a source is, and how long the rest will take."""

    def __init__(self, source: str):
        self._source = source
        self._start = time.monotonic()
        self._next_s = FIRST_WORD_S

    def tell(self, done: float) -> None:
        """Print a line if the last one is long ago."""
        seconds = time.monotonic() - self._start
        if seconds < self._next_s or not 0 < done < 1:
            return
        self._next_s = seconds + NEXT_WORD_S
        left = seconds / done - seconds
        print(f"{self._source}: {done:.0%} tokenised, about {left // 60:.0f} min {left % 60:.0f} s left", file=sys.stderr, flush=True)
