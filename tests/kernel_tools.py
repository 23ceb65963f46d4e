"""Running and compiling Triton kernels where there is no GPU.

Inside `interpreted(module)` the module's kernels run in Triton's interpreter, on CPU tensors (float32 and float16: bfloat16 dot products
are wrong there). `compile_for_hopper` compiles a kernel for sm_90 and returns what ptxas reports.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.experimental.gluon  # noqa: F401  its import reads tl, so it comes before any replacement there
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def interpreted(*modules) -> Iterator[None]:
    """Replace every kernel in the modules, and every function that kernels call, by its interpreted twin.

    The interpreter does not undo some of its own replacements in triton.language; they are undone here at the end, so that kernels can
    still be compiled in this process.
    """
    owners = (*modules, tl, tl.core, tl.standard, tl.math, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    for owner, names in zip(owners, before, strict=True):
        for name, value in names.items():
            if isinstance(value, JITFunction):
                setattr(owner, name, InterpretedFunction(value.fn))
    try:
        yield
    finally:
        for owner, names in zip(owners, before, strict=True):
            for name, value in dict(vars(owner)).items():
                if name not in names and isinstance(owner, type):  # what it adds to a module's globals is needed later
                    delattr(owner, name)
                elif name in names and value is not names[name]:
                    setattr(owner, name, names[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ptxas reports of a kernel."""

    registers: int
    spilled_bytes: int
    ptx: str


def compile_for_hopper(
    kernel: JITFunction, *, arguments: dict, constants: dict, aligned: tuple[str, ...] = (), num_warps: int = 4
) -> Report:
    """Compile a kernel. `arguments` name -> Triton type ("*bf16", "i32"); `aligned` names integers known to be multiples of 16.

    Pointers count as aligned, as torch's are; None among `constants` is an absent pointer.
    """
    names = kernel.arg_names
    assert set(names) == set(arguments) | set(constants), set(names) ^ (set(arguments) | set(constants))
    signature = {name: arguments.get(name, "constexpr") for name in names}
    multiples = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if arguments.get(name, "").startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, multiples)
    ptx = triton.compile(source, target=HOPPER, options={"num_warps": num_warps}).asm["ptx"]
    return _assemble(ptx)


def _assemble(ptx: str) -> Report:
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(HOPPER.arch).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [path, "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    serialised = re.findall(r".*C75(?:10|11|15).*", output)
    assert not serialised, serialised
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output))
    return Report(registers=max(int(n) for n in re.findall(r"Used (\d+) registers", output)), spilled_bytes=spilled, ptx=ptx)


def setting_row(
    *, lr: float, beta1: float, beta2: float, epsilon: float, weight_decay: float, clip_scale: float, step: int, finite: bool = True
) -> tuple[float, ...]:
    """Return one job's row of `settings`; `step` counts applied steps from 1, this one included.

    Everything that cancels (1 - beta, the bias corrections, 1 - lr * decay) is computed here, in float64.
    """
    if step < 1:
        raise ValueError(f"step {step} of AdamW is not positive")
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    return (
        lr / correction1,
        beta1,
        beta2,
        epsilon,
        1.0 - lr * weight_decay,
        clip_scale,
        correction2**0.5,
        float(finite),
        1.0 - beta1,
        1.0 - beta2,
    )
