"""Cross-entropy over a frozen head, in chunks of rows, so that the full logits never exist.

    loss_t = log sum_v exp(h_t . w_v) - h_t . w_label        dh_t = g_t * (softmax(h_t W^T) - onehot(label)) W

The gradient with g = 1 is made while a chunk's logits are there (the head is frozen: only dh is wanted), and backward scales its rows by
the upstream gradient g, which is where a row's weight enters: two GEMMs in all, and nothing is kept but one tensor like `hidden`.
Rows are independent to the last bit: a NaN in one stays there. A label of -100 gives loss 0 and gradient 0.

Under tensor parallelism each rank holds a range of the vocabulary; maxima, sums and target logits are reduced per chunk, the gradient
once. Under sequence parallelism `hidden` is a shard of rows: it is gathered first and its gradient is reduce-scattered, while losses are
of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.layers import all_reduce, gather_rows, scatter_rows

CHUNK_LOGITS = 2**25  # logits that exist at a time (fp32: 128 MiB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output matrix of this rank: rows [first_token, first_token + len(weight_VH)) of the vocabulary, without padding rows."""

    weight_VH: Tensor
    first_token: int
    group: dist.ProcessGroup
    sequence_parallel: bool


def cross_entropy(hidden: Tensor, labels: Tensor, head: Head, chunk_rows: int | None = None) -> Tensor:
    """Return each row's loss, fp32 [T], differentiable in `hidden` [T_local, H]; `labels` int64 [T], -100 for none."""
    rows = chunk_rows or max(1, CHUNK_LOGITS // head.weight_VH.shape[0])
    return _ChunkedCrossEntropy.apply(hidden, labels, head, rows, hidden.requires_grad and torch.is_grad_enabled())


@torch.no_grad()
def logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the full logits [T, vocabulary], whole on every rank, without a graph. For tests: training never makes them."""
    full = gather_rows(hidden, head.group) if head.sequence_parallel else hidden
    part = full @ head.weight_VH.t()
    if head.group.size() == 1:
        return part
    widths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(head.group.size())]
    dist.all_gather(widths, torch.tensor([part.shape[1]], device=part.device), group=head.group)
    widest = max(int(width) for width in widths)
    parts = [part.new_empty(part.shape[0], widest) for _ in widths]
    dist.all_gather(parts, torch.nn.functional.pad(part, (0, widest - part.shape[1])).contiguous(), group=head.group)
    return torch.cat([whole[:, : int(width)] for whole, width in zip(parts, widths, strict=True)], dim=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, chunk_rows, with_grad):
        full = gather_rows(hidden, head.group) if head.sequence_parallel else hidden
        assert labels.shape == full.shape[:1], f"{list(labels.shape)} labels for {list(full.shape)} hidden states"
        losses = torch.empty(full.shape[0], dtype=torch.float32, device=full.device)
        grad = torch.empty_like(full) if with_grad else None
        for start in range(0, full.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            losses[rows], residual = _chunk(full[rows], labels[rows], head)
            if grad is not None:
                torch.mm(residual.to(full.dtype), head.weight_VH, out=grad[rows])
            del residual  # or it would live beside the next chunk's logits
        if grad is not None and head.group.size() > 1:
            grad = scatter_rows(grad, head.group) if head.sequence_parallel else all_reduce(grad, head.group)
        ctx.head, ctx.grad = head, grad
        return losses

    @staticmethod
    def backward(ctx, upstream):
        head, grad = ctx.head, ctx.grad
        if head.sequence_parallel:
            upstream = upstream[head.group.rank() * grad.shape[0] :][: grad.shape[0]]
        ctx.grad = None
        # A row without weight passes nothing on, whatever it holds (0 * NaN is NaN).
        scaled = torch.where((upstream == 0)[:, None], 0.0, grad * upstream[:, None])
        return scaled.to(grad.dtype), None, None, None, None


def _chunk(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return the losses [C] of some rows and softmax - onehot [C, V_local], both fp32."""
    values = (hidden @ head.weight_VH.t()).float()
    highest = _reduced(values.amax(dim=1), dist.ReduceOp.MAX, head)
    local = labels - head.first_token
    owned = (local >= 0) & (local < values.shape[1])
    column = torch.where(owned, local, 0)[:, None]
    values.sub_(highest[:, None])
    target = torch.where(owned, values.gather(1, column).squeeze(1), 0.0)
    values.exp_()
    total, target = _reduced(torch.stack((values.sum(dim=1), target)), dist.ReduceOp.SUM, head)
    counted = labels >= 0
    losses = torch.where(counted, total.log() - target, 0.0)
    values.div_(total[:, None])
    values.scatter_add_(1, column, -owned.float()[:, None])
    values.masked_fill_(~counted[:, None], 0.0)
    return losses, values


def _reduced(x: Tensor, op: dist.ReduceOp, head: Head) -> Tensor:
    if head.group.size() > 1:
        dist.all_reduce(x, op=op, group=head.group)
    return x
