"""The full logits of a last stage, which training never computes."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_lora.model.loss import Head
from megatron_lora.parallel.collectives import gather_rows


@torch.no_grad()
def full_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits [T, vocabulary] of hidden states [T_local, H], on every tensor rank."""
    full = gather_rows(hidden, head.group) if head.sequence_parallel else hidden
    part = head.to_logits_(full @ head.weight_VH.t())
    if head.group.size() == 1:
        return part
    widths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(head.group.size())]
    dist.all_gather(widths, torch.tensor([part.shape[1]], device=part.device), group=head.group)
    widest = max(int(width) for width in widths)
    parts = [part.new_empty(part.shape[0], widest) for _ in widths]
    dist.all_gather(parts, pad(part, (0, widest - part.shape[1])).contiguous(), group=head.group)
    return torch.cat([padded[:, : int(width)] for padded, width in zip(parts, widths, strict=True)], dim=1)
