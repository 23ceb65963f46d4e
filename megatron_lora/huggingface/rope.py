"""Rotary position embedding with packed positions.

Feature pair (i, i + d/2) of a head of d features is turned by the angle position * frequency_i, in the halves layout of Llama:
    y_i = x_i cos - x_{i+d/2} sin        y_{i+d/2} = x_{i+d/2} cos + x_i sin        frequency_i = theta^(-2i/d)
Longer contexts stretch the frequencies: "linear" divides all by the factor, "llama3" only those whose wavelength exceeds what was seen
in pre-training, "yarn" (Peng et al., 2023) those that turn less than a number of times over it, and it scales cos and sin.
The table [T, d/2] is made once per microbatch from its positions and shared by all layers of the stage; fused_ops.rope turns by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lora.huggingface.architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Return the angle per position of each feature pair, fp32 [head_dim / 2], and the scale of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    turns = rope.theta**exponents  # reciprocal frequencies
    if rope.kind == "linear":
        return (1.0 / turns) / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / turns), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, turns, head_dim), _yarn_scale(rope)
    return 1.0 / turns, 1.0


def _llama3(rope: Rope, base: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / base
    longest, shortest = (rope.original_max_positions / factor for factor in (rope.low_freq_factor, rope.high_freq_factor))
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * base / rope.factor + smooth * base
    stretched = torch.where(wavelengths > longest, base / rope.factor, base)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), blended, stretched)


def _yarn(rope: Rope, turns: Tensor, head_dim: int) -> Tensor:
    def pair_turning(rotations: float) -> float:
        """The (fractional) feature pair that turns `rotations` times over the original context."""
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - slow
    return (1.0 / (rope.factor * turns)) * (1 - kept) + (1.0 / turns) * kept


def _yarn_scale(rope: Rope) -> float:
    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def rotary_table(positions: Tensor, freqs: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, head_dim / 2] of each row's position, in the dtype of the activations."""
    angles = positions[:, None].float() * freqs
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
