"""A planned microbatch to tensors: tokens, labels, target rows, weights, positions and the route.

Rows are in the order of the microbatch's segments and, inside a segment, of its samples. Row i of a
sample holds token i and predicts token i + 1, so a sample's last row has no label. Every target row
weighs 1 / (target tokens of its job's global batch) times its record's weight, so that the sum of weighted losses over a
step's microbatches is the step's loss. A microbatch of an evaluation holds validation samples: its
target rows weigh what their records do, and its route has no dropout. A pair is two sequences, whose rows the objective
weighs (Pairs); where that counts prompts too, they have labels and weigh nothing here. In a reference
slot rows have no adapter, or the one that their job began from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fused_ops.lora.dropout import row_keys
from fused_ops.lora.route import make_route
from megatron_lora.data.microbatch import Packing, Pairs, Part, StageInput
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from scheduling.types import VALIDATION, Microbatch, Segment

NO_LABEL = -100


def num_rows(microbatch: Microbatch, multiple: int) -> int:
    """Rows of a microbatch, rounded up to a multiple (the tensor ranks under sequence parallelism, else 1)."""
    return -(-microbatch.num_tokens // multiple) * multiple


class ResidentJob(Protocol):
    """What a microbatch takes from a job: its samples, those of validation, and its adapter row (training.jobs.Job)."""

    @property
    def step_samples(self) -> JobSamples: ...

    @property
    def validation_samples(self) -> Samples: ...

    @property
    def adapter_row(self) -> int: ...

    @property
    def reference_has_adapter(self) -> bool: ...

    @property
    def trains_prompts(self) -> bool: ...


def collate(microbatch: Microbatch, jobs: Mapping[int, ResidentJob], *, multiple: int, device: torch.device) -> StageInput:
    """Return the tensors of a microbatch of `jobs` (by number).

    Its padding up to `multiple` rows is one sample without labels and without an adapter.
    """
    tokens, labels, weights, keys, lengths, segments, parts = [], [], [], [], [], [], []
    row = 0

    def to_device(array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(array)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    for segment in microbatch.segments:
        if not segment.samples:
            continue  # this replica has no sample of the job here
        job = jobs[segment.job]
        validation = microbatch.of_validation(segment)
        samples = _mismatched_samples if microbatch.mismatched else _validation_samples if validation else _training_samples
        taken = list(samples(segment, job))
        for each in taken:
            sample = each.sample
            targets = np.append(sample.targets[1:], False)
            weights.append(np.where(targets, each.weight, 0.0).astype(np.float32))
            if sample.border and job.trains_prompts:
                targets[: sample.border - 1] = True
            tokens.append(sample.tokens.astype(np.int64))
            labels.append(np.where(targets, np.append(sample.tokens[1:], 0), NO_LABEL).astype(np.int64))
            keys.append(each.keys)
            lengths += sample.lengths
        if not microbatch.reference or job.reference_has_adapter:
            segments.append((row, row + segment.num_tokens, job.adapter_row))
        first = taken[0].sample
        pairs = _pairs(taken, job, None if validation else segment.step, to_device) if first.border or first.num_prompt else None
        batch = VALIDATION - segment.step if validation and segment.step >= 0 else segment.step
        parts.append(Part(job=segment.job, step=segment.step, first=row, end=row + segment.num_tokens, batch=batch, pairs=pairs))
        row += segment.num_tokens
    num_padding = num_rows(microbatch, multiple) - row
    if num_padding:
        tokens.append(np.zeros(num_padding, dtype=np.int64))
        labels.append(np.full(num_padding, NO_LABEL, dtype=np.int64))
        weights.append(np.zeros(num_padding, dtype=np.float32))
        keys.append(np.zeros(num_padding, dtype=np.int32))
        lengths.append(num_padding)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    all_labels = np.concatenate(labels)
    return StageInput(
        tokens=to_device(np.concatenate(tokens)),
        labels=to_device(all_labels),
        targets=to_device(np.flatnonzero(all_labels != NO_LABEL)),
        weights=to_device(np.concatenate(weights)),
        packing=Packing(cu_seqlens=to_device(edges), lengths=tuple(lengths), positions=to_device(positions), max_length=max(lengths)),
        route=make_route(row + num_padding, tuple(segments), to_device(np.concatenate(keys)), device, dropout=not microbatch.evaluate),
        parts=tuple(parts),
    )


class _Taken(NamedTuple):
    """A sample, its place among the job's, the weight of its target rows, and the dropout keys of its rows."""

    sample: Sample
    place: int
    weight: float
    keys: np.ndarray


def _training_samples(segment: Segment, resident: ResidentJob) -> Iterator[_Taken]:
    job = resident.step_samples
    weight = 1.0 / job.num_targets(segment.step)
    for k in segment.samples:
        epoch, index = job.steps[segment.step][k]
        sample = job.samples[index]
        yield _Taken(sample, index, weight * abs(sample.weight), np.asarray(row_keys(job.seed, sample.record, epoch, len(sample))))


def _validation_samples(segment: Segment, resident: ResidentJob) -> Iterator[_Taken]:
    first = len(resident.step_samples.samples)
    for index in segment.samples:
        sample = resident.validation_samples[index]
        yield _Taken(sample, first + index, abs(sample.weight), np.zeros(len(sample), dtype=np.int32))


def _mismatched_samples(segment: Segment, resident: ResidentJob) -> Iterator[_Taken]:
    job, of_step = resident.step_samples, segment.step >= 0
    samples, batch = (job.samples, job.steps.batch(segment.step)) if of_step else _all_of(resident.validation_samples)
    for k in segment.samples:
        sample = samples.mismatched(batch, k, job.longest)
        yield _Taken(sample, k, 1.0, np.zeros(len(sample), dtype=np.int32))


def _all_of(samples: Samples) -> tuple[Samples, np.ndarray]:
    return samples, np.arange(len(samples))


def _pairs(taken: Sequence[_Taken], job: ResidentJob, step: int | None, to_device: Callable[[np.ndarray], torch.Tensor]) -> Pairs:
    """Return the pairs, or labelled answers, of a segment; without a step its batch is the validation set."""
    own = job.step_samples
    samples, batch = _all_of(job.validation_samples) if step is None else (own.samples, own.steps.batch(step))
    counted = samples.borders[batch] - 1 if job.trains_prompts else samples.num_chosen[batch]
    lengths = [length for each in taken for length in each.sample.lengths]
    return Pairs(
        edges=to_device(np.cumsum([0, *lengths], dtype=np.int64)),
        longest=max(lengths),
        num_targets=to_device(np.array([each.sample.pair_targets for each in taken], dtype=np.float32)),
        places=to_device(np.array([each.place for each in taken], dtype=np.int64)),
        pair_weight=1.0 / len(batch),
        token_weight=1.0 / max(1, int(counted.sum())),
        weights=to_device(np.array([abs(each.sample.weight) for each in taken], dtype=np.float32)),
        is_desirable=to_device(np.array([each.sample.weight > 0 for each in taken])),
        num_desirable=int((samples.weights[batch] > 0).sum()),
    )
