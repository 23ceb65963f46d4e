"""A job's samples as a few arrays, however many there are, and which of them each step takes.

Tokens and targets stay in the files of the token cache, which are mapped into memory: what is not used takes none, and the ranks of a
machine share what is. A Sample is a light view, made when it is asked for.

    samples = Samples([(0, dataset), (dataset.num_records, other)])     # the number of each dataset's first record
    samples[3].tokens[samples[3].targets]
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.steps import Mixture, Steps, job_steps
from megatron_lora.data.token_cache import Dataset
from scheduling.job_lengths import NUMBER, JobLengths


@dataclass(frozen=True, slots=True)
class Sample:
    """One record as trained. targets[i] says that token i is predicted from the tokens before it; targets[0] is False.

    A pair has two sequences, the second from `border` on, where targets[border] is False too; else `border` is 0.
    """

    record: int
    tokens: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool
    border: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return (self.border, len(self.tokens) - self.border) if self.border else (len(self.tokens),)

    @property
    def pair_targets(self) -> tuple[int, int]:
        """Targets of a pair's two sequences."""
        first = int(np.count_nonzero(self.targets[: self.border]))
        return first, int(np.count_nonzero(self.targets)) - first


class Samples(Sequence[Sample]):
    """The samples of datasets, one after the other, each with the number of its first record; or some of these samples."""

    def __init__(self, parts: Iterable[tuple[int, Dataset]], taken: np.ndarray | None = None):
        """Take all samples, or those with the indices `taken`."""
        self._parts = tuple(parts)
        self._taken = taken
        sizes = [len(dataset.records) for _, dataset in self._parts]
        self._starts = np.cumsum([0, *sizes]).tolist()
        self.lengths = self._of_each(np.int64, [np.diff(dataset.offsets) for _, dataset in self._parts])  # in tokens
        self.num_targets = self._of_each(np.int32, [dataset.num_targets for _, dataset in self._parts])

    def _of_each(self, kind: type, arrays: list[np.ndarray]) -> np.ndarray:
        """Concatenate arrays over the datasets' samples, and return the entries of those that are taken."""
        joined = np.concatenate([np.empty(0, kind), *arrays])
        return joined if self._taken is None else joined[self._taken]

    @cached_property
    def num_chosen(self) -> np.ndarray:
        """Targets of the first sequence of each pair, int32."""
        return self._of_each(np.int32, [dataset.num_chosen for _, dataset in self._parts])

    @cached_property
    def borders(self) -> np.ndarray:
        """Where the second sequence of each pair begins, 0 for other samples, int32."""
        return self._of_each(np.int32, [dataset.borders for _, dataset in self._parts])

    @property
    def records(self) -> np.ndarray:
        """The record number of each sample, int64."""
        return self._of_each(np.int64, [first_record + dataset.records for first_record, dataset in self._parts])

    def take(self, indices: np.ndarray) -> Samples:
        """Return the samples with these indices, of all."""
        assert self._taken is None
        return Samples(self._parts, indices)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """Make samples of single ones."""
        samples = list(samples)
        dataset = Dataset(
            tokens=np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)]),
            targets=np.concatenate([np.empty(0, bool), *(sample.targets for sample in samples)]),
            offsets=np.cumsum([0, *map(len, samples)], dtype=np.int64),
            records=np.array([sample.record for sample in samples], dtype=np.int64),
            num_targets=np.array([np.count_nonzero(sample.targets) for sample in samples], dtype=np.int32),
            borders=np.array([sample.border for sample in samples], dtype=np.int32),
            num_chosen=np.array([sample.pair_targets[0] if sample.border else 0 for sample in samples], dtype=np.int32),
            num_records=len(samples),
        )
        return cls([(0, dataset)])

    def __len__(self) -> int:
        return self._starts[-1] if self._taken is None else len(self._taken)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        if self._taken is not None:
            index = int(self._taken[index])
        part = bisect_right(self._starts, index) - 1
        first_record, dataset = self._parts[part]
        return _sample(first_record, dataset, index - self._starts[part])

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in order."""
        if self._taken is not None:
            yield from map(self.__getitem__, range(len(self)))
            return
        for first_record, dataset in self._parts:
            for index in range(len(dataset.records)):
                yield _sample(first_record, dataset, index)


def _sample(first_record: int, dataset: Dataset, index: int) -> Sample:
    start, end = dataset.offsets[index : index + 2]
    record, border = first_record + int(dataset.records[index]), int(dataset.borders[index])
    return Sample(record, dataset.tokens[start:end], dataset.targets[start:end], border)


def digest_of(samples: Iterable[Sample]) -> str:
    """Return a SHA-256 of a job's samples, in their order: record numbers, tokens, targets, and where pairs are divided."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.record} {len(sample.tokens)} {f'{sample.border} ' if sample.border else ''}".encode())
        digest.update(sample.tokens.tobytes())
        digest.update(sample.targets.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSamples:
    """A job's samples, and which of them each step takes."""

    seed: int
    samples: Samples
    steps: Steps

    @classmethod
    def of(cls, job: JobConfig, samples: Samples, mixture: Mixture | None = None) -> JobSamples:
        """Return a job's samples, in the steps that its config asks for."""
        taken = len(samples) if mixture is None else mixture
        steps = job_steps(taken, job.global_batch_size, job.num_epochs, job.max_steps, job.shuffle, job.seed)
        return cls(seed=job.seed, samples=samples, steps=steps)

    def lengths(self) -> JobLengths:
        """Tokens of each sample, [step][k], for the planner."""
        steps = self.steps
        keys, ends, size = [], [], 0
        for indices in steps.epoch_indices():
            borders = np.minimum(np.arange(1, -(-len(indices) // steps.global_batch_size) + 1) * steps.global_batch_size, len(indices))
            keys.append(np.insert(self.samples.lengths[indices].astype(NUMBER), borders, 0).tobytes())
            ends.append(size + borders + np.arange(len(borders)))
            size += len(indices) + len(borders)
        return JobLengths(b"".join(keys), np.concatenate(ends))

    def num_targets(self, step: int) -> int:
        """Target tokens of a step's global batch."""
        return int(self.samples.num_targets[self.steps.batch(step)].sum())


def target_share(jobs: Iterable[tuple[Samples, Steps]]) -> float:
    """Return the share of a run's tokens that are targets, the only rows that the head computes.

    `jobs`: the samples and steps of each job; a sample counts as often as the steps visit it.
    """
    num_targets = num_tokens = 0
    for samples, steps in jobs:
        visits = steps.visits()
        num_targets += int(visits @ samples.num_targets)
        num_tokens += int(visits @ samples.lengths)
    return num_targets / num_tokens
