"""Cross-entropy over a frozen head, in chunks of rows, so that the full logits are never in memory.

    loss_t = log sum_v exp(h_t . w_v) - h_t . w_label        dh_t = g_t * (softmax(h_t W^T) - onehot(label)) W

The head is frozen, so only dh is needed. Forward computes dh for g = 1 while it has a chunk's logits;
backward multiplies each row by its upstream gradient g, which contains the row's loss weight. That takes
two GEMMs in all, and only dh is kept. Rows are independent: a NaN in one row does not reach others. A
label of -100 gives loss 0 and gradient 0.

If the host lists the rows that are targets, the head is computed for these alone; in completion-only
training most rows are not. A GEMM's bits may depend on its number of rows, so chunks of targets are padded
to one height: then a row's bits do not depend on how many other rows are targets.

Evaluation wants no gradient, and besides the loss whether the label is the token that the model finds
likeliest: argmax_v h_t . w_v, of equal logits the first, which is what torch.argmax gives over the full logits.

Under tensor parallelism each rank holds a range of the vocabulary. Maxima, sums and target logits are
reduced per chunk, the gradient once. Under sequence parallelism `hidden` is a shard of rows: it is
gathered first and its gradient is reduce-scattered; the losses are those of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fused_ops.elementwise.cross_entropy import scatter_scaled, softmax_residual_, softmax_sums
from megatron_lora.parallel.collectives import all_reduce, gather_rows, scatter_rows
from scheduling.memory import loss_chunk_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output matrix of this rank: rows [first_token, first_token + len(weight_VH)) of the vocabulary, without padding rows.

    `widest` is the largest len(weight_VH) of any tensor rank; chunk heights follow from it, so that all ranks use the same.
    """

    weight_VH: Tensor
    first_token: int
    widest: int
    group: dist.ProcessGroup
    sequence_parallel: bool
    divisor: float = 1.0  # of the products, which gives the logits
    cap: float | None = None  # c: these are then c tanh(logits / c)

    def to_logits_(self, products: Tensor) -> Tensor:
        """Turn products of hidden states with the matrix into logits, in place."""
        if self.divisor != 1.0:
            products.div_(self.divisor)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)


def cross_entropy(hidden: Tensor, labels: Tensor, head: Head, targets: Tensor | None = None, chunk_rows: int | None = None) -> Tensor:
    """Return each row's loss, fp32 [T], differentiable in `hidden` [T_local, H]; `labels` int64 [T], -100 for none.

    `targets` int64 lists the rows to compute, each once, the same on all tensor ranks; every row with a label must be listed. None: all.
    """
    rows = chunk_rows or loss_chunk_rows(head.widest, hidden.element_size())
    return _ChunkedCrossEntropy.apply(hidden, labels, targets, head, rows, hidden.requires_grad and torch.is_grad_enabled())


@torch.no_grad()
def evaluate(
    hidden: Tensor, labels: Tensor, head: Head, targets: Tensor | None = None, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return each row's loss, fp32 [T], and whether its label has the highest logit, bool [T]; arguments as for `cross_entropy`."""
    full = gather_rows(hidden, head.group) if head.sequence_parallel else hidden
    rows = chunk_rows or loss_chunk_rows(head.widest, hidden.element_size())
    losses, right, _ = _in_chunks(full, labels, targets, head, rows, with_grad=False, with_right=True)
    return _all_rows(losses, targets, len(labels)), _all_rows(right, targets, len(labels))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, targets, head, chunk_rows, with_grad):
        full = gather_rows(hidden, head.group) if head.sequence_parallel else hidden
        num_rows, width = full.shape
        losses, _, grad = _in_chunks(full, labels, targets, head, chunk_rows, with_grad)
        del full
        losses = _all_rows(losses, targets, num_rows)
        if grad is not None and head.group.size() > 1:
            if head.sequence_parallel:
                grad = grad if targets is None else grad.new_zeros(num_rows, width).index_copy_(0, targets, grad)
                grad, targets = scatter_rows(grad, head.group), None
            elif len(grad):
                grad = all_reduce(grad, head.group)
        ctx.head, ctx.grad, ctx.targets = head, grad, targets
        return losses

    @staticmethod
    def backward(ctx, upstream):
        head, grad = ctx.head, ctx.grad
        if head.sequence_parallel:
            upstream = upstream[head.group.rank() * grad.shape[0] :][: grad.shape[0]]
        ctx.grad = None
        return scatter_scaled(grad, upstream.contiguous(), ctx.targets), None, None, None, None, None


