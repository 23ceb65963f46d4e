"""Time the unpacking of stored weights, the transpose of 8 bits among it, at the linears of an 8B and a 70B, in bytes read and written.

    python -m scripts.bench.unpack

Each case is a way that packed.PackedWeight unpacks. Appends one JSON line per case to scripts/bench/results/unpack.jsonl; refuses to run
where the kernel differs from its twin.
"""

import torch

from fused_ops.launch.timing import measure
from fused_ops.lora.fp8 import DTYPE, Fp8Matrix, quantise_rows
from fused_ops.lora.nf4 import quantise_nf4
from fused_ops.lora.packed import unpack_reference
from fused_ops.lora.triton.unpack import unpack
from scripts.bench import rig

SHAPES = [(57344, 8192), (8192, 28672), (10240, 8192), (8192, 8192), (28672, 4096), (4096, 14336)]  # N, K
WAYS = {  # name: (stored, unpacked to, transposed)
    "nf4 -> bf16": ("nf4", torch.bfloat16, False),
    "nf4 -> fp8": ("nf4", DTYPE, False),
    "nf4 -> fp8, transposed": ("nf4", DTYPE, True),
    "fp8 -> bf16": ("fp8", torch.bfloat16, False),
    "fp8, transposed": ("fp8", DTYPE, True),
}


def case(shape: tuple[int, int], stored: str, dtype: torch.dtype, transposed: bool, rounds: int) -> dict:
    """Return one case's line."""
    weight = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.bfloat16).mul_(0.02)
    matrix = quantise_nf4(weight) if stored == "nf4" else quantise_rows(weight)
    factors = torch.exp2(torch.arange(shape[0], device="cuda") % 3 - 2) if dtype == DTYPE else None
    out = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device="cuda")
    few = type(matrix)(**{name: getattr(matrix, name)[:300].contiguous() for name in matrix.__dataclass_fields__})
    small = torch.empty((shape[1], 300) if transposed else (300, shape[1]), dtype=dtype, device="cuda")
    twin = unpack_reference(few, None if factors is None else factors[:300], dtype, transposed)
    assert torch.equal(unpack(few, None if factors is None else factors[:300], small, transposed).float(), twin.float())
    candidates = {"ours": lambda: unpack(matrix, factors, out, transposed)}
    if isinstance(matrix, Fp8Matrix) and transposed:
        candidates["torch"] = lambda: out.copy_(matrix.values.T)
    times = measure(candidates, rounds)
    read = sum(getattr(matrix, name).nbytes for name in matrix.__dataclass_fields__)
    return {"ms": times["ours"][0], "gb_per_s": (read + out.nbytes) / times["ours"][0] / 1e6, "times_ms": rig.rounded(times)}


def main() -> None:
    """Run every way at every shape."""
    options = rig.options(rig.parser(__doc__, "unpack.jsonl", 20))
    for shape in SHAPES:
        for name, way in WAYS.items():
            row = {"case": f"{shape[1]}->{shape[0]}, {name}"} | case(shape, *way, options.rounds)
            torch_ms = row["times_ms"].get("torch", [None])[0]
            rig.keep(options, row, f"{row['case']:44s} {row['ms']:.3f} ms {row['gb_per_s']:,.0f} GB/s; torch {torch_ms} ms")


if __name__ == "__main__":
    main()
