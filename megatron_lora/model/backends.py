"""What computes a run on a machine: the rules, as functions of plain facts, for the checks, the trainer and `doctor`.

    backend: auto     our kernels, and cuDNN's attention where nvidia-cudnn-frontend is installed and it works on this GPU, else torch's
                      variable-length attention; Transformer Engine's attention where a GPU's torch has none
             torch    our kernels and torch's attention
             te       Transformer Engine's norms, and its attention where its cuDNN runs it on this GPU, forward and backward

Ours come first: they add the residual inside the norm and make a norm's output again inside its backward, which Transformer Engine's
do in passes of their own. Linears are ours whatever stands here. Whether cuDNN's or Transformer Engine's attention works is not known
from versions: it is tried once, at start-up, on the device (`fall_back`), and what fails is said and replaced.
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
    """The facts that rules look at: the GPU's compute capability (None: no GPU), and what is installed."""

    capability: tuple[int, int] | None
    varlen: bool = True  # torch has variable-length attention
    engine: str | None = None  # version of Transformer Engine
    cudnn: str | None = None  # version of nvidia-cudnn-frontend


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """Who makes the norms between layers ("ours" or "te") and the attention ("torch", "te" or "cudnn")."""

    norms: str = "ours"
    attention: str = "torch"


OURS = Backends()


def this_machine() -> Machine:
    """Look at this machine; imports torch, not Transformer Engine."""
    import torch

    return Machine(
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        engine=version("transformer-engine"),
        cudnn=version("nvidia-cudnn-frontend"),
    )


def choose(backend: str, machine: Machine) -> Backends:
    """Return what a run with `backend` uses on a machine. Raises UserError where that is not there."""
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
    """Check that this machine has what `backend` and `base_weights` ask for; imports Transformer Engine where it is to be used."""
    machine = machine or this_machine()
    if "te" in dataclasses.astuple(choose(config.backend, machine)):
        import_engine(config.backend)
    elif machine.engine is not None:
        _check_harmless(machine.engine)
    if config.base_weights == "fp8" and machine.capability is not None and machine.capability < FP8_CAPABILITY:
        found, needed = (".".join(map(str, numbers)) for numbers in (machine.capability, FP8_CAPABILITY))
        raise UserError(f"base_weights: 'fp8' needs a GPU of compute capability {needed} or later, and this one has {found}; use native")


def import_engine(backend: str) -> ModuleType:
    """Return transformer_engine.pytorch, its plain-torch attention, which holds T x T scores, ruled out.

    Raises UserError in one line where it does not load: its parts fit one torch and one CUDA alone.
    """
    import torch  # noqa: F401  brings the libraries that Transformer Engine looks for

    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"backend: {backend!r}: Transformer Engine does not load ({first_line(error)}); "
            "install a version built for this torch, or use torch"
        ) from None


def _check_harmless(found: str) -> None:
    """Check that megatron-core can be imported beside Transformer Engine: it does without one that raises ImportError, and no other."""
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
    """Return what is left after another's attention was tried, and a line for the user; `fault` is empty where it worked.

    Raises UserError where nothing takes its place.
    """
    name = ATTENTION[backends.attention]
    if not fault:
        return backends, f"attention: {name}, tried on this GPU"
    if not machine.varlen:
        raise UserError(f"backend: {name} attention fails on this GPU ({fault}); install torch 2.11 or newer")
    return dataclasses.replace(backends, attention="torch"), f"attention: torch's, since {name} fails on this GPU ({fault})"
