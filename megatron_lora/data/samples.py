"""A job's data: files of rows to samples of tokens with the targets of the loss.

Rows are numbered through a job's datasets in order, before anything is dropped; that number is the sample's id. Rows longer than
`sequence_len` are cut at the right; those that lose all their targets are dropped. Both are counted.

    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct")
    first, second = load_jobs_data(config.jobs, tokenizer, cache_dir)       # a file that two jobs share is tokenised once
    first.samples[0].tokens[first.samples[0].targets]                        # the tokens it is trained to predict
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.length_rows import LengthEncoder
from megatron_lora.data.row_files import read_rows
from megatron_lora.data.row_formats import RowEncoder
from megatron_lora.data.token_cache import Dataset, dataset_key, fetch, fingerprint, store
from megatron_lora.data.tokenizer import require_chat_template
from megatron_lora.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One row as trained. targets[i] says that token i is predicted, from the tokens before it; targets[0] is False."""

    row: int
    tokens: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class JobData:
    """A job's samples in file order; of its rows, `num_truncated` are kept but cut and `num_dropped` lost all targets to the cut."""

    samples: tuple[Sample, ...]
    num_truncated: int
    num_dropped: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(len(sample) for sample in self.samples)

    @property
    def num_targets(self) -> int:
        """Targets of all samples: what an epoch's losses are averaged over."""
        return sum(int(sample.targets.sum()) for sample in self.samples)

    def describe(self) -> str:
        """Say in one line what there is, what was cut and what was dropped."""
        text = f"{len(self.samples):,} samples, {sum(self.lengths):,} tokens, {self.num_targets:,} targets"
        cut = f", {self.num_truncated:,} cut at sequence_len" if self.num_truncated else ""
        return text + cut + (f", {self.num_dropped:,} dropped: no target before the cut" if self.num_dropped else "")


def load_jobs_data(
    jobs: Sequence[JobConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
    validation: bool = False,
) -> tuple[JobData, ...]:
    """Load the data of each job, or its validation data; files that several jobs use alike are read once.

    `tokenizer` may be None where all datasets are lengths. `cache_dir` None keeps nothing on disk. `vocab_size`, when given, is the base
    model's: a token beyond it is a UserError; lengths need it.
    """
    reader = _Reader(tokenizer, cache_dir, vocab_size)
    return tuple(_load_job(job, reader, vocab_size, validation) for job in jobs)


def load_job_data(
    job: JobConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
    validation: bool = False,
) -> JobData:
    """Load the data of one job; see load_jobs_data."""
    return load_jobs_data([job], tokenizer, cache_dir, vocab_size, validation)[0]


class _Reader:
    """Gets tokenised datasets from memory, from the cache directory, or from their files."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, cache_dir: str | Path | None, vocab_size: int | None):
        self._tokenizer, self._cache_dir, self._vocab_size = tokenizer, cache_dir, vocab_size
        self._encoder = None if tokenizer is None else RowEncoder(tokenizer)
        self._print = "" if tokenizer is None else fingerprint(tokenizer)
        self._read: dict[tuple[str, str, bool, int], Dataset] = {}

    def read(self, job: JobConfig, dataset: DatasetConfig) -> Dataset:
        what = (dataset.path, dataset.type, job.train_on_inputs, job.sequence_len)
        if what not in self._read and dataset.type == "lengths":
            assert self._vocab_size is not None, "lengths become tokens of some vocabulary"
            self._read[what] = tokenise(dataset.path, dataset.type, LengthEncoder(self._vocab_size), job.train_on_inputs, job.sequence_len)
        elif what not in self._read:
            assert self._tokenizer is not None, f"no tokenizer was loaded for {dataset.path}"
            require_chat_template(job.name, dataset, self._tokenizer)
            self._read[what] = self._fetch(*what)
        return self._read[what]

    def _fetch(self, path: str, format: str, train_on_inputs: bool, sequence_len: int) -> Dataset:
        assert self._encoder is not None
        if self._cache_dir is None or not Path(path).is_file():
            return tokenise(path, format, self._encoder, train_on_inputs, sequence_len)
        key = dataset_key(path, self._print, format, train_on_inputs, sequence_len)
        dataset = fetch(self._cache_dir, key)
        if dataset is None:
            dataset = tokenise(path, format, self._encoder, train_on_inputs, sequence_len)
            try:
                store(self._cache_dir, key, dataset)
            except OSError as error:
                raise UserError(
                    f"{self._cache_dir}: tokenised data cannot be kept there ({error.strerror}); "
                    "set MEGATRON_LORA_CACHE to a directory that you may write, with space left"
                ) from None
        return dataset


def tokenise(path: str | Path, format: str, encoder: RowEncoder | LengthEncoder, train_on_inputs: bool, sequence_len: int) -> Dataset:
    """Encode, cut and count the rows of one file."""
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    num_rows = num_truncated = num_dropped = 0
    for where, row in read_rows(path):
        tokens, targets = encoder.encode(row, format, train_on_inputs, where)
        cut_tokens, cut_targets = tokens[:sequence_len], targets[:sequence_len]
        if cut_targets.any():
            kept.append((num_rows, cut_tokens, cut_targets))
            num_truncated += len(tokens) > sequence_len
        else:
            num_dropped += 1
        num_rows += 1
    if not num_rows:
        raise UserError(f"{path}: holds no rows; give a file with at least one")
    return Dataset(
        tokens=np.concatenate([np.empty(0, np.int32), *(tokens for _, tokens, _ in kept)]),
        targets=np.concatenate([np.empty(0, bool), *(targets for _, _, targets in kept)]),
        offsets=np.cumsum([0, *(len(tokens) for _, tokens, _ in kept)], dtype=np.int64),
        rows=np.array([row for row, _, _ in kept], dtype=np.int64),
        num_rows=num_rows,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
    )


def _load_job(job: JobConfig, reader: _Reader, vocab_size: int | None, validation: bool) -> JobData:
    """Concatenate a job's datasets."""
    key, configs = ("val_datasets", job.val_datasets or ()) if validation else ("datasets", job.datasets)
    samples: list[Sample] = []
    num_rows = num_truncated = num_dropped = 0
    for config in configs:
        dataset = reader.read(job, config)
        _check_vocabulary(job, config, dataset, vocab_size)
        samples += [Sample(num_rows + row, tokens, targets) for row, tokens, targets in dataset]
        num_rows += dataset.num_rows
        num_truncated += dataset.num_truncated
        num_dropped += dataset.num_dropped
    if configs and not samples:
        raise UserError(
            f"jobs.{job.name}.sequence_len: {job.sequence_len} leaves no target token in any of the {num_rows} rows of its {key}; raise it"
        )
    return JobData(tuple(samples), num_truncated, num_dropped)


def digest_of(samples: Iterable[Sample]) -> str:
    """Return a SHA-256 of a job's samples, in their order: rows, tokens and targets."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.row} {len(sample.tokens)} ".encode())
        digest.update(sample.tokens.tobytes())
        digest.update(sample.targets.tobytes())
    return digest.hexdigest()


def _check_vocabulary(job: JobConfig, config: DatasetConfig, dataset: Dataset, vocab_size: int | None) -> None:
    """Refuse tokens for which the base model has no embedding."""
    largest = int(dataset.tokens.max(initial=-1))
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"jobs.{job.name}.datasets: {config.path} gives token {largest} and base_model has {vocab_size}; "
            "use the tokenizer that belongs to the base model"
        )
