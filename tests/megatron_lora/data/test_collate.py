"""Collating lists the target rows: those with a label, of all samples in order, and no padding rows; of training, or of validation."""

from types import SimpleNamespace

import numpy as np
import torch

from megatron_lora.data.collate import NO_LABEL, collate
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.steps import job_steps
from scheduling.types import Microbatch, Segment

MASKS = ([False, True, True], [False, False, True, False, True], [False, True])


def resident(samples, adapter_row=0):
    """Return a job whose only step takes all samples."""
    step_samples = JobSamples(seed=0, samples=Samples.of(samples), steps=job_steps(len(samples), len(samples), 1, None, False, 0))
    return SimpleNamespace(step_samples=step_samples, adapter_row=adapter_row)


def batch(masks, multiple=4):
    samples = [Sample(record, np.arange(len(mask), dtype=np.int32) + 10 * record, np.array(mask)) for record, mask in enumerate(masks)]
    jobs = {0: resident(samples)}
    segment = Segment(0, 0, tuple(range(len(samples))), sum(map(len, masks)))
    return collate(Microbatch((segment,)), jobs, multiple=multiple, device=torch.device("cpu"))


def test_targets_are_the_rows_with_a_label():
    data = batch(MASKS)
    assert data.targets.tolist() == [0, 1, 4, 6, 8] and data.targets.dtype == torch.int64
    assert data.labels.tolist() == [1, 2, NO_LABEL, NO_LABEL, 12, NO_LABEL, 14, NO_LABEL, 21, NO_LABEL, NO_LABEL, NO_LABEL]
    assert data.weights.nonzero().squeeze(1).tolist() == data.targets.tolist()


def test_no_target_at_all():
    """A microbatch may hold nothing but what its job's other samples outweigh."""
    samples = [Sample(0, np.arange(3, dtype=np.int32), np.zeros(3, bool)), Sample(1, np.arange(3, dtype=np.int32), np.ones(3, bool))]
    data = collate(Microbatch((Segment(0, 0, (0,), 3),)), {0: resident(samples)}, multiple=1, device=torch.device("cpu"))
    assert data.targets.shape == (0,) and not data.weights.any()


def test_segments_name_adapter_rows_and_their_jobs_stand_beside_them():
    samples = [Sample(0, np.arange(3, dtype=np.int32), np.arange(3) > 0)]
    jobs = {7: resident(samples, adapter_row=2), 4: resident(samples, adapter_row=0)}
    microbatch = Microbatch((Segment(7, 0, (0,), 3), Segment(4, 0, (0,), 3)))
    data = collate(microbatch, jobs, multiple=1, device=torch.device("cpu"))
    assert data.route.segments == ((0, 3, 2), (3, 6, 0)) and [part.job for part in data.parts] == [7, 4]


def test_a_microbatch_of_an_evaluation_holds_validation_samples_whose_targets_weigh_one():
    def of(*masks, first):
        return [
            Sample(first + record, np.arange(len(mask), dtype=np.int32) + 10 * record, np.array(mask)) for record, mask in enumerate(masks)
        ]

    job, other = resident(of([False, True], first=0), adapter_row=1), resident(of([False, True], first=5), adapter_row=0)
    job.validation_samples, other.validation_samples = Samples.of(of(*MASKS, first=1)), Samples.of(of(MASKS[2], first=7))
    segments = (Segment(3, 4, (2, 0), 5), Segment(6, 1, (0,), 2))  # `step` is the number of steps taken: beyond the job's last one, too
    data = collate(Microbatch(segments, evaluate=True), {3: job, 6: other}, multiple=4, device=torch.device("cpu"))
    assert data.tokens.tolist() == [20, 21, 0, 1, 2, 0, 1, 0] and data.route.segments == ((0, 5, 1), (5, 7, 0))
    assert [part.job for part in data.parts] == [3, 6]
    assert data.labels.tolist() == [21, NO_LABEL, 1, 2, NO_LABEL, 1, NO_LABEL, NO_LABEL]
    assert data.weights.tolist() == [1, 0, 1, 1, 0, 1, 0, 0] and data.targets.tolist() == [0, 2, 3, 5]
    assert not data.route.row_keys.any()
