"""Chooses the libraries that compute norms and attention. Plain functions, which the checks, the trainer and `doctor` share.

    backend: auto     our norms and, on a GPU, cuDNN's attention if nvidia-cudnn-frontend is installed and it works there, else torch's
                      variable-length attention; Transformer Engine's attention if torch has none
             torch    our norms and torch's attention
             te       Transformer Engine's norms, and its attention if it runs on this GPU, forward and backward

    deterministic: true takes `torch` for `auto`, whose attention alone has a fixed order of sums that fits any samples

Our norms are the default because they add the residual, and recompute their output in backward, in one
kernel; Transformer Engine needs several. Linears are always ours. Versions do not tell whether cuDNN's or
Transformer Engine's attention runs on a GPU, so it is tried once at start-up. If it fails, torch's takes
its place, and a line says so (`fall_back`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from types import ModuleType

from megatron_lora.config.schema import RunConfig
from megatron_lora.environment import version
from megatron_lora.errors import UserError

FP8_CAPABILITY = (8, 9)
INSTALL_ENGINE = "pip install --no-build-isolation -e '.[te]'"
INSTALL_CUDNN = "pip install -e '.[cudnn]'"
ATTENTION = {"torch": "torch's", "te": "Transformer Engine's", "cudnn": "cuDNN's"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the choice depends on: the GPU's compute capability (None: no GPU), and what is installed."""

    capability: tuple[int, int] | None
    varlen: bool = True  # torch has variable-length attention
    engine: str | None = None  # version of Transformer Engine
    cudnn: str | None = None  # version of nvidia-cudnn-frontend


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """The library that computes the norms between layers ("ours" or "te") and the attention ("torch", "te" or "cudnn")."""

    norms: str = "ours"
    attention: str = "torch"


OURS = Backends()


def this_machine() -> Machine:
    """Return the facts of this machine; imports torch, not Transformer Engine."""
    import torch

    return Machine(
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        engine=version("transformer-engine"),
        cudnn=version("nvidia-cudnn-frontend"),
    )


def backend_of(config: RunConfig) -> str:
    """Return the backend that a run takes its norms and attention from."""
    return "torch" if config.deterministic else config.backend


def choose(backend: str, machine: Machine) -> Backends:
    """Return what a run with `backend` uses on a machine. Raises UserError if the machine lacks it."""
    if backend == "te":
        if machine.capability is None:
            raise UserError("backend: 'te' is Transformer Engine, which needs a CUDA GPU, and none is visible; use auto")
        if machine.engine is None:
            raise UserError(f"backend: 'te' is Transformer Engine, which is not installed; {INSTALL_ENGINE}, or use auto")
        return Backends(norms="te", attention="te")
    if machine.capability is not None and machine.cudnn is not None and backend == "auto":
        return Backends(attention="cudnn")
    if machine.capability is None or machine.varlen:
        return OURS
    if backend == "torch" or machine.engine is None:
        raise UserError(f"backend: {backend!r} needs torch.nn.attention.varlen on a GPU; install torch 2.11 or newer")
    return Backends(attention="te")


def check_backends(config: RunConfig, machine: Machine | None = None) -> None:
    """Raise UserError if this machine lacks what `backend` or `base_weights` need; imports Transformer Engine if it is used."""
    machine = machine or this_machine()
    backend = backend_of(config)
    if "te" in dataclasses.astuple(choose(backend, machine)):
        import_engine(backend)
    elif machine.engine is not None:
        _check_harmless(machine.engine)
    if "fp8" in config.base_weights and machine.capability is not None and machine.capability < FP8_CAPABILITY:
        found, needed = (".".join(map(str, numbers)) for numbers in (machine.capability, FP8_CAPABILITY))
        raise UserError(
            f"base_weights: {config.base_weights!r} needs a GPU of compute capability {needed} or later, and this one has {found}; "
            "use native, or nf4/bf16"
        )


def import_engine(backend: str) -> ModuleType:
    """Return transformer_engine.pytorch, with its plain-torch attention disabled, which would hold T x T scores.

    Raises UserError if it does not load: a build of it fits one version of torch and of CUDA alone.
    """
    import torch  # noqa: F401  loads the libraries that Transformer Engine links to

    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"backend: {backend!r}: Transformer Engine does not load ({first_line(error)}); "
            "install a version built for this torch, or use torch"
        ) from None


def _check_harmless(found: str) -> None:
    """Raise UserError if an unused Transformer Engine breaks the import of megatron-core, which ignores its ImportErrors alone."""
    import torch  # noqa: F401

    try:
        importlib.import_module("transformer_engine")
    except ImportError:
        return
    except (OSError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"transformer-engine {found} does not load ({first_line(error)}), and megatron-core imports it wherever it is installed; "
            "install a version built for this torch, or pip uninstall transformer-engine"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 120 else text[:117] + "..."


def fall_back(backends: Backends, machine: Machine, fault: str) -> tuple[Backends, str]:
    """Return the backends after their attention was tried, and a line for the user; `fault` is empty if it worked.

    Raises UserError if torch has no attention to take its place.
    """
    name = ATTENTION[backends.attention]
    if not fault:
        return backends, f"attention: {name}, tried on this GPU"
    if not machine.varlen:
        raise UserError(f"backend: {name} attention fails on this GPU ({fault}); install torch 2.11 or newer")
    return dataclasses.replace(backends, attention="torch"), f"attention: torch's, since {name} fails on this GPU ({fault})"
