"""Lets megatron-core be imported where Triton is not installed, and without torch's compiler.

Since 0.19 one module of its mixtures of experts imports Triton unconditionally, and everything
imports that module. It becomes a stand-in whose functions raise RuntimeError; no base model here has
experts. And megatron-core compiles functions where it defines them, which loads torch's compiler: a
third of a rank's imports. Nothing here calls these functions, so they stay as they are written.

parallel/__init__ calls `prepare`; model/__init__, the other room that imports megatron-core, imports
parallel/ first. Neither imports megatron-core itself, which takes seconds.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from unittest import mock

EXPERTS = "megatron.core.transformer.moe.ops.paged_stash"


def prepare() -> None:
    """Prepare the first import of megatron-core; nothing where it is imported already."""
    if "megatron.core" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
    if find_spec("triton") is None and EXPERTS not in sys.modules:
        module = ModuleType(EXPERTS)
        module.__getattr__ = _refusing
        sys.modules[EXPERTS] = module


class _Finder:
    """Finds megatron-core, once, as the others do; while it is loaded, `torch.compile` returns what it is given."""

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != "megatron.core" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _not_compiling(execute, module)
        return spec


def _not_compiling(execute, module: ModuleType) -> None:
    import torch

    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda other: other)):
        execute(module)


def _refusing(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"{EXPERTS}.{name} needs Triton; pip install triton")

    return refuse
