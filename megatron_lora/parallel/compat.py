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

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random

__all__ = [
    "attention_variables_kept",
    "all_gather_single",
    "patch_current_device",
    "patch_for_cpu",
    "patch_rng_fork",
    "quieten_gpt_model",
    "reduce_scatter_single",
]

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Undo = Callable[[], None]
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


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
