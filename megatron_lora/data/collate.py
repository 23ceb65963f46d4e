"""A planned microbatch to tensors: tokens, labels, target rows, weights, positions and the route.

Rows follow the microbatch's segments and, inside one, its samples. Row i of a sample holds token i and predicts token i + 1, so a
sample's last row has no label. Every target row weighs 1 / (target tokens of its job's whole global batch); the sum of weighted
losses over a step's microbatches is then the step's loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fused_ops.dropout import row_keys
from fused_ops.route import make_route
from megatron_lora.data.microbatch import Packing, StageInput
from megatron_lora.data.steps import JobRows
from scheduling.types import Microbatch

NO_LABEL = -100


def num_rows(microbatch: Microbatch, multiple: int) -> int:
    """Rows of a microbatch, rounded up to a multiple (the tensor ranks under sequence parallelism, else 1)."""
    return -(-microbatch.num_tokens // multiple) * multiple


def collate(microbatch: Microbatch, jobs: Sequence[JobRows], *, multiple: int, device: torch.device) -> StageInput:
    """Return the tensors of a microbatch; rows that fill up to `multiple` form one base-only sample without labels."""
    tokens, labels, weights, keys, lengths, segments = [], [], [], [], [], []
    row = 0
    for segment in microbatch.segments:
        if not segment.samples:
            continue  # this replica has no sample of the job here
        job = jobs[segment.job]
        share = 1.0 / job.num_targets(segment.step)
        for k in segment.samples:
            epoch, index = job.steps[segment.step][k]
            sample = job.samples[index]
            label = np.full(len(sample.tokens), NO_LABEL, dtype=np.int64)
            label[:-1] = np.where(sample.targets[1:], sample.tokens[1:], NO_LABEL)
            tokens.append(sample.tokens.astype(np.int64))
            labels.append(label)
            weights.append(np.where(label != NO_LABEL, share, 0.0).astype(np.float32))
            keys.append(np.asarray(row_keys(job.seed, sample.row, epoch, len(sample.tokens))))
            lengths.append(len(sample.tokens))
        segments.append((row, row + segment.num_tokens, segment.job))
        row += segment.num_tokens
    filling = num_rows(microbatch, multiple) - row
    if filling:
        tokens.append(np.zeros(filling, dtype=np.int64))
        labels.append(np.full(filling, NO_LABEL, dtype=np.int64))
        weights.append(np.zeros(filling, dtype=np.float32))
        keys.append(np.zeros(filling, dtype=np.int32))
        lengths.append(filling)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def send(parts: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(parts)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    all_labels = np.concatenate(labels)
    return StageInput(
        tokens=send(np.concatenate(tokens)),
        labels=send(all_labels),
        targets=send(np.flatnonzero(all_labels != NO_LABEL)),
        weights=send(np.concatenate(weights)),
        packing=Packing(cu_seqlens=send(edges), lengths=tuple(lengths), positions=send(positions), max_length=max(lengths)),
        route=make_route(row + filling, tuple(segments), send(np.concatenate(keys)), device),
    )
