"""The tile of the GEMM for Hopper: its sizes, and the layouts of its products and of their operands."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_ops.lora.hopper.dropout import mix, pair_keys
from fused_ops.lora.hopper.layouts import shared

BM, BN, RANK = gl.constexpr(128), gl.constexpr(256), gl.constexpr(16)  # rows and columns of a tile, ranks of a step
WM, WARPS = gl.constexpr(64), gl.constexpr(4)  # rows and warps of a warp group
HALF, QUARTER = gl.constexpr(128), gl.constexpr(64)  # columns of one accumulator, and of a masked product
STAGES = gl.constexpr(4)  # buffers of the ring


def product(columns: gl.constexpr, depth: int = 16) -> gl.constexpr:
    """Return the layout of a warp group's product of the given number of columns; an instruction sums over `depth`: 16, or 32 in 8 bits."""
    return gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS.value, 1], instr_shape=[16, columns.value, depth]))


S, LORA, LORA_PART = shared(WM, RANK), shared(RANK, HALF), shared(RANK, QUARTER)
ADDED = shared(WM, QUARTER)
PART = product(QUARTER)
ROWS, COLUMNS = gl.constexpr(gl.SliceLayout(1, PART.value)), gl.constexpr(gl.SliceLayout(0, PART.value))


@gluon.jit
def mask_hash(b_keys, first_feature):
    """Return the hash x of every (row key, feature), features first_feature (even) and on; neighbours share it."""
    b_pairs = pair_keys(first_feature + gl.arange(0, QUARTER, COLUMNS))
    return mix(gl.expand_dims(b_keys, 1), gl.expand_dims(b_pairs, 0))
