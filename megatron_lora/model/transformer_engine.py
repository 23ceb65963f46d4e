"""Transformer Engine's RMSNorm and attention, with the interfaces of ours (norm.py, attention.py).

`EngineNorm` adds the residual in a separate kernel. With a Refill its backward runs the norm again, gives
the output to the linear that waits for it, and then runs that norm's backward. `EngineAttention` takes
packed samples ("thd"), causal, with sliding windows. Transformer Engine chooses among its own kernels;
`backends.import_engine` has loaded it before. `attention_fault` tries the attention forward and backward
on a device, because versions do not tell which of cuDNN's attention kernels run there.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fused_ops.launch.backend import gradients
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.refill import Refill, wanted
from megatron_lora.data.microbatch import Packing
from megatron_lora.model.attention import PackedRows, fault_of


class EngineNorm(torch.nn.Module):
    """Transformer Engine's RMSNorm with a frozen weight [hidden_size]; its arguments are those of Megatron's norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        engine = importlib.import_module("transformer_engine.pytorch")
        self.norm = engine.RMSNorm(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.norm.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The norm's weight, for loading."""
        return self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return self.norm(x)

    def add(
        self, x: Tensor, residual: Tensor | None = None, refill: Refill | None = None, rounded: Rounded | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised sum x + residual, and the sum itself, the new residual.

        With `refill`, backward recomputes the former. A linear in 8 bits rounds it itself: `rounded` stays empty.
        """
        total = x if residual is None else x + residual
        return (self.norm(total) if refill is None else _RecomputedNorm.apply(total, self.norm, refill)), total


class _RecomputedNorm(torch.autograd.Function):
    """A norm that keeps only its input; its backward recomputes the output and gives it to a Refill."""

    @staticmethod
    def forward(ctx, x, norm, refill):
        ctx.save_for_backward(x)
        ctx.norm, ctx.refill = norm, refill
        return norm(x)

    @staticmethod
    def backward(ctx, dy):
        (y,), (dx,) = gradients(lambda x: (ctx.norm(x),), ctx.saved_tensors, (dy,))
        if wanted(ctx.refill):
            ctx.refill.finish(y)
        return dx, None, None


class EngineAttention(torch.nn.Module):
    """The core attention of one layer: causal within samples, in 16 bits."""

    def __init__(self, config, layer_number: int, **_):
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.window = config.architecture.sliding_windows[layer_number - 1]
        heads, kv_heads = config.num_attention_heads // ranks, config.num_query_groups // ranks
        self.attention = make_attention(heads, kv_heads, config.kv_channels, config.architecture.softmax_scale)

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: PackedRows, **_) -> Tensor:
        """Return [T, heads * d]. Megatron's other arguments are not used: the packing defines the mask."""
        return attend(self.attention, query, key, value, packed_seq_params.packing, self.window)


def make_attention(heads: int, kv_heads: int, head_dim: int, scale: float) -> torch.nn.Module:
    """Return Transformer Engine's attention over this rank's heads."""
    engine = importlib.import_module("transformer_engine.pytorch")
    return engine.DotProductAttention(
        heads, head_dim, num_gqa_groups=kv_heads, qkv_format="thd", attn_mask_type="padding_causal", softmax_scale=scale
    )


def attend(attention: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None) -> Tensor:
    """Return [T, heads * d] of packed samples."""
    ends, longest = packing.cu_seqlens, packing.max_length
    samples = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    options = {"qkv_format": "thd", "attn_mask_type": "padding_causal", "pad_between_seqs": False}
    return attention(query, key, value, **samples, **options, window_size=(-1 if window is None else window - 1, 0)).flatten(1)


def attention_fault(
    heads: int, kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> str:
    """Try Transformer Engine's attention on a device; return its fault in one line, or "" if it works."""

    def tried(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
        attention = make_attention(heads, kv_heads, head_dim, scale)
        return attend(attention, query, key, value, packing, window).view_as(query)

    return fault_of(tried, heads, kv_heads, head_dim, windows, dtype, device)
