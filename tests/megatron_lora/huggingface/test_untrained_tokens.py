"""Rows that a base model never trained are found: tiny ones and equal ones, in the embedding or the head, and no others."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_lora.huggingface.architecture import HEAD, Architecture
from megatron_lora.huggingface.untrained_tokens import untrained_tokens

EMBEDDING = "model.embed_tokens.weight"
SIZE, ADDED = 600, range(580, 600)


class Matrices(dict):
    """Tensors by name, read as slices."""

    def read(self, name, index):
        return self[name][index]


def matrices(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return Matrices({name: (torch.randn(SIZE, 64, generator=generator) * 0.02).to(dtype) for name in (EMBEDDING, HEAD)})


def named(source, *tokens, tied=False):
    architecture = cast(Architecture, SimpleNamespace(vocab_size=SIZE, tied_head=tied, embedding=EMBEDDING))
    return untrained_tokens(source, architecture, {token: f"<{token}>" for token in tokens}, ADDED)


def test_trained_rows_are_not_named():
    assert named(matrices(), *ADDED) == []
    assert named(matrices()) == []
    assert named(matrices(), SIZE + 5) == []  # a token that the data's own check refuses


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("spoil", ["zero", "tiny", "equal", "equal but for rounding"])
def test_untrained_rows_are_named(name, spoil):
    source = matrices(torch.float32)
    rows = source[name]
    if spoil == "zero":
        rows[585] = 0
    elif spoil == "tiny":
        rows[585] *= 0.01
    else:  # as the mean of all, which is how new rows are made
        rows[585] = rows[590] = rows.mean(0) + 0.01
        rows[590] *= 1 + 1e-4 * (spoil == "equal but for rounding")
    assert named(source, 583, 585) == ["<585>"]
    assert named(source, 583) == []
    assert named(source, 583, 585, tied=True) == (["<585>"] if name == EMBEDDING else [])
