"""A job's data: dataset files to samples, each with its tokens and the targets of the loss.

Records are numbered through a job's datasets in order, before anything is dropped; this number
identifies the sample. Records longer than `sequence_len` are cut at the right, and those that lose
all their targets are dropped. Both are counted.

    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct")
    first, second = load_jobs_data(config.jobs, tokenizer, cache_dir)       # a file that two jobs share is tokenised once
    first.samples[0].tokens[first.samples[0].targets]                        # the tokens it is trained to predict
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.chat_template import ChatSettings, chat_settings
from megatron_lora.data.length_records import LengthEncoder
from megatron_lora.data.row_files import read_records
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.steps import Sample
from megatron_lora.data.token_cache import Dataset, dataset_key, fetch, fingerprint, store
from megatron_lora.data.tokenizer import require_chat_template
from megatron_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class JobData:
    """A job's samples in file order; `num_truncated` of its records were cut, and `num_dropped` were left without a target and dropped.

    `notes` says how many records each note was made of (encoded.py).
    """

    samples: tuple[Sample, ...]
    num_records: int
    num_truncated: int
    num_dropped: int
    notes: Mapping[str, int]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(len(sample) for sample in self.samples)

    @property
    def num_targets(self) -> int:
        """Targets of all samples, over which an epoch's loss is averaged."""
        return sum(int(sample.targets.sum()) for sample in self.samples)

    def describe(self) -> str:
        """Describe the data in one line: samples, tokens, targets, cut and dropped records."""
        text = f"{len(self.samples):,} samples, {sum(self.lengths):,} tokens, {self.num_targets:,} targets"
        cut = f", {self.num_truncated:,} cut at sequence_len" if self.num_truncated else ""
        dropped = f", {self.num_dropped:,} dropped: no target before the cut" if self.num_dropped else ""
        noted = "".join(f"; {note} ({count:,} of {self.num_records:,} records)" for note, count in self.notes.items())
        return text + cut + dropped + noted


