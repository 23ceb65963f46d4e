"""The patches of megatron-core, beside import_megatron.py, and names that differ between versions of torch.

megatron-core calls CUDA where a run on the CPU has none. Each such symbol is patched by one function
`patch_<symbol>`, which is idempotent, checks that the symbol exists, and returns a function that restores
the original. `patch_for_cpu` applies them all. A CUDA run has no patches.

`all_gather_single` and `reduce_scatter_single` are the names that torch 2.13 gives to
`all_gather_into_tensor` and `reduce_scatter_tensor`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Undo = Callable[[], None]
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def quieten_gpt_model() -> None:
    """Silence the notice, logged each time a GPTModel is built, that megatron-core has a newer model class."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


@contextlib.contextmanager
def attention_variables_kept() -> Iterator[None]:
    """Unset the environment variables of Transformer Engine's attention meanwhile: GPTModel sets them, and fails if they differ."""
    before = {name: os.environ.pop(name) for name in _ATTENTION_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        for name in _ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(before)


def patch_for_cpu() -> Undo:
    """Apply all patches that a run on the CPU needs; return the function that undoes them."""
    undo = contextlib.ExitStack()
    for restore in (patch_current_device(), patch_rng_fork()):
        undo.callback(restore)
    return undo.close


def patch_current_device() -> Undo:
    """Make `torch.cuda.current_device` return the CPU: Megatron allocates the outputs of collectives there."""
    return _replace(torch.cuda, "current_device", lambda: "cpu")


def patch_rng_fork() -> Undo:
    """Make the CUDA random-state tracker's `fork` do nothing: Megatron calls it around dropout, which we do not use."""
    return _replace(megatron_random.CudaRNGStatesTracker, "fork", _no_fork)


@contextlib.contextmanager
def _no_fork(self, name=None):
    yield


def _replace(owner: object, name: str, replacement: Callable) -> Undo:
    original = getattr(owner, name)  # AttributeError here: this version renamed the symbol
    if not hasattr(original, "_megatron_lora_original"):
        replacement._megatron_lora_original = original
        setattr(owner, name, replacement)
    original = getattr(owner, name)._megatron_lora_original
    return lambda: setattr(owner, name, original)
