"""The device that a run, or a prediction, is for: throughput from scheduling.cost's table, memory from the machine where it is there.

`this_device` asks the machine; `named_device` takes a name from the table; `reference_of` gives the device whose figures the planner
uses: its own where they were measured (calibration.py), else one's for all GPUs, so that a plan does not depend on which GPU makes it.
"""

import dataclasses
import os
from pathlib import Path

from megatron_lora.config.rules import one_of
from scheduling.cost import DEVICES, Device

PROCESS_BYTES = 1e9  # what a rank on CPU holds before it has a model
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def named_device(option: str, name: str) -> Device:
    """Return a device of the table; UserError names the option for one that is not in it."""
    return DEVICES[one_of(*DEVICES)(option, name)]


def reference_of(device: Device) -> Device:
    """Return the device whose figures decide plans and splits: its own where they were measured, else a CPU's or one GPU's."""
    if device.measured is not None:
        return device
    return DEVICES["cpu" if device.name == "cpu" else "h100"]


def this_gpu() -> Device | None:
    """Return the current GPU with the memory that is free on it, None where there is none; imports torch.

    A GPU that the table does not know has an h100's throughput.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return device_like(torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[0]))


def device_like(name: str, memory_bytes: float) -> Device:
    """Return a device by its full name with the throughput of the table's device whose name is in it, a GPU's where none is."""
    like = next((DEVICES[known] for known in DEVICES if known in name.lower()), DEVICES["h100"])
    return dataclasses.replace(like, name=name, memory_bytes=memory_bytes)


def this_device(ranks_here: int) -> Device:
    """Return what one of this machine's `ranks_here` ranks has: a GPU, or its share of the CPU's memory."""
    share = max(0.0, machine_bytes() / ranks_here - PROCESS_BYTES)
    return this_gpu() or dataclasses.replace(DEVICES["cpu"], memory_bytes=share)


def machine_bytes() -> float:
    """Return this machine's memory, or the part of it that its container may use."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path(file).read_text().strip() for file in CGROUP_LIMITS if os.access(file, os.R_OK)]
    return float(min([whole, *(int(limit) for limit in limits if limit.isdigit())]))


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