def load_jobs_data(
    jobs: Sequence[JobConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
    validation: bool = False,
) -> tuple[JobData, ...]:
    """Load the data of each job, or its validation data; a file that several jobs use with the same settings is read once.

    `tokenizer` may be None where all datasets are lengths, which need `vocab_size`. `cache_dir`
    None stores nothing on disk. A token that is not below `vocab_size`, the base model's, is a
    UserError.
    """
    reader = _Reader(tokenizer, cache_dir, vocab_size)
    return tuple(_load_job(job, reader, vocab_size, validation) for job in jobs)


class _Reader:
    """Gets tokenised datasets from memory, from the cache directory, or from their files."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, cache_dir: str | Path | None, vocab_size: int | None):
        self._tokenizer = tokenizer
        self._cache_dir = cache_dir
        self._vocab_size = vocab_size
        self._fingerprint = "" if tokenizer is None else fingerprint(tokenizer)
        self._datasets: dict[tuple[str, str, bool, int, ChatSettings], Dataset] = {}

    def read(self, job: JobConfig, dataset: DatasetConfig) -> Dataset:
        settings = (dataset.path, dataset.type, job.train_on_inputs, job.sequence_len, chat_settings(job))
        if settings not in self._datasets and dataset.type == "lengths":
            assert self._vocab_size is not None, "lengths become tokens of some vocabulary"
            self._datasets[settings] = tokenise(*settings[:2], LengthEncoder(self._vocab_size), *settings[2:4])
        elif settings not in self._datasets:
            assert self._tokenizer is not None, f"no tokenizer was loaded for {dataset.path}"
            require_chat_template(job, dataset, self._tokenizer)
            self._datasets[settings] = self._fetch(*settings)
        return self._datasets[settings]

    def _fetch(self, path: str, format: str, train_on_inputs: bool, sequence_len: int, chats: ChatSettings) -> Dataset:
        assert self._tokenizer is not None
        encoder = RecordEncoder(self._tokenizer, chats)
        if self._cache_dir is None or not Path(path).is_file():
            return tokenise(path, format, encoder, train_on_inputs, sequence_len)
        key = dataset_key(path, self._fingerprint, format, train_on_inputs, sequence_len, chats)
        dataset = fetch(self._cache_dir, key)
        if dataset is None:
            dataset = tokenise(path, format, encoder, train_on_inputs, sequence_len)
            try:
                store(self._cache_dir, key, dataset)
            except OSError as error:
                raise UserError(
                    f"{self._cache_dir}: tokenised data cannot be kept there ({error.strerror}); "
                    "set MEGATRON_LORA_CACHE to a directory that you may write, with space left"
                ) from None
        return dataset


def tokenise(path: str | Path, format: str, encoder: RecordEncoder | LengthEncoder, train_on_inputs: bool, sequence_len: int) -> Dataset:
    """Encode, cut and count the records of one file."""
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    notes: Counter[str] = Counter()
    num_records = num_truncated = num_dropped = 0
    for where, record in read_records(path):
        encoded = encoder.encode(record, format, train_on_inputs, where)
        notes.update(encoded.notes)
        cut_tokens, cut_targets = encoded.tokens[:sequence_len], encoded.targets[:sequence_len]
        if cut_targets.any():
            kept.append((num_records, cut_tokens, cut_targets))
            num_truncated += len(encoded.tokens) > sequence_len
        else:
            num_dropped += 1
        num_records += 1
    if not num_records:
        raise UserError(f"{path}: holds no records; give a file with at least one")
    return Dataset(
        tokens=np.concatenate([np.empty(0, np.int32), *(tokens for _, tokens, _ in kept)]),
        targets=np.concatenate([np.empty(0, bool), *(targets for _, _, targets in kept)]),
        offsets=np.cumsum([0, *(len(tokens) for _, tokens, _ in kept)], dtype=np.int64),
        records=np.array([number for number, _, _ in kept], dtype=np.int64),
        num_records=num_records,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        notes=dict(notes),
    )


def _load_job(job: JobConfig, reader: _Reader, vocab_size: int | None, validation: bool) -> JobData:
    """Concatenate the samples of a job's datasets."""
    key, configs = ("val_datasets", job.val_datasets or ()) if validation else ("datasets", job.datasets)
    samples: list[Sample] = []
    notes: Counter[str] = Counter()
    num_records = num_truncated = num_dropped = 0
    for config in configs:
        dataset = reader.read(job, config)
        _check_vocabulary(job, config, dataset, vocab_size)
        samples += [Sample(num_records + number, tokens, targets) for number, tokens, targets in dataset]
        num_records += dataset.num_records
        num_truncated += dataset.num_truncated
        num_dropped += dataset.num_dropped
        notes.update(dataset.notes)
    if configs and not samples:
        raise UserError(
            f"jobs.{job.name}.sequence_len: {job.sequence_len} leaves no target token in any of the {num_records} records of its {key}; "
            "raise it"
        )
    return JobData(tuple(samples), num_records, num_truncated, num_dropped, notes)


def digest_of(samples: Iterable[Sample]) -> str:
    """Return a SHA-256 of a job's samples, in their order: record numbers, tokens and targets."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.record} {len(sample.tokens)} ".encode())
        digest.update(sample.tokens.tobytes())
        digest.update(sample.targets.tobytes())
    return digest.hexdigest()


def _check_vocabulary(job: JobConfig, config: DatasetConfig, dataset: Dataset, vocab_size: int | None) -> None:
    """Raise UserError for tokens for which the base model has no embedding."""
    largest = int(dataset.tokens.max(initial=-1))
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"jobs.{job.name}.datasets: {config.path} gives token {largest} and base_model has {vocab_size}; "
            "use the tokenizer that belongs to the base model"
        )
