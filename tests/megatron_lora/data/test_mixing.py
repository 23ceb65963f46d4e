"""Sampling weights: whole repeats plus a seeded remainder per epoch, and steps that stay a pure function of sizes, weights and seed."""

import collections

import numpy as np
import pytest

from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.steps import Mixture, job_steps


def steps(mixture, batch=4, num_epochs=3, max_steps=None, shuffle=True, seed=1):
    return job_steps(mixture, batch, num_epochs, max_steps, shuffle, seed)


def visits_of_epoch(found, mixture, epoch):
    """Count how often an epoch takes each sample."""
    counts = collections.Counter()
    for step in found[epoch * found.per_epoch : (epoch + 1) * found.per_epoch]:
        counts.update(index for _, index in step)
    return [counts[index] for index in range(mixture.num_samples)]


def test_weights_of_one_are_the_same_as_one_dataset():
    assert steps(Mixture((4, 6), (1.0, 1.0))) == steps(10) == steps(Mixture((10,), (1.0,)))
    assert steps(Mixture((4, 6), (1.0, 1.0)), shuffle=False) == steps(10, shuffle=False)


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [((10, 20), (2.0, 0.25), (20, 5)), ((7,), (2.5,), (18,)), ((3, 100), (1.0, 0.001), (3, 1)), ((5, 5, 5), (0.4, 1.0, 3.2), (2, 5, 16))],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_takes_whole_repeats_and_a_remainder_that_is_drawn_anew(sizes, weights, taken, shuffle):
    mixture = Mixture(sizes, weights)
    found = steps(mixture, num_epochs=4, shuffle=shuffle)
    assert mixture.num_copies == sum(taken) and found.per_epoch == -(-sum(taken) // 4) and len(found) == 4 * found.per_epoch
    drawn = []
    for epoch in range(4):
        counts = visits_of_epoch(found, mixture, epoch)
        drawn.append(counts)
        start = 0
        for size, weight, total in zip(sizes, weights, taken, strict=True):
            part = counts[start : start + size]
            assert sum(part) == total and set(part) <= {int(weight), int(weight) + 1}
            start += size
    assert (drawn[0] != drawn[1] or drawn[1] != drawn[2]) == any(weight % 1 for weight in weights)
    assert found.visits().tolist() == np.sum(drawn, axis=0).tolist() and found.num_visits() == 4 * sum(taken)
    passes = collections.Counter(visit for step in found for visit in step)
    assert set(passes.values()) == {1}, "two copies of a sample are told apart, for dropout"


def test_the_remainder_is_drawn_independently_of_the_order_and_evenly():
    mixture = Mixture((40,), (0.25,))
    counts = np.zeros(40)
    for epoch in range(2000):
        counts[mixture.copies(epoch, 7)] += 1
    assert counts.min() > 420 and counts.max() < 580
    first = [int(mixture.copies(0, seed)[0]) for seed in range(50)]
    assert len(set(first)) > 5
    assert mixture.copies(3, 1).tolist() != mixture.copies(3, 2).tolist() != mixture.copies(4, 2).tolist()


def test_these_bits_are_a_promise():
    mixture = Mixture((3, 4), (2.5, 0.5))
    assert steps(mixture, batch=100, seed=0)[0] == (
        (1, 1), (0, 0), (0, 1), (1, 0), (0, 6), (0, 2), (0, 3), (2, 0), (2, 2), (1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("mixture", [Mixture((9,), (1.0,)), Mixture((4, 9), (2.0, 0.5))])
@pytest.mark.parametrize(("batch", "max_steps"), [(1, None), (4, None), (4, 3), (4, 1), (100, None), (5, 11)])
def test_lengths_for_the_planner_are_those_of_the_steps(mixture, batch, max_steps):
    samples = Samples.of(Sample(i, np.arange(i + 1, dtype=np.int32), np.arange(i + 1) > 0) for i in range(mixture.num_samples))
    found = steps(mixture, batch, 2, max_steps)
    job = JobSamples(seed=1, samples=samples, steps=found)
    assert list(job.lengths()) == [[len(samples[index]) for _, index in step] for step in found]
    assert [job.num_targets(step) for step in range(len(found))] == [sum(samples[i].targets.sum() for _, i in step) for step in found]
