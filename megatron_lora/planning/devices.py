"""The device of a run or a prediction: throughput from the table in scheduling.cost, memory from the machine itself.

`this_device` describes this machine's device, `named_device` one that the table names. `reference_of`
returns the device whose throughput the planner uses: the device itself where its costs were measured
(calibration.py), else one for all GPUs, so that a plan does not depend on the GPU that makes it.
"""

import dataclasses
import os
from pathlib import Path

from megatron_lora.config.rules import one_of
from scheduling.cost import DEVICES, Device

PROCESS_BYTES = 1e9  # memory of a rank on CPU before it has a model
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def named_device(option: str, name: str) -> Device:
    """Return a device of the table; UserError, naming the command-line `option`, for a name that is not in it."""
    return DEVICES[one_of(*DEVICES)(option, name)]


def reference_of(device: Device) -> Device:
    """Return the device whose throughput decides plans and splits: a measured one itself, else the CPU or, for every GPU, an H100."""
    if device.measured is not None:
        return device
    return DEVICES["cpu" if device.name == "cpu" else "h100"]


def this_gpu() -> Device | None:
    """Return the current GPU with its free memory, or None without a GPU; imports torch.

    A GPU that is not in the table gets an H100's throughput.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return device_like(torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[0]))


def device_like(name: str, memory_bytes: float) -> Device:
    """Return a device by its full name, with the throughput of the table's device whose name is part of it, else an H100's."""
    like = next((DEVICES[known] for known in DEVICES if known in name.lower()), DEVICES["h100"])
    return dataclasses.replace(like, name=name, memory_bytes=memory_bytes)


def this_device(world_size: int) -> Device:
    """Return the device of one of a run's `world_size` ranks on this machine: its GPU, or the CPU with a share of the memory.

    torchrun says how many ranks are on this machine; without it all are.
    """
    share = max(0.0, machine_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) - PROCESS_BYTES)
    return this_gpu() or dataclasses.replace(DEVICES["cpu"], memory_bytes=share)


def machine_bytes() -> float:
    """Return the bytes of this machine's memory, or of the part that its container may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path(file).read_text().strip() for file in CGROUP_LIMITS if os.access(file, os.R_OK)]
    return float(min([total, *(int(limit) for limit in limits if limit.isdigit())]))


def size(num_bytes: float) -> str:
    """Return bytes as text, in GB or MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
