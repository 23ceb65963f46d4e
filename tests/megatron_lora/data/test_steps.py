"""The order of a job's samples: complete epochs, kept last batches, and nothing but seed, epoch and count deciding it."""

import collections

import pytest

from megatron_lora.data.steps import epoch_order, job_steps


def steps(num_samples=5, global_batch_size=2, num_epochs=1, max_steps=None, shuffle=True, seed=0):
    return job_steps(num_samples, global_batch_size, num_epochs, max_steps, shuffle, seed)


def test_file_order_keeps_the_last_smaller_batch_of_every_epoch():
    assert steps(num_epochs=2, shuffle=False) == (
        ((0, 0), (0, 1)),
        ((0, 2), (0, 3)),
        ((0, 4),),
        ((1, 0), (1, 1)),
        ((1, 2), (1, 3)),
        ((1, 4),),
    )


@pytest.mark.parametrize(("num_samples", "batch"), [(1, 1), (1, 4), (7, 3), (12, 4), (100, 7)])
def test_every_epoch_visits_each_sample_once(num_samples, batch):
    visits = collections.Counter(visit for step in steps(num_samples, batch, num_epochs=3) for visit in step)
    assert visits == {(epoch, index): 1 for epoch in range(3) for index in range(num_samples)}
    for step in steps(num_samples, batch, num_epochs=3):
        assert len({epoch for epoch, _ in step}) == 1, "a global batch crosses an epoch's border"


def test_max_steps_cuts_and_repeats_epochs():
    whole = steps(num_epochs=4)
    assert steps(num_epochs=4, max_steps=2) == whole[:2]
    assert steps(num_epochs=1, max_steps=11) == whole[:11]


def test_order_depends_on_seed_and_epoch():
    first, second = epoch_order(50, 0, 1).tolist(), epoch_order(50, 1, 1).tolist()
    assert first != second != epoch_order(50, 1, 2).tolist()
    assert first != list(range(50))
    # These bits are a promise: a run that resumes, or repeats on another machine, sees the same samples.
    assert epoch_order(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]


def test_first_places_are_uniform():
    counts = collections.Counter(int(epoch_order(4, epoch, 7)[0]) for epoch in range(4000))
    assert all(850 < counts[index] < 1150 for index in range(4))


def test_the_largest_seed_of_a_config_works():
    assert sorted(epoch_order(5, 3, 2**32 - 1).tolist()) == [0, 1, 2, 3, 4]
