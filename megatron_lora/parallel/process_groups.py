"""The ranks of a run: their process groups, and this rank's position in its pipeline.

`initialize_parallel` joins `torch.distributed`, initialises megatron-core's `parallel_state` with the
layout and returns this rank's device.
Ranks are numbered tensor-first: rank = t + tensor * (d + data * p) for tensor rank t, replica d and pipeline stage p.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.parallel.compat import patch_for_cpu

T = TypeVar("T")


def rank_timeout() -> timedelta:
    """Return how long a rank waits for another before it fails: MEGATRON_LORA_TIMEOUT_S seconds, by default half an hour."""
    text = os.environ.get("MEGATRON_LORA_TIMEOUT_S", "1800")
    if not text.isdecimal() or not 0 < int(text) < 10**8:
        raise UserError(f"MEGATRON_LORA_TIMEOUT_S: {text!r} is no number of seconds; use a whole number of at least 1, or unset it")
    return timedelta(seconds=int(text))


def initialize_parallel(parallel: ParallelConfig, backend: str | None = None, seed: int = 0) -> torch.device:
    """Join the process groups of `parallel` and return this rank's device ("gloo": CPU, "nccl": its CUDA device).

    Without a `backend` it is a GPU where there is one. Uses torchrun's environment variables; without
    them the run is a single process. An existing default group is used as it is.
    Raises UserError when the number of ranks is not pipeline * tensor * data.
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        patch_for_cpu()
    if not dist.is_initialized():
        alone = {}
        if "RANK" not in os.environ:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  torch documents it, and its stubs do not export it
            alone = {"store": store, "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=rank_timeout(), **alone)
    needed = parallel.world_size
    if dist.get_world_size() != needed:
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x tensor {parallel.tensor} x data {parallel.data} needs {needed} ranks, "
            f"{dist.get_world_size()} were started; start exactly {needed}"
        )
    if parallel_state.model_parallel_is_initialized():
        sizes = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_world_size()
        assert sizes == (parallel.tensor, parallel.pipeline), f"this process is already part of a layout of tensor x pipeline {sizes}"
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=cast(int, rank_timeout() / timedelta(minutes=1)),  # it takes fractions, too
        )
    if backend == "nccl":
        megatron_random.model_parallel_cuda_manual_seed(seed)
    return device


def new_group(ranks: list[int] | None = None, backend: str | None = None, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Make a process group of these global ranks (None: all), which wait for each other for `timeout` (None: `rank_timeout`).

    Collective: every rank calls it. What it returns to the ranks outside the group is of no use.
    """
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=timeout or rank_timeout(), backend=backend))


def tensor_group() -> dist.ProcessGroup:
    """Return the group of this rank's tensor ranks."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())  # an int only outside of every group


def pipelines(parallel: ParallelConfig) -> list[list[int]]:
    """Return the global ranks of every pipeline of a run, each from the first stage to the last."""
    stages, places = range(parallel.pipeline), [(d, t) for d in range(parallel.data) for t in range(parallel.tensor)]
    return [[parallel.rank_at(stage, replica, tensor_rank) for stage in stages] for replica, tensor_rank in places]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGroups:
    """The process groups of the ranks that hold the same stage; None where a group would have one rank."""

    tensor: dist.ProcessGroup | None = None  # the tensor ranks of this replica
    data: dist.ProcessGroup | None = None  # the ranks with this tensor rank, one of each replica
    both: dist.ProcessGroup | None = None  # all tensor ranks of all replicas


def stage_groups(parallel: ParallelConfig) -> StageGroups:
    """Return the groups of the ranks that hold this rank's stage."""
    return StageGroups(
        tensor=tensor_group() if parallel.tensor > 1 else None,
        data=cast(dist.ProcessGroup, parallel_state.get_data_parallel_group()) if parallel.data > 1 else None,
        both=cast(dist.ProcessGroup, parallel_state.get_tensor_and_data_parallel_group()) if parallel.ranks_per_stage > 1 else None,
    )


def from_first_rank(make: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Return on every rank of a gloo group of all ranks what `make` returns on the first, which alone calls it."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, 0, group=group)
    return cast(T, made[0])


def destroy_parallel() -> None:
    """Destroy all process groups; `initialize_parallel` may then set up another layout."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def position_of(parallel: ParallelConfig) -> Position:
    """Return this rank's position; gradient norms take one more slot where several ranks hold a stage, and must sum them."""
    return Position(stage=parallel.stage_of(dist.get_rank()), num_stages=parallel.pipeline, delay=parallel.norm_delay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A stage's position in its pipeline."""

    stage: int
    num_stages: int
    delay: int  # slots from the end of a step until the stage knows its gradient norm: 1 if several ranks must sum it, otherwise 0

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage, which embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, which computes the losses."""
        return self.stage == self.num_stages - 1

    @property
    def gap(self) -> int:
        """Slots from the end of a step to the first forward that it can precede: the one whose message brings its verdict."""
        return self.num_stages + self.delay
