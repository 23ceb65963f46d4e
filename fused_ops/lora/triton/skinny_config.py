"""How the kernels that read X or dY once are cut: pure functions of shapes.

They are bound by memory, so the bytes in flight decide: few programs, each with a deep pipeline of TMA loads, and as few partial
sums as that allows. Without TMA the pipeline is shallower and several programs share a multiprocessor.
"""

from dataclasses import dataclass

from fused_ops.launch.shapes import cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class DownConfig:
    """S and dS: rows of a program, inner block, pipeline stages, warps, and the programs wanted for each multiprocessor."""

    rows: int = 64
    inner: int = 128
    stages: int = 6
    warps: int = 4
    per_processor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """dA and dB: rows of a step, columns of a program, stages, warps, rows of an item, and how the product is laid out.

    `by_column`: the accumulator is [columns, ranks], else [ranks, columns] with the ranks padded to at least `min_rank`.
    """

    rows: int = 64
    columns: int = 128
    stages: int = 6
    warps: int = 4
    item_rows: int = 2048
    by_column: bool = True
    min_rank: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesConfig:
    """dS and dB from one read: rows of a step, columns of a program, stages, warps."""

    rows: int = 64
    columns: int = 512
    stages: int = 3
    warps: int = 8


def down_config(rank: int, num_modules: int, dropout: bool, item_size: int, tma: bool) -> DownConfig:
    """Return how to cut S (or dS) of a rank block."""
    if not tma or item_size > 2:
        inner = 64 if item_size <= 2 else 32
        return DownConfig(inner=inner, stages=3, warps=4 if rank <= 64 else 8, per_processor=4)
    if dropout and rank * num_modules <= 48:
        return DownConfig(rows=32, stages=4, per_processor=4, warps=2)
    if dropout:
        return DownConfig(inner=64, stages=4, per_processor=2, warps=8 if rank * num_modules > 128 else 4)
    if rank <= 32:
        return DownConfig(inner=256, stages=4)
    return DownConfig(stages=5 if rank <= 64 else 4)


def rows_config(rank: int, num_modules: int, dropout: bool, item_size: int, tma: bool) -> RowsConfig:
    """Return how to cut dA (or dB) of a rank block."""
    wide = rank * num_modules > 64
    if not tma or item_size > 2:
        return RowsConfig(columns=64 if wide else 128, stages=3 if item_size <= 2 else 2, warps=8, item_rows=512, by_column=False)
    if dropout:
        columns, padded = (64 if num_modules > 1 or wide else 128), (64 if wide else 16)
        return RowsConfig(columns=columns, stages=4, item_rows=1024, by_column=False, min_rank=padded, warps=8 if wide else 4)
    return RowsConfig(stages=6 if rank <= 64 else 4, warps=8 if wide else 4)


def shares_config(num_cols: int, rank: int, item_size: int, tma: bool) -> SharesConfig:
    """Return how to cut dS and dB of a rank block of at most 32."""
    if not tma or item_size > 2:
        columns = 256 if num_cols <= 8192 or item_size > 2 else 512
        return SharesConfig(columns=columns, stages=3 if item_size <= 2 else 2)
    return SharesConfig(columns=512 if rank <= 16 else 256)


def splits(num_rows: int, num_inner: int, config: DownConfig, processors: int) -> int:
    """Return the number of programs among which the inner dimension of S is cut."""
    wanted = int(config.per_processor * processors) // cdiv(max(num_rows, 1), config.rows)
    return max(1, min(wanted, num_inner // 512))
