"""What several kernels in plain Triton share: fields of an adapter's modules, accumulators, the last program to arrive, descriptors."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_ops.launch.shapes import unchecked
from fused_ops.lora.adapters import FIRST_A_ROW, MODULE_FIELDS, S_COLUMN


@triton.jit
def module_fields(adapter_ptr, rank, ROW_FIELD: tl.constexpr, MODULE: tl.constexpr, MODULES: tl.constexpr, WIDE: tl.constexpr):
    """Return (first rows of A or B, first columns of S, ranks) of an adapter's modules from MODULE on; ranks 0: it does not target one."""
    rows, columns, ranks = (), (), ()
    for m in tl.static_range(MODULE, MODULE + MODULES):
        row = tl.load(adapter_ptr + (FIRST_A_ROW if WIDE else ROW_FIELD + m * MODULE_FIELDS))
        rows += (row,)
        columns += (0 if WIDE else tl.load(adapter_ptr + S_COLUMN + m * MODULE_FIELDS),)
        ranks += (tl.where(row >= 0, rank, 0),)
    return rows, columns, ranks


@triton.jit
def zeros(NUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return NUM accumulators [ROWS, COLUMNS]."""
    found = ()
    for _ in tl.static_range(NUM):
        found += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return found


@triton.jit
def halves(b_acc):
    """Return the left and the right half of a block [rows, columns]."""
    rows: tl.constexpr = b_acc.shape[0]
    cols: tl.constexpr = b_acc.shape[1]
    return tl.split(tl.permute(tl.reshape(b_acc, (rows, 2, cols // 2)), (0, 2, 1)))


@triton.jit
def arrive_last(counter_ptr, num_programs):
    """Count this program in; return whether it was the last of num_programs, whose stores it then sees, and reset the counter."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


def described(tma: bool, *blocks: tuple[Tensor, int, int]) -> list:
    """Return matrices as kernels take them: with TMA by descriptors of blocks [rows, columns], else as they are."""
    return [unchecked(TensorDescriptor, each, [rows, columns]) if tma else each for each, rows, columns in blocks]
