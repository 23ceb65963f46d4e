"""Keys of Triton's disk cache that do not depend on the kernel that a process happens to launch first.

A kernel's key holds the global constants of the functions that it calls. Triton 3.6 takes them from a function before it looks through its
source, and so misses those of every function that no other kernel has called yet: the same kernel has other keys in other processes, and is
compiled again. Hence the keys of all functions are made in one order, before anything is launched.
"""

import sys

from triton.runtime.jit import JITFunction


def fix_cache_keys() -> None:
    """Make the keys of all Triton functions in this package's modules that are imported by now."""
    modules = sorted(name for name in sys.modules if name.startswith("fused_ops."))
    for name in modules:
        for _, function in sorted(vars(sys.modules[name]).items()):
            if isinstance(function, JITFunction):  # not under the interpreter
                function.cache_key  # noqa: B018  made on first use, and kept
