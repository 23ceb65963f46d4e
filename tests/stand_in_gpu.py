"""A Hopper GPU that is not there: Triton's launchers run as far as the compiler, and nothing is launched.

    with compiling() as kernels:
        ops.down(x, group, route)          # on CPU tensors
    kernels                                # every kernel that was compiled, or found in Triton's cache

ptxas comes with Triton's wheel, so what is compiled here is what a Hopper GPU runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


class Hopper:
    """A driver that knows its target and nothing else."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compiling() -> Iterator[list]:
    """Compile what is launched inside, and list it."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for other in kernels):
            kernels.append(kernel)
        return kernel

    before = driver._active
    driver.set_active(Hopper())
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = before
