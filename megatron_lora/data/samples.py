"""A job's data: dataset files to samples, each with its tokens and the targets of the loss.

Records are numbered through a job's datasets in order, before anything is dropped; this number
identifies the sample. Records longer than `sequence_len` are cut at the right, and those that lose
all their targets are dropped. Both are counted. Records that cannot be trained on fail the job, or
with `bad_rows: drop` are counted and listed. Validation data, from `val_datasets` or drawn out of the
job's own (evaluation.py), are read in the same way.

    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct")
    first, second = load_jobs_data(config.jobs, tokenizer, cache_dir)       # a file that two jobs share is tokenised once
    first.samples[0].tokens[first.samples[0].targets]                        # the tokens it is trained to predict
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.config.rules import show
from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.chat_template import chat_settings
from megatron_lora.data.dataset_sources import Source, sources_of
from megatron_lora.data.evaluation import draw_validation
from megatron_lora.data.length_records import LengthEncoder
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.sample_arrays import JobSamples, Samples, digest_of
from megatron_lora.data.steps import Mixture
from megatron_lora.data.token_cache import Dataset, DatasetBuilder, dataset_key, fetch, fingerprint, hold, store
from megatron_lora.data.tokenise import Settings, tokenise
from megatron_lora.data.tokenizer import require_chat_template
from megatron_lora.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobData:
    """A job's samples in file order; `num_truncated` of its records were cut, and `num_dropped` were left without a target and dropped.

    `notes` says how many records each note was made of (encoded.py). `num_bad` records were left
    out because they cannot be trained on; `bad` has the errors of the first of each kind. `validation`
    has no part in the steps; with `val_set_size` the counts are of all records, its own included.
    """

    samples: Samples
    mixture: Mixture
    num_records: int
    num_truncated: int = 0
    num_dropped: int = 0
    num_bad: int = 0
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bad: tuple[str, ...] = ()
    validation: JobData | None = None

    @classmethod
    def of(cls, samples: Samples) -> JobData:
        """Take samples as the data of a job."""
        return cls(samples=samples, mixture=Mixture((len(samples),), (1.0,)), num_records=len(samples))

    def digest(self) -> str:
        """Return a hash of what decides steps and evaluations: the samples, how they are mixed where weights are set, and validation's."""
        digest = digest_of(self.samples)
        if set(self.mixture.weights) != {1.0}:
            digest = hashlib.sha256(f"{digest} {self.mixture}".encode()).hexdigest()
        if self.validation is not None:
            digest = hashlib.sha256(f"{digest} validation {self.validation.digest()}".encode()).hexdigest()
        return digest

    def steps_of(self, job: JobConfig) -> JobSamples:
        """Return the samples in the steps that a job's config asks for."""
        return JobSamples.of(job, self.samples, self.mixture)

    @property
    def validation_samples(self) -> Samples:
        """What the job is evaluated on; none without validation data."""
        return self.validation.samples if self.validation else Samples([])

    @property
    def num_targets(self) -> int:
        """Targets of all samples, over which an epoch's loss is averaged."""
        return int(self.samples.num_targets.sum())

    def describe(self) -> str:
        """Describe the data in one line: samples, tokens, targets, cut and dropped records."""
        has_pairs = bool(self.samples.borders.any())
        kind, equal = ("pairs", ", or two answers that are the same") if has_pairs else ("samples", "")
        text = f"{len(self.samples):,} {kind}, {self.samples.lengths.sum():,} tokens, {self.num_targets:,} targets"
        mixed = self.mixture.num_copies != len(self.samples)
        drawn = f", of which an epoch takes {self.mixture.num_copies:,} by their sampling_weight" if mixed else ""
        cut = f", {self.num_truncated:,} cut at sequence_len" if self.num_truncated else ""
        dropped = f", {self.num_dropped:,} dropped: no target before the cut{equal}" if self.num_dropped else ""
        bad = f", {self.num_bad:,} bad records left out, as {'; '.join(self.bad[:1])}" if self.num_bad else ""
        noted = "".join(f"; {note} ({count:,} of {self.num_records:,} records)" for note, count in self.notes.items())
        validation = "" if self.validation is None else f"; for validation {self.validation.describe()}"
        return text + drawn + cut + dropped + bad + noted + validation


