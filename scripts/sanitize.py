"""Runs a small case of every kernel under compute-sanitizer, after a planted out-of-bounds write was caught.

    python scripts/sanitize.py [--tool memcheck] [--only linear ...] [--jobs 6]    needs CUDA, its compute-sanitizer, and pytest

torch's caching allocator is off, so that every tensor ends where its allocation ends. The exit status is 0 if all cases are clean, 1 if one
is not or if the planted write is not caught, 2 without a GPU or the tools.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU = "tests/fused_ops/gpu"
CASES = {  # name: what pytest runs
    "linear": [f"{GPU}/test_kernels.py", "-k", "accurate and (ragged or merged or mixed or odd) or float32"],
    "tiles": [f"{GPU}/test_kernels.py", "-k", "accurate and many"],
    "adamw": [f"{GPU}/test_kernels.py", "-k", "adamw"],
    "elementwise": [f"{GPU}/test_elementwise.py"],
    "loss": [f"{GPU}/test_cross_entropy.py", "-k", "not beyond_31_bits"],
    "fp8": [f"{GPU}/test_fp8.py", "-k", "not graph"],  # a graph cannot be captured without the caching allocator
}
CAUGHT = 9


def plant() -> None:
    """Write one number behind a tensor."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def write_behind(x_ptr, size):
        tl.store(x_ptr + size, 1.0)

    x = torch.zeros(1001, device="cuda")  # an odd size: no other allocation follows its last byte directly
    write_behind[(1,)](x, x.numel())
    torch.cuda.synchronize()


def watched(tool: str, command: list[str]) -> int:
    """Run a Python command under the sanitizer, then show its output; return its exit status, CAUGHT where an error was found."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(CAUGHT), "--target-processes", "all"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitized = [*sanitizer, sys.executable, *command]
    done = subprocess.run(sanitized, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ {' '.join(command)}\n{done.stdout}", flush=True)
    return done.returncode


def main() -> int:
    """Run the planted write, then the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", default="memcheck", choices=["memcheck", "initcheck", "synccheck"])
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--jobs", type=int, default=1, help="cases that run side by side; most of their time is compilation")
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plant:
        plant()
        return 0
    import torch

    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        print("sanitize.py: needs a CUDA GPU, and compute-sanitizer on the path (it comes with the CUDA toolkit)", file=sys.stderr)
        return 2
    if options.tool == "memcheck" and watched(options.tool, [str(Path(__file__).resolve()), "--plant"]) != CAUGHT:
        print("sanitize.py: the planted out-of-bounds write was not caught, so the cases would prove nothing", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        ends = pool.map(lambda name: watched(options.tool, ["-m", "pytest", "-q", *CASES[name]]), options.only)
        found = dict(zip(options.only, ends, strict=True))
    for name, status in found.items():
        print(f"{name}: {'clean' if status == 0 else 'errors' if status == CAUGHT else f'pytest ended with {status}'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
