"""Lets megatron-core be imported where Triton is not installed.

Since 0.19 one module of its mixtures of experts imports Triton unconditionally, and everything imports that
module. It becomes a stand-in whose functions raise RuntimeError; no base model here has experts.
parallel/__init__ calls `stand_in_for_experts`; model/__init__, the other room that imports
megatron-core, imports parallel/ first.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

EXPERTS = "megatron.core.transformer.moe.ops.paged_stash"


def stand_in_for_experts() -> None:
    """Put the stand-in where megatron-core will look for the module, unless Triton is there or the module is already."""
    if find_spec("triton") is None and EXPERTS not in sys.modules:
        module = ModuleType(EXPERTS)
        module.__getattr__ = _refusing
        sys.modules[EXPERTS] = module


def _refusing(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"{EXPERTS}.{name} needs Triton; pip install triton")

    return refuse
