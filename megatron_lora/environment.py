"""What a run ran on: versions, commit, machine. A run writes it to env.json, and doctor prints it.

{"python": "3.11.7", "packages": {"torch": "2.13.0+cpu", ...}, "commit": "1c77690...", "devices": [...], ...}
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from megatron_lora import __version__

PACKAGES = (
    *("torch", "megatron-core", "triton", "transformers", "tokenizers", "safetensors", "numpy"),
    *("transformer-engine", "nvidia-cudnn-frontend", "liger-kernel", "peft", "tensorboard", "wandb"),
)
SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_", "PYTORCH_", "TORCH_", "TRITON_", "SLURM_JOB_ID", "SLURM_NODELIST")


def environment() -> dict:
    """Describe this process's software and machine as plain data."""
    return {
        "megatron_lora": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions(),
        "devices": devices(),
        "cores": num_cores(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "directory": os.getcwd(),  # from which the relative paths of the config lead
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def versions() -> dict[str, str]:
    """Return the installed versions of the PACKAGES that are installed."""
    return {name: found for name in PACKAGES if (found := version(name))}


def version(package: str) -> str | None:
    """Return the installed version of a package, without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit that this package runs from, plus "+changes" when tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def devices() -> list[str]:
    """Return the names of the visible CUDA devices; imports torch."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocator_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to the environment before torch starts CUDA; nothing if torch's allocator has settings already.

    Segments of fixed size leave gaps into which no later microbatch fits: 8 of 80 GB, on a stage
    that uses all of its memory budget.
    """
    is_set = environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
    return {} if is_set else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return run.stdout.strip()
