"""Our logits of a model directory beside transformers', for tests of what is read from it."""

from __future__ import annotations

from pathlib import Path

import torch
from full_logits import full_logits
from tiny import stage_input

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.model.stage import build_stage

LENGTHS = (3, 30)


def our_logits(directory: Path, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Return the logits [T, vocabulary] of random tokens, from the path that a run takes."""
    architecture = read_base_model(directory)
    stage = build_stage(architecture, directory, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        return full_logits(stage(stage_input(lengths, architecture.vocab_size)), stage.head)


def their_logits(directory: Path, vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Return transformers' logits of the same tokens, as AutoModelForCausalLM loads the directory."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat([model(tokens[None]).logits[0] for tokens in stage_input(lengths, vocab_size).tokens.split(lengths)])


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
