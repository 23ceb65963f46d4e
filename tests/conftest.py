"""Fixtures for all tests: one thread per process, a single process as a world of one, and a pool of ranks.

`one_process` puts the test process itself into a world of one rank. `pool` gives more ranks:
`pool(pp=2, tp=2).run(fn, *args)` calls the module-level function `fn` on four ranks and returns their results in rank order;
inside, `parallel_state` is set up. See rank_pool.py.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import rank_pool  # noqa: E402

# A shell has those that it starts in the background ignore these, and they would pass that on to every process that a test starts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="session")
def one_process():
    """Join a world of one gloo rank, in this process, for the session."""
    import torch

    from megatron_lora.config.schema import ParallelConfig
    from megatron_lora.parallel.process_groups import destroy_parallel, initialize_parallel

    torch.set_num_threads(1)
    initialize_parallel(ParallelConfig(), "gloo")
    yield
    destroy_parallel()


@pytest.fixture(scope="session")
def ranks():
    """Return the ranks themselves, which live as long as the session."""
    ranks = rank_pool.RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pool(ranks):
    """Return a function layout -> object with `.run(fn, *args)`; the ranks rest between modules."""
    from megatron_lora.config.schema import ParallelConfig

    def choose(pp: int = 1, tp: int = 1, dp: int = 1, ep: int = 1, sequence: bool = False):
        layout = ParallelConfig(pipeline=pp, tensor=tp, data=dp, expert=ep, sequence=sequence)
        return SimpleNamespace(run=partial(ranks.run, layout), parallel=layout)

    yield choose
    ranks.rest()
