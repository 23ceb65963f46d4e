"""What down.py and grad_a.py share: products of operands in registers, whose left one is masked there for each module."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_ops.lora.adapters import MODULE_FIELDS

WARPS = gl.constexpr(4)
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS.value, 1], instr_shape=[16, 8]))
LEFT, RIGHT = (gl.constexpr(gl.DotOperandLayout(operand, ACC.value, k_width=2)) for operand in (0, 1))
LEFT_ROWS, RIGHT_ROWS, ACC_ROWS = (gl.constexpr(gl.SliceLayout(1, each.value)) for each in (LEFT, RIGHT, ACC))
LEFT_COLUMNS, ACC_COLUMNS = (gl.constexpr(gl.SliceLayout(0, each.value)) for each in (LEFT, ACC))


@gluon.jit
def zeros(MODULES: gl.constexpr, ROWS: gl.constexpr, RANK: gl.constexpr):
    """Return an accumulator [ROWS, RANK] for each module."""
    b_accs = ()
    for _ in gl.static_range(MODULES):
        b_accs += (gl.zeros([ROWS, RANK], gl.float32, ACC),)
    return b_accs


@gluon.jit
def first_ranks(adapter_ptr, i_rank, FIELD: gl.constexpr, MODULES: gl.constexpr):
    """Return where rank i_rank of each module lies: the row of A or the column of S in FIELD, or any where it is no target."""
    found = ()
    for m in gl.static_range(MODULES):
        found += (max(gl.load(adapter_ptr + FIELD + m * MODULE_FIELDS), 0) + i_rank,)
    return found
