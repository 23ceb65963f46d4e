"""Rotary position embedding with packed positions.

Feature pair (i, i + d/2) of a head of d features is rotated by the angle position * frequency_i, in
Llama's layout of two halves:
    y_i = x_i cos - x_{i+d/2} sin        y_{i+d/2} = x_{i+d/2} cos + x_i sin        frequency_i = theta^(-2i/d)
For longer contexts the frequencies are lowered. "linear" divides all of them by the factor.
"llama3" divides those whose wavelength is longer than the context of pre-training. "yarn" (Peng et
al., 2023) divides those that rotate less than a number of times over that context, and also scales
cos and sin. "longrope" (Ding et al., 2024) divides each by a factor of its own: one of two lists, by
the length of the whole sample, as transformers does for that sample alone. The table [T, d/2] is
made once per microbatch from its positions, and all layers of the stage that rotate alike share it;
fused_ops.elementwise.rope applies it. A layer without positions has a table of no pairs, [T, 0].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lora.huggingface.rope_config import Rope


class Rotary:
    """A layer's rotary embedding on a device; None: a layer without positions."""

    def __init__(self, rope: Rope | None, head_dim: int, device: torch.device):
        freqs, self.scale = frequencies(rope, head_dim)
        self.freqs, self.rope = freqs.to(device), rope
        self.long_freqs = frequencies(rope, head_dim, long=True)[0].to(device)

    def table(self, positions: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, p] of a microbatch whose samples end at `cu_seqlens`, in the dtype of the activations."""
        freqs = self.freqs
        if self.rope is not None and self.rope.kind == "longrope":
            sizes = cu_seqlens.diff()
            is_long = torch.repeat_interleave(sizes > self.rope.original_max_positions, sizes, output_size=len(positions))
            freqs = torch.where(is_long[:, None], self.long_freqs, freqs)
        return rotary_table(positions, freqs, self.scale, dtype)


def frequencies(rope: Rope | None, head_dim: int, long: bool = False) -> tuple[Tensor, float]:
    """Return the angle per position of each rotated feature pair, fp32 [p], and the scale of cos and sin.

    `long`: of samples that are longer than LongRoPE's original context.
    """
    if rope is None:
        return torch.empty(0), 1.0
    head_dim = int(head_dim * rope.share)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    periods = rope.theta**exponents  # 1 / frequencies
    if rope.kind == "longrope":
        assert rope.attention_factor is not None
        return 1.0 / (torch.tensor(rope.long_factor if long else rope.short_factor) * periods), rope.attention_factor
    if rope.kind == "linear":
        return (1.0 / periods) / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / periods), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, periods, head_dim), _yarn_scale(rope)
    return 1.0 / periods, 1.0


def _llama3(rope: Rope, base: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / base
    longest, shortest = (rope.original_max_positions / factor for factor in (rope.low_freq_factor, rope.high_freq_factor))
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * base / rope.factor + smooth * base
    stretched = torch.where(wavelengths > longest, base / rope.factor, base)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), blended, stretched)


def _yarn(rope: Rope, periods: Tensor, head_dim: int) -> Tensor:
    def pair_with(rotations: float) -> float:
        """Return the (fractional) feature pair that rotates `rotations` times over the original context."""
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    scaled = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    unscaled = 1 - scaled
    return (1.0 / (rope.factor * periods)) * (1 - unscaled) + (1.0 / periods) * unscaled


def _yarn_scale(rope: Rope) -> float:
    def scale_of(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale_of(rope.mscale) / scale_of(rope.mscale_all_dim)
    return scale_of(1.0)


def rotary_table(positions: Tensor, freqs: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, p] of each row's position, in the dtype of the activations; `freqs` [p], or [T, p]."""
    angles = positions[:, None].float() * freqs
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
