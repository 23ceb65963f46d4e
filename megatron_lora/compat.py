"""The only file that touches Megatron's and torch's unstable names.

Two kinds of things live here. First, starting the process groups: `initialize_parallel` joins `torch.distributed`, hands the layout
to megatron-core's `parallel_state` and returns this rank's device. Ranks are numbered tensor-first:
rank = t + tensor * (d + data * p) for tensor rank t, replica d and pipeline stage p.

Second, what megatron-core assumes of CUDA and a CPU run does not have. Each such symbol is replaced by one function named
`patch_<symbol>`: idempotent, it checks that the symbol exists, and it returns a function that puts the original back.
`patch_for_cpu` applies them all. Nothing is replaced on a CUDA run.

`all_gather_single` and `reduce_scatter_single` are the names that torch 2.13 gives to `all_gather_into_tensor` and `reduce_scatter_tensor`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from megatron_lora.errors import UserError

__all__ = [
    "attention_variables_kept",
    "all_gather_single",
    "destroy_parallel",
    "initialize_parallel",
    "patience",
    "patch_current_device",
    "patch_for_cpu",
    "patch_rng_fork",
    "pipelines",
    "quieten_gpt_model",
    "reduce_scatter_single",
]

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Undo = Callable[[], None]
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


class Layout(Protocol):
    """The part of ParallelConfig that process groups depend on."""

    pipeline: int
    tensor: int
    data: int


def patience() -> timedelta:
    """Return how long a rank waits for another before it gives up: MEGATRON_LORA_TIMEOUT_S seconds, half an hour without it."""
    text = os.environ.get("MEGATRON_LORA_TIMEOUT_S", "1800")
    if not text.isdecimal() or not 0 < int(text) < 10**8:
        raise UserError(f"MEGATRON_LORA_TIMEOUT_S: {text!r} is no number of seconds; use a whole number of at least 1, or unset it")
    return timedelta(seconds=int(text))


def initialize_parallel(parallel: Layout, backend: str, seed: int = 0) -> torch.device:
    """Join the process groups of `parallel` and return this rank's device ("gloo": CPU, "nccl": its CUDA device).

    Uses torchrun's environment when there is one; without it the run is a single process. A group that already exists is used.
    Raises UserError when the number of ranks is not pipeline * tensor * data.
    """
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        patch_for_cpu()
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=patience(), **alone)
    needed = parallel.pipeline * parallel.tensor * parallel.data
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
            distributed_timeout_minutes=patience() / timedelta(minutes=1),
        )
    if backend == "nccl":
        megatron_random.model_parallel_cuda_manual_seed(seed)
    return device


def pipelines(parallel: Layout) -> list[list[int]]:
    """List every pipeline of a run as its global ranks from the first stage to the last."""
    t, d = parallel.tensor, parallel.data
    return [[i_tensor + t * (i_data + d * stage) for stage in range(parallel.pipeline)] for i_data in range(d) for i_tensor in range(t)]


def stage_groups(parallel: Layout) -> dict[str, dist.ProcessGroup | None]:
    """Return the groups of ranks that hold parts of this rank's stage: tensor, data, both; None where one rank is alone."""
    both = parallel.tensor * parallel.data > 1
    return {
        "tensor": parallel_state.get_tensor_model_parallel_group() if parallel.tensor > 1 else None,
        "data": parallel_state.get_data_parallel_group() if parallel.data > 1 else None,
        "both": parallel_state.get_tensor_and_data_parallel_group() if both else None,
    }


def destroy_parallel() -> None:
    """Leave all process groups; `initialize_parallel` may then set up another layout."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def quieten_gpt_model() -> None:
    """Keep GPTModel from telling users, each time it is built, that newer models of megatron-core succeed it."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


@contextlib.contextmanager
def attention_variables_kept() -> Iterator[None]:
    """Leave the variables that steer Transformer Engine's attention as they are: GPTModel writes its own, and fails where they differ."""
    before = {name: os.environ.pop(name) for name in _ATTENTION_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        for name in _ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(before)


def patch_for_cpu() -> Undo:
    """Replace what megatron-core asks of CUDA with what a CPU has; return the function that undoes it."""
    undo = [patch_current_device(), patch_rng_fork()]
    return lambda: [restore() for restore in undo] and None


def patch_current_device() -> Undo:
    """Make `torch.cuda.current_device` name the CPU: Megatron allocates collectives' outputs on "the current device"."""
    return _replace(torch.cuda, "current_device", lambda: "cpu")


def patch_rng_fork() -> Undo:
    """Make the CUDA random-state tracker's `fork` do nothing: it surrounds dropout that we do not use."""
    return _replace(megatron_random.CudaRNGStatesTracker, "fork", _no_fork)


@contextlib.contextmanager
def _no_fork(self, name=None):
    yield


def _replace(owner: object, name: str, replacement: Callable) -> Undo:
    original = getattr(owner, name)  # AttributeError here: this version renamed the symbol
    if getattr(original, "_megatron_lora_original", None) is not None:
        original = original._megatron_lora_original
    else:
        replacement._megatron_lora_original = original
        setattr(owner, name, replacement)
    return lambda: setattr(owner, name, original)
