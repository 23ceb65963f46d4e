"""The collectives of column- and row-parallel linears over the tensor ranks, without and with sequence parallelism.

Column-parallel linears all-reduce dX, row-parallel ones Y. Under sequence parallelism a rank holds a
shard of the rows between linears. Column-parallel linears then all-gather X and reduce-scatter dX and dS;
row-parallel ones reduce-scatter Y and all-gather dY. (S = X A^T; dS is its gradient.)
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fused_ops.lora.linear import Collectives
from megatron_lora.parallel import compat


class _Grouped(Collectives):
    """Collectives over the tensor ranks of a linear."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group


class ColumnCollectives(_Grouped):
    """Every rank has all rows of X; dX is all-reduced."""

    def reduce_grad(self, dx: Tensor) -> Tensor:
        return all_reduce(dx, self.group)


class ColumnSequenceCollectives(_Grouped):
    """X is a shard of rows, all-gathered for the GEMM; dX and dS are reduce-scattered."""

    def gather_input(self, x: Tensor) -> Tensor:
        return gather_rows(x, self.group)

    def reduce_grad(self, dx: Tensor) -> Tensor:
        return scatter_rows(dx, self.group)

    def reduce_ds(self, ds: Tensor) -> Tensor:
        return scatter_rows(ds, self.group)

    def local_rows(self, num_rows: int) -> tuple[int, int]:
        size = num_rows // self.group.size()
        return self.group.rank() * size, (self.group.rank() + 1) * size


class RowCollectives(_Grouped):
    """Y is a partial sum, all-reduced."""

    def reduce_output(self, y: Tensor) -> Tensor:
        return all_reduce(y, self.group)


class RowSequenceCollectives(_Grouped):
    """Y is a partial sum, reduce-scattered into shards of rows; dY is all-gathered."""

    def reduce_output(self, y: Tensor) -> Tensor:
        return scatter_rows(y, self.group)

    def gather_grad(self, dy: Tensor) -> Tensor:
        return gather_rows(dy, self.group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x summed over the group, in place where x is contiguous."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all ranks' rows, in rank order: [T / t, N] -> [T, N]."""
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    compat.all_gather_single(out, x.contiguous(), group=group)
    return out


def scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows of the sum over the group: [T, N] -> [T / t, N]; T must be a multiple of the group's size."""
    assert x.shape[0] % group.size() == 0, f"{x.shape[0]} rows do not divide among {group.size()} tensor-parallel ranks"
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    compat.reduce_scatter_single(out, x.contiguous(), group=group)
    return out
