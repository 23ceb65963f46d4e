"""Programmatic dependent launch: on Hopper, a kernel starts while the one before it in its stream still runs its last programs.

    if PDL:
        gdc_wait()                  the kernel before has ended, and what it wrote can be read
        gdc_launch_dependents()     the kernel after may start, once every program has reached this line or ended

What starts early fills the multiprocessors that its predecessor leaves idle, and hides its launch. Three rules keep it right:

    1. What the kernel before may have written is read after the wait, and what it may still use is written after the wait. That includes
       every fresh torch.empty: its memory may belong to something that the kernel before reads. No other kernel uses the gradients of
       A, so dA may add to them before its wait.
    2. No kernel lets the next one start before its own wait, so that at most two run at once: when a kernel starts, all but the one just
       before it have ended. Before its wait a kernel may read what is older than that one: activations by TMA, which bypasses the L1
       cache, and the tables of routes and groups, which are written once, by copies that every kernel waits for.
    3. At least one program of every kernel waits before it ends, so that the end of a kernel is the end of all before it.

A kernel without the flag starts after the end of the one before it, and the one after it starts after its end, as usual.
"""

from functools import lru_cache

import torch

ENABLED = True  # False: every kernel waits for the end of the one before; the same bits, slower


@lru_cache
def starts_early(device: torch.device) -> bool:
    """Return whether the device can start kernels early: Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def pdl(tensor: torch.Tensor, wanted: bool = True) -> dict[str, bool]:
    """Return the launch options of a kernel with a PDL flag, over a tensor of the device that it runs on."""
    return {"PDL": True, "launch_pdl": True} if ENABLED and wanted and starts_early(tensor.device) else {"PDL": False}
