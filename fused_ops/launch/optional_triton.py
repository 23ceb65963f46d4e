"""`triton` and `triton.language` where Triton is installed; elsewhere stand-ins, so that modules with kernels can be imported.

    from fused_ops.launch.optional_triton import tl, triton

A stand-in has every attribute that a kernel's definition uses, and is a decorator. Launching such a kernel raises RuntimeError.
No CPU run launches one, since `backend.backend_name` chooses the references there.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # To a type checker every name is Any: a kernel is written in Triton's language, which annotations of Python do not describe.
    triton: Any

    class _AnyName(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_AnyName):  # a class, so that tl.constexpr can annotate
        constexpr = Any

else:
    try:
        import triton
        import triton.language as tl
    except ImportError:

        class _Absent:
            """In place of Triton and its names: attributes and calls return the object itself, launching it as a kernel is an error."""

            def __getattr__(self, name: str) -> Any:
                return self

            def __call__(self, *arguments: Any, **options: Any) -> Any:
                return self

            def __getitem__(self, grid: object) -> Any:
                raise RuntimeError("Triton is not installed, and its kernels are what CUDA runs; pip install triton")

        triton = tl = _Absent()


def constants(*numbers: int) -> tuple[Any, ...]:
    """Return numbers as kernels may read them from a module: tl.constexpr, whose number is `.value`."""
    return tuple(tl.constexpr(number) for number in numbers)  # pyright: ignore[reportCallIssue]  Any above


__all__ = ["constants", "tl", "triton"]
