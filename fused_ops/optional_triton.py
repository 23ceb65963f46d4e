"""`triton` and `triton.language` where Triton is installed; elsewhere stand-ins, so that the twins beside its kernels can be imported.

    from fused_ops.optional_triton import tl, triton

A stand-in is whatever a kernel's definition asks of it: any attribute, and a decorator. Launching such a kernel raises RuntimeError.
No CPU run launches one, since `backend.backend_name` takes the references there.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands for Triton and all of its names: attributes and calls return it again, launching it as a kernel is an error."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self

        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("Triton is not installed, and its kernels are what CUDA runs; pip install triton")

    triton: Any = _Absent()
    tl: Any = triton

__all__ = ["tl", "triton"]
