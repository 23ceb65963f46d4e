"""What each version of Triton is used for: the one place where its version decides between kernels. Does not import Triton.

    3.6         measured; the kernels are tuned for it (torch 2.10 and 2.11 pin it)
    3.7 to 3.9  the kernels for Hopper compile as well, without serialised products; 3.8 spills up to 76 bytes in hopper/grad_sb.py at
                rank 32 (torch 2.12 and 2.13 pin 3.7, torch 2.14 pins 3.8). Not measured on a GPU. Only the GEMM in plain Triton needs
                another way, `adds_ranks_ahead`
    others      Gluon is experimental and its names change: kernels in plain Triton take the place of those for Hopper

tests/fused_ops/test_kernels_compile.py compiles them all with the Triton that is installed, and fails where that is none of these.
"""

from importlib import metadata

FIRST, LAST = (3, 6), (3, 9)


def triton_version() -> tuple[int, ...]:
    """Return (major, minor) of the installed Triton, () where there is none."""
    for package in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        try:
            return tuple(int(number) for number in metadata.version(package).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return ()


VERSION = triton_version()


def compiles_gluon(version: tuple[int, ...] = VERSION) -> bool:
    """Return whether the kernels of lora/hopper are known to compile with this Triton."""
    return FIRST <= version <= LAST


def adds_ranks_ahead(version: tuple[int, ...] = VERSION) -> bool:
    """Return whether the GEMM in plain Triton has registers for its first ranks as a product without a mask.

    From 3.7 on ptxas serialises the whole product for it (C7511), so that a tile of one adapter takes the masked product like others.
    """
    return version <= (3, 6)