def _in_chunks(
    full: Tensor, labels: Tensor, targets: Tensor | None, head: Head, chunk_rows: int, with_grad: bool, with_right: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return losses [N], where wanted which of them are right [N], and the gradient [N, H] for g = 1: of `targets`, or of all rows."""
    num_rows, width = full.shape
    assert labels.shape == (num_rows,), f"{list(labels.shape)} labels for {list(full.shape)} hidden states"
    height, num_wanted, chosen = min(chunk_rows, num_rows), num_rows if targets is None else len(targets), targets
    wanted = labels if targets is None else labels.index_select(0, targets)
    if targets is not None:
        chosen, wanted = (pad(listed, (0, -num_wanted % height), value=none) for listed, none in ((targets, 0), (wanted, -100)))
    losses = torch.empty(len(wanted), dtype=torch.float32, device=full.device)
    right = torch.zeros(len(wanted), dtype=torch.bool, device=full.device)
    grad = full.new_empty(len(wanted), width) if with_grad else None
    logits = full.new_empty(min(height, len(wanted)), head.weight_VH.shape[0])
    for start in range(0, len(wanted), height):
        rows = slice(start, min(start + height, len(wanted)))
        chunk = full[rows] if chosen is None else full.index_select(0, chosen[rows])
        parts = losses[rows], right[rows] if with_right else None, None if grad is None else grad[rows]
        _chunk(chunk, wanted[rows], head, logits[: len(chunk)], *parts)
    return losses[:num_wanted], right[:num_wanted], None if grad is None else grad[:num_wanted]


def _all_rows(values: Tensor, targets: Tensor | None, num_rows: int) -> Tensor:
    """Return the targets' values in their rows, and zeros in all others."""
    return values if targets is None else values.new_zeros(num_rows).index_copy_(0, targets, values)


def _chunk(hidden: Tensor, labels: Tensor, head: Head, logits: Tensor, losses: Tensor, right: Tensor | None, grad: Tensor | None) -> None:
    """Write the losses [C] of a chunk and, unless they are None, which labels are `right` [C] and the gradient [C, H] for g = 1.

    `logits` [C, V_local] is scratch.
    """
    head.to_logits_(torch.mm(hidden, head.weight_VH.t(), out=logits))
    highest, total = softmax_sums(logits)
    column = labels - head.first_token
    owned = (column >= 0) & (column < logits.shape[1])
    target = logits.gather(1, torch.where(owned, column, 0)[:, None]).squeeze(1).float()
    own = highest.clone() if head.group.size() > 1 else highest
    if head.group.size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=head.group)
        total, target = all_reduce(torch.stack((total * (own - highest).exp_(), torch.where(owned, target - highest, 0.0))), head.group)
    else:
        target = target - highest
    losses.copy_(torch.where(labels >= 0, total.log() - target, 0.0))
    if right is not None:
        first = torch.where(own == highest, logits.argmax(dim=1) + head.first_token, torch.iinfo(torch.int64).max)
        if head.group.size() > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN, group=head.group)
        right.copy_(first == labels)
    if grad is not None:
        slope = None if head.cap is None else (logits / head.cap).square_().neg_().add_(1)
        residual = softmax_residual_(logits, labels, highest, total, head.first_token)
        torch.mm(residual if slope is None else residual.mul_(slope), head.weight_VH, out=grad)
        if head.divisor != 1.0:
            grad.div_(head.divisor)
