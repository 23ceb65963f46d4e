"""Attention over packed samples, for megatron-core's attention slots.

`MergedSelfAttention` is Megatron's self-attention with `linear_qkv` laid out as q | k | v (Megatron interleaves them per group of query
heads), so that each module's adapter writes contiguous columns. `PackedAttention` is its core: it turns q and k by their position in
their sample, then lets every row see the rows of its own sample up to itself (and no further back than the layer's sliding window).
Rows of different samples never meet. On CUDA in 16 bit this is torch's variable-length flash attention; else one
scaled-dot-product call per sample. Shapes of a call: q [T, heads, d], k and v [T, kv heads, d], out [T, heads * d].
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_lora.microbatch import Packing
from megatron_lora.rope import rotate


@dataclass
class PackedRows(PackedSeqParams):
    """What Megatron hands through to the core attention: the packing of the microbatch and its rotary table (cos, sin)."""

    packing: Packing | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class MergedSelfAttention(SelfAttention):
    """Megatron's self-attention over a `linear_qkv` whose columns are q | k | v of this rank's heads."""

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True):
        """Return q [T, 1, heads, d] and k, v [T, 1, kv heads, d] from hidden states [T_local, 1, H]; q, k normed where the model does."""
        assert key_value_states is None and not output_gate and split_qkv
        mixed, _ = self.linear_qkv(hidden_states)
        heads, kv_heads, head_dim = (
            self.num_attention_heads_per_partition,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )
        query, key, value = mixed.unflatten(-1, (heads + 2 * kv_heads, head_dim)).split((heads, kv_heads, kv_heads), dim=2)
        if self.config.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value


class PackedAttention(torch.nn.Module):
    """The core attention of one layer: rotary embedding and causal attention within samples."""

    def __init__(self, config, layer_number: int, softmax_scale: float | None = None, **_):
        super().__init__()
        self.window = config.architecture.sliding_windows[layer_number - 1]
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: PackedRows, **_) -> Tensor:
        """Return [T, heads * d]. The other arguments of Megatron's protocol say nothing here: the packing is the mask."""
        packing, rotary = packed_seq_params.packing, packed_seq_params.rotary
        query, key = rotate(query, rotary), rotate(key, rotary)
        attend = varlen_attention if can_varlen(query) else per_sample_attention
        return attend(query, key, value, packing, self.scale, self.window).flatten(1)


def can_varlen(query: Tensor) -> bool:
    """Tell whether flash attention takes this device, dtype and head size."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    """Attend with torch's variable-length flash attention: one launch for all samples."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True, "num_splits": 1}  # one split: a sample's bits do not depend on its neighbours' lengths
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn(
        query,
        key,
        value.contiguous(),
        packing.cu_seqlens,
        packing.cu_seqlens,
        packing.max_length,
        packing.max_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **{name: option for name, option in options.items() if name in known},
    )


def per_sample_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    """Attend with one scaled-dot-product call per sample: the obvious twin of `varlen_attention`, for CPU and fp32."""
    outs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(packing.lengths, dim=1) for x in (query, key, value)), strict=True):
        length = q.shape[1]
        mask = None if window is None or window >= length else _window_mask(length, window, q.device)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    rows = torch.arange(length, device=device)
    behind = rows[:, None] - rows
    return (behind >= 0) & (behind < window)
