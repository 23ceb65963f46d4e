"""Programmatic dependent launch: on Hopper, a kernel starts while the one before it in its stream still runs its last programs.

    if PDL:
        gdc_wait()                  the kernel before has ended, and what it wrote is there
        gdc_launch_dependents()     the kernel after may start, once every program has come this far or ended

What starts early fills the multiprocessors that its predecessor leaves idle, and hides its launch. Three rules keep it right:

    1. What the kernel before may have written is read after the wait, and what it may still use is written after the wait. That includes
       every fresh torch.empty: its memory may belong to something that the kernel before reads. Gradients of A are nobody else's: dA may
       add to them ahead of its wait.
    2. Nobody lets the next kernel start before its own wait, so that at most two run at once: when a kernel starts, all but the one just
       before it have ended. A kernel may read ahead of its wait what is older than that one: activations by TMA, which goes past the
       L1 cache, and the tables of routes and groups, which are written once, by copies that every kernel waits for.
    3. At least one program of every kernel waits before it ends, so that the end of a kernel is the end of all before it.

A kernel that does not take part, before or after, is waited for, and waits, as ever.
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
