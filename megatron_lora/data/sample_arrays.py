"""A job's samples as a few arrays, however many there are, and which of them each step takes.

Tokens and targets stay in the files of the token cache, which are mapped into memory: what is not used takes none, and the ranks of a
machine share what is. A Sample is a light view, made when it is asked for.

    samples = Samples([(0, dataset), (dataset.num_records, other)])     # the number of each dataset's first record
    samples[3].tokens[samples[3].targets]
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    A pair has two sequences, the second from `border` on, where targets[border] is False too; else `border` is 0. Its loss has a
    `weight`, which is below 0 for an answer that is labelled undesirable; such a sample begins with `num_prompt` tokens of the prompt.
    """

    record: int
    tokens: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool
    border: int = 0
    num_prompt: int = 0
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return (self.border, len(self.tokens) - self.border) if self.border else (len(self.tokens),)

    @property
    def pair_targets(self) -> tuple[int, ...]:
        """Targets of each sequence."""
        first, total = int(np.count_nonzero(self.targets[: self.border])), int(np.count_nonzero(self.targets))
        return (first, total - first) if self.border else (total,)


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

    @cached_property
    def num_prompt(self) -> np.ndarray:
        """Tokens of the prompt of each pair or labelled answer, int32."""
        return self._of_each(np.int32, [dataset.num_prompt for _, dataset in self._parts])

    @cached_property
    def weights(self) -> np.ndarray:
        """The weight of each sample's loss, below 0 for a label of false, fp32."""
        return self._of_each(np.float32, [dataset.weights for _, dataset in self._parts])

    def mismatched(self, batch: np.ndarray, k: int, longest: int) -> Sample:
        """Return sample k of a batch with the completion of the one before it, of the first with the last one's, cut to `longest`."""
        own, other = self[int(batch[k])], self[int(batch[k - 1])]
        tokens = np.concatenate([own.tokens[: own.num_prompt], other.tokens[other.num_prompt :]])[:longest]
        targets = np.concatenate([np.zeros(own.num_prompt, bool), other.targets[other.num_prompt :]])[:longest]
        targets[:1] = False
        return Sample(own.record, tokens, targets)

    def mismatched_lengths(self, batches: np.ndarray, borders: np.ndarray, longest: int) -> np.ndarray:
        """Return the tokens of the mismatched samples of batches, one after the other, which end at `borders`: int64."""
        before, prompts = np.roll(batches, 1), self.num_prompt
        before[np.append(0, borders[:-1])] = batches[borders - 1]
        return np.minimum(prompts[batches] + self.lengths[before] - prompts[before], longest)

    def longest_mismatched(self, longest: int) -> int:
        """Return the most tokens that a mismatched sample of any batch may have."""
        return min(int(self.num_prompt.max(initial=0)) + int((self.lengths - self.num_prompt).max(initial=0)), longest)

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
            num_prompt=np.array([sample.num_prompt for sample in samples], dtype=np.int32),
            weights=np.array([sample.weight for sample in samples], dtype=np.float32),
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
    border, num_prompt, weight = int(dataset.borders[index]), int(dataset.num_prompt[index]), float(dataset.weights[index])
    record = first_record + int(dataset.records[index])
    return Sample(record, dataset.tokens[start:end], dataset.targets[start:end], border, num_prompt, weight)


def digest_of(samples: Iterable[Sample]) -> str:
    """Return a SHA-256 of a job's samples, in their order: record numbers, tokens, targets, where pairs are divided, and weights."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.record} {len(sample.tokens)} {f'{sample.border} ' if sample.border else ''}".encode())
        digest.update(sample.tokens.tobytes())
        digest.update(sample.targets.tobytes())
        if sample.weight != 1:
            digest.update(f" {sample.weight}".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSamples:
    """A job's samples, and which of them each step takes."""

    seed: int
    samples: Samples
    steps: Steps
    longest: int = 0  # tokens of a mismatched sample at most

    @classmethod
    def of(cls, job: JobConfig, samples: Samples, mixture: Mixture | None = None) -> JobSamples:
        """Return a job's samples, in the steps that its config asks for."""
        taken = len(samples) if mixture is None else mixture
        steps = job_steps(taken, job.global_batch_size, job.num_epochs, job.max_steps, job.shuffle, job.seed)
        return cls(seed=job.seed, samples=samples, steps=steps, longest=job.sequence_len)

    def lengths(self) -> JobLengths:
        """Tokens of each sample, [step][k], for the planner."""
        return self._lengths(lambda indices, _: self.samples.lengths[indices])

    def mismatched_lengths(self) -> JobLengths:
        """Tokens of each mismatched sample, [step][k], for the planner."""
        return self._lengths(lambda indices, borders: self.samples.mismatched_lengths(indices, borders, self.longest))

    def _lengths(self, of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> JobLengths:
        """Return what `of` makes of the samples of each epoch, whose steps end at borders."""
        steps = self.steps
        keys, ends, size = [], [], 0
        for indices in steps.epoch_indices():
            borders = np.minimum(np.arange(1, -(-len(indices) // steps.global_batch_size) + 1) * steps.global_batch_size, len(indices))
            keys.append(np.insert(of(indices, borders).astype(NUMBER), borders, 0).tobytes())
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
