"""Keys of Triton's disk cache that do not depend on which kernel a process launches first.

A kernel's key holds the global constants of the functions that it calls. Triton 3.6 collects them from a function before it reads that
function's source, and so misses those of every function that no other kernel has called yet. The same kernel then has different keys in
different processes and is compiled more than once. Hence all keys are computed in one order before the first launch.

At each launch Triton compares those constants with what they were when the key was computed, which takes 1 to 2 us each and up to 40 us
for a kernel. Ours do not change, so that afterwards there is nothing left to compare.
"""

import sys

from triton.runtime.jit import JITFunction


def fix_cache_keys() -> None:
    """Compute the keys of all Triton functions in this package's imported modules."""
    modules = sorted(name for name in sys.modules if name.startswith("fused_ops."))
    functions = [found for name in modules for _, found in sorted(vars(sys.modules[name]).items()) if isinstance(found, JITFunction)]
    for function in functions:  # none under the interpreter
        function.cache_key  # noqa: B018  computed on first use, and cached
    for function in functions:  # once all keys are there: a caller's has its functions' constants too
        function.used_global_vals = {}
