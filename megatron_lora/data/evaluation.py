"""What a job is evaluated on, and when: `val_set_size` takes records out of its own data, evaluations come after given numbers of steps.

Validation has the records of the smallest hash(seed, record), where a record is its number in the job's concatenated datasets, before
anything is dropped. So the draw depends on the job's seed and the number of its records alone, and a record's number, which decides its
dropout masks, is the same with and without validation.

    is_drawn = draw_validation(num_records=500, size=0.02, seed=0)      # bool [500], 10 of them
    evaluation_steps(job, steps)                                        # (4, 8, 10): numbers of steps taken
"""

from collections.abc import Iterable

import numpy as np

from megatron_lora.config.objective_keys import KtoConfig
from megatron_lora.config.schema import JobConfig
from megatron_lora.data.sample_arrays import Samples
from megatron_lora.data.steps import Steps, mix

DRAW = 0x56414C49 << 32  # beyond any seed: the order of training hashes the seed alone


def draw_validation(num_records: int, size: float | int, seed: int) -> np.ndarray:
    """Say which records are for validation, bool [num_records]; `size` is a share of them, at least one record, or a number."""
    num_drawn = max(1, round(size * num_records)) if isinstance(size, float) else size
    hashes = mix(mix(np.array([seed | DRAW], dtype=np.uint64)) + np.arange(num_records, dtype=np.uint64))
    is_drawn = np.zeros(num_records, dtype=bool)
    is_drawn[np.argsort(hashes, kind="stable")[:num_drawn]] = True
    return is_drawn


def evaluation_steps(job: JobConfig, steps: Steps, taken: int = 0, due: bool = True) -> tuple[int, ...]:
    """Return after which numbers of steps a job is evaluated, ascending; 0 is its start.

    `eval_steps` or epochs apart, at its end, and at the rungs of its sweep. Of a job that resumes after `taken` steps, those that come; the
    one after `taken` itself only if it is `due`. Empty without validation data.
    """
    if not job.is_evaluated:
        return ()
    every = job.eval_steps or steps.per_epoch
    counts = {*([0] if job.eval_on_start else []), *range(every, len(steps), every), len(steps)}
    counts |= set(job.point.sweep.rung_steps(len(steps)) if job.point else ())
    return tuple(count for count in sorted(counts) if count > taken or (due and count == taken))


def longest_of(jobs: Iterable[tuple[JobConfig, Samples, Samples]]) -> list[tuple[tuple[int]]]:
    """Return what a microbatch must hold besides jobs' samples, as jobs of one step: the longest of validation, and mismatched ones.

    `jobs`: the config of each, its samples, and those of validation.
    """
    found = []
    for job, samples, validation in jobs:
        found += [int(validation.lengths.max())] if len(validation) else []
        if isinstance(job.preference, KtoConfig):
            found += [held.longest_mismatched(job.sequence_len) for held in (samples, validation) if len(held)]
    return [((tokens,),) for tokens in found]