def load_jobs_data(
    jobs: Sequence[JobConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
) -> tuple[JobData, ...]:
    """Load the data of each job, with its validation data; a file that several jobs use with the same settings is read once.

    `tokenizer` may be None where all datasets are lengths, which need `vocab_size`. `cache_dir`
    None keeps nothing on disk. A token that is not below `vocab_size`, the base model's, is a
    UserError.
    """
    found = try_jobs_data(jobs, tokenizer, cache_dir, vocab_size)
    for data in found:
        if isinstance(data, UserError):
            raise data
    return tuple(data for data in found if isinstance(data, JobData))


def try_jobs_data(
    jobs: Sequence[JobConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    vocab_size: int | None = None,
) -> tuple[JobData | UserError, ...]:
    """Load as `load_jobs_data` does; a job whose data cannot be used gets the error that says why."""
    reader = _Reader(tokenizer, cache_dir, vocab_size)
    found: list[JobData | UserError] = []
    for job in jobs:
        try:
            found.append(_load_job(job, reader, vocab_size))
        except UserError as error:
            found.append(error)
    return tuple(found)


def read_all_records(job: JobConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> JobData:
    """Load a job's data as `bad_rows: drop` does, even if nothing is left then: what `preview` tells of all records."""
    dropping, reader = dataclasses.replace(job, bad_rows="drop"), _Reader(tokenizer, cache_dir, None)
    data = _gather(dropping, reader, None, "datasets", job.datasets)
    if job.val_datasets:
        return dataclasses.replace(data, validation=_gather(dropping, reader, None, "val_datasets", job.val_datasets))
    return _split(job, data) if job.val_set_size else data


class _Reader:
    """Gets tokenised datasets from memory, from the cache directory, or from their files."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, cache_dir: str | Path | None, vocab_size: int | None):
        self._tokenizer = tokenizer
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._vocab_size = vocab_size
        self._fingerprint = "" if tokenizer is None else fingerprint(tokenizer)
        self._datasets: dict[tuple[Source, Settings], Dataset] = {}
        self._errors: dict[tuple[Source, Settings, str], UserError] = {}

    def read(self, job: JobConfig, config: DatasetConfig, source: Source) -> Dataset:
        """Get a source's dataset; UserError for a bad record unless the job drops those."""
        if self._tokenizer is not None:
            require_chat_template(job, config, self._tokenizer)
        settings = Settings(
            format=config.type, train_on_inputs=job.train_on_inputs, sequence_len=job.sequence_len, chats=chat_settings(job)
        )
        if (source, settings) not in self._datasets:
            refused = source, settings, job.bad_rows
            if refused in self._errors:
                raise self._errors[refused]
            try:
                self._datasets[source, settings] = self._get(job, source, settings)
            except UserError as error:
                self._errors[refused] = error
                raise
        dataset = self._datasets[source, settings]
        if dataset.num_bad and job.bad_rows == "refuse":
            raise UserError(f"{source}{dataset.bad[0]}")
        return dataset

    def _get(self, job: JobConfig, source: Source, settings: Settings) -> Dataset:
        if settings.format == "lengths":
            assert self._vocab_size is not None, "lengths become tokens of some vocabulary"
            return hold(_tokenised(source, settings, LengthEncoder(self._vocab_size), job, None))
        assert self._tokenizer is not None, f"no tokenizer was loaded for {source}"
        encoder = RecordEncoder(self._tokenizer, settings.chats)
        content = source.digest() if self._cache_dir is not None else ""
        if self._cache_dir is None or not content:
            return hold(_tokenised(source, settings, encoder, job, None))
        key = dataset_key(content, self._fingerprint, *dataclasses.astuple(settings))
        dataset = fetch(self._cache_dir, key)
        if dataset is not None:
            return dataset
        try:
            return store(self._cache_dir, key, _tokenised(source, settings, encoder, job, self._cache_dir))
        except OSError as error:
            raise UserError(
                f"{self._cache_dir}: tokenised data cannot be kept there ({error.strerror}); "
                "set MEGATRON_LORA_CACHE to a directory that you may write, with space left"
            ) from None


def _tokenised(
    source: Source, settings: Settings, encoder: RecordEncoder | LengthEncoder, job: JobConfig, directory: Path | None
) -> DatasetBuilder:
    builder = DatasetBuilder(directory)
    pool = isinstance(encoder, RecordEncoder)  # lengths are numbered through their file
    tokenise(source, settings, encoder, job.bad_rows == "drop", builder, pool=pool)
    return builder


def _load_job(job: JobConfig, reader: _Reader, vocab_size: int | None) -> JobData:
    """Load a job's training and validation data, of both of which at least one sample must be left."""
    data = _gather_some(job, reader, vocab_size, "datasets", job.datasets)
    if job.val_datasets:
        return dataclasses.replace(data, validation=_gather_some(job, reader, vocab_size, "val_datasets", job.val_datasets))
    if not job.val_set_size:
        return data
    data = _split(job, data)
    for samples, use in ((data.samples, "to train on"), (data.validation_samples, "for validation")):
        if not len(samples):
            raise UserError(
                f"jobs.{job.name}.val_set_size: {show(job.val_set_size)} of {data.num_records} records leaves no sample {use}; "
                "use another number, or give val_datasets"
            )
    return data


def _split(job: JobConfig, data: JobData) -> JobData:
    """Move the samples of the records that `val_set_size` draws to the validation data."""
    is_drawn = draw_validation(data.num_records, job.val_set_size, job.seed)
    is_validation = is_drawn[data.samples.records]
    kept = np.flatnonzero(~is_validation)
    sizes = np.diff(np.searchsorted(kept, np.cumsum([0, *data.mixture.sizes])))
    mixture = Mixture(tuple(sizes.tolist()), data.mixture.weights)
    validation = JobData.of(data.samples.take(np.flatnonzero(is_validation)))
    return dataclasses.replace(data, samples=data.samples.take(kept), mixture=mixture, validation=validation)


def _gather_some(job: JobConfig, reader: _Reader, vocab_size: int | None, key: str, configs: Sequence[DatasetConfig]) -> JobData:
    """Concatenate the samples of datasets, of which at least one must be left."""
    data = _gather(job, reader, vocab_size, key, configs)
    if not len(data.samples) and data.num_bad == data.num_records:
        raise UserError(f"jobs.{job.name}.{key}: all of their {data.num_records} records are bad, as {data.bad[0]}")
    if not len(data.samples):
        raise UserError(
            f"jobs.{job.name}.sequence_len: {job.sequence_len} leaves no target token in any of the "
            f"{data.num_records - data.num_bad} records of its {key}; raise it"
        )
    return data


def _gather(job: JobConfig, reader: _Reader, vocab_size: int | None, key: str, configs: Sequence[DatasetConfig]) -> JobData:
    """Concatenate the samples of datasets."""
    parts: list[tuple[int, Dataset]] = []
    sizes: list[int] = []
    notes: Counter[str] = Counter()
    bad: list[str] = []
    num_records = 0
    for position, config in enumerate(configs):
        sizes.append(0)
        for source in sources_of(config, f"jobs.{job.name}.{key}.{position}.path"):
            dataset = reader.read(job, config, source)
            _check_vocabulary(f"jobs.{job.name}.{key}", source, dataset, vocab_size)
            parts.append((num_records, dataset))
            sizes[-1] += len(dataset.records)
            num_records += dataset.num_records
            notes.update(dataset.notes)
            bad += [f"{source}{error}" for error in dataset.bad]
    datasets = [dataset for _, dataset in parts]
    return JobData(
        samples=Samples(parts),
        mixture=Mixture(tuple(sizes), tuple(config.sampling_weight for config in configs)),
        num_records=num_records,
        num_truncated=sum(dataset.num_truncated for dataset in datasets),
        num_dropped=sum(dataset.num_dropped for dataset in datasets),
        num_bad=sum(dataset.num_bad for dataset in datasets),
        notes=notes,
        bad=tuple(bad),
    )


def _check_vocabulary(where: str, source: Source, dataset: Dataset, vocab_size: int | None) -> None:
    """Raise UserError for tokens for which the base model has no embedding."""
    if vocab_size is not None and dataset.largest_token >= vocab_size:
        raise UserError(
            f"{where}: {source} gives token {dataset.largest_token} and base_model has {vocab_size}; "
            "use the tokenizer that belongs to the base model"
        )
