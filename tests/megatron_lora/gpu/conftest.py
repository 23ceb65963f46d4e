"""A pool of ranks with a GPU each; its processes are apart from the gloo pool's, which patch Megatron for CPU."""

import pytest
import rank_pool

from megatron_lora.config.schema import ParallelConfig


@pytest.fixture(scope="session")
def one_gpu():
    """Return a function (fn, *args) -> fn's result on a process that is the only rank of an NCCL world."""
    ranks = rank_pool.RankPool(gpus=True)
    yield lambda fn, *args: ranks.run(ParallelConfig(), fn, *args)[0]
    ranks.close()


@pytest.fixture
def run_on(one_gpu, pool):
    """Return a function (device, fn, *args) -> fn(*args, device)'s result on the only rank of an NCCL world, or of a gloo world on CPU."""
    return lambda device, fn, *args: one_gpu(fn, *args, device) if device == "cuda" else pool().run(fn, *args, device)[0]
