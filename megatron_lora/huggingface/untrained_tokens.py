"""Tokens that a base model was never trained on: their rows of the embedding or the head are as they were made.

A base model often has the tokens of a chat template without having seen them. An adapter of the linears
cannot repair such a row: the token says nothing where it is read, and can hardly be predicted. Rows of
other tokens are the measure:

    tiny     a norm below a tenth of the median of ordinary rows
    equal    the same as the row of another added token, but for rounding

    names = untrained_tokens(checkpoint, architecture, {128009: "<|eot_id|>"}, added=range(128000, 128256))
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_lora.huggingface.architecture import HEAD, Architecture
from megatron_lora.huggingface.weight_slices import Source

NUM_ORDINARY = 256
TINY = 0.1
EQUAL = 1e-3


def untrained_tokens(source: Source, architecture: Architecture, tokens: Mapping[int, str], added: Iterable[int]) -> list[str]:
    """List the names of those of `tokens` (id -> name) that have an untrained row; `added`: ids of all added tokens."""
    size = architecture.vocab_size
    ids = sorted({*tokens, *added} & set(range(size)))
    ordinary = sorted(set(range(0, size, max(1, size // NUM_ORDINARY))) - set(ids))
    if not ordinary:
        return []
    untrained: set[int] = set()
    for name in (architecture.embedding,) if architecture.tied_head else (architecture.embedding, HEAD):
        rows, norms = _rows(source, name, ids), _rows(source, name, ordinary).norm(dim=1)
        scale = rows.norm(dim=1)
        untrained |= {token for token, small in zip(ids, (scale < TINY * norms.median()).tolist(), strict=True) if small}
        for number, token in enumerate(ids):
            if token in tokens:
                distance = (rows - rows[number]).norm(dim=1)
                distance[number] = torch.inf
                untrained |= {token} if bool((distance <= EQUAL * scale[number]).any()) else set()
    return [name for token, name in sorted(tokens.items()) if token in untrained]


def _rows(source: Source, name: str, ids: Iterable[int]) -> Tensor:
    """Read rows of a matrix in float32, each as a slice of its own."""
    return torch.cat([source.read(name, (slice(row, row + 1), slice(None))).float() for row in ids])
