"""Attention over packed samples, in place of megatron-core's self-attention and core attention.

`MergedSelfAttention` is Megatron's self-attention with `linear_qkv` laid out as q | k | v, so that each
module's adapter writes contiguous columns (Megatron interleaves them per group of query heads). It also
applies the rotary embedding, by a row's position in its sample. `PackedAttention` is the core attention:
a row attends to the rows of its own sample up to itself, within the layer's sliding window. On CUDA in
16 bits it calls cuDNN's attention where the stage has set it (cudnn_attention.py), or torch's
variable-length flash attention; otherwise scaled-dot-product attention once per sample. `fault_of`
compares an attention on a device with the latter in float32. Shapes: q [T, heads, d], k and v
[T, kv heads, d], out [T, heads * d].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from fused_ops.elementwise.rope import Table, rotate_qkv
from fused_ops.launch.backend import gradients
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.refill import Refill
from fused_ops.lora.route import Route
from megatron_lora.data.microbatch import Packing
from megatron_lora.huggingface.rope_config import Rope
from megatron_lora.model.backends import first_line
from megatron_lora.model.capped_attention import capped_attention
from megatron_lora.model.linears import MultiLoraColumnParallelLinear, MultiLoraRowParallelLinear
from megatron_lora.model.norm import RMSNorm
from megatron_lora.model.offloading import LayerInputs

Attend = Callable[[Tensor, Tensor, Tensor, Packing, float, int | None], Tensor]  # q, k, v, packing, scale, window
_TRIED_LENGTHS = (70, 1, 130)  # of the samples that an attention is tried on


@dataclass
class PackedRows(PackedSeqParams):
    """What Megatron passes on to every layer: the microbatch's packing, its rotary tables (cos, sin) and the route to its adapters.

    The route goes to the linears with the rows that it describes. Under pipelining and recomputation a "current" microbatch
    would be another one in backward. `offsets` is computed from the packing by the first layer's attention, for all layers. `inputs` are
    those of layers that run again in backward, where they wait in host memory.
    """

    packing: Packing = field(kw_only=True)
    rotary: Mapping[Rope | None, Table] = field(default_factory=dict)
    route: Route | None = None  # None: the base model alone
    offsets: Any = None
    inputs: LayerInputs | None = None  # None: autograd keeps them


class MergedSelfAttention(SelfAttention):
    """Megatron's self-attention over a `linear_qkv` whose columns are q | k | v of this rank's heads."""

    linear_qkv: MultiLoraColumnParallelLinear
    linear_proj: MultiLoraRowParallelLinear
    q_layernorm: RMSNorm  # where the config has qk_layernorm
    k_layernorm: RMSNorm
    core_attention: PackedAttention  # or Transformer Engine's

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.rope: Rope | None = config.architecture.ropes[self.layer_number - 1]

    def forward(
        self,
        hidden_states: Tensor,
        packed_seq_params: PackedRows,
        refill: Refill | None = None,
        rounded: Rounded | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return [T_local, 1, H] for normed hidden states [T_local, 1, H], with the residual if there is one.

        With `refill`, linear_qkv does not keep them for backward; `rounded` has them in 8 bits.
        """
        qkv, _ = self.linear_qkv(hidden_states, packed_seq_params.route, refill, rounded)
        norms = None
        if self.config.qk_layernorm:
            norms = self.q_layernorm.weight, self.k_layernorm.weight, self.q_layernorm.eps
        heads, kv_heads = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        query, key, value = rotate_qkv(qkv.squeeze(1), packed_seq_params.rotary[self.rope], heads, kv_heads, norms)
        attended = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        out, _ = self.linear_proj(attended.unsqueeze(1), packed_seq_params.route, residual=residual)
        return out


class PackedAttention(torch.nn.Module):
    """The core attention of one layer: causal within samples."""

    attend: Callable[[Tensor, Tensor, Tensor, PackedRows, float, int | None], Tensor] | None = None  # set by the stage

    def __init__(self, config, layer_number: int, **_):
        super().__init__()
        self.window = config.architecture.sliding_windows[layer_number - 1]
        self.scale, self.cap = config.architecture.softmax_scale, config.architecture.attention_cap

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: PackedRows, **_) -> Tensor:
        """Return [T, heads * d]. Megatron's other arguments are not used: the packing defines the mask."""
        if self.cap is not None:
            return capped_attention(query, key, value, packed_seq_params.packing, self.scale, self.window, self.cap).flatten(1)
        if self.attend is not None:
            return self.attend(query, key, value, packed_seq_params, self.scale, self.window).flatten(1)
        attend = varlen_attention if can_varlen(query) else per_sample_attention
        return attend(query, key, value, packed_seq_params.packing, self.scale, self.window).flatten(1)


def can_varlen(query: Tensor) -> bool:
    """Return whether flash attention supports this device, dtype and head size."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    """Attend with torch's variable-length flash attention: one launch for all samples."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True, "num_splits": 1}  # one split: a sample's bits do not depend on its neighbours' lengths
    known = inspect.signature(varlen_attn).parameters
    options = {name: option for name, option in options.items() if name in known}
    ends, longest, behind = packing.cu_seqlens, packing.max_length, -1 if window is None else window - 1
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(behind, 0), **options)
    return cast(Tensor, out)  # a tuple only where more is asked for


def per_sample_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    """Attend with one scaled-dot-product call per sample: for CPU and fp32, and the reference of `varlen_attention`."""
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


def fault_of(
    attend: Attend, heads: int, kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> str:
    """Try an attention on a device, forward and backward; return its fault in one line, or "" if it works.

    `windows` has the sliding window of every layer (None: no window). Each distinct window is tried, and
    compared with `per_sample_attention` in float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16 bits alone"
    generator = torch.Generator(device=device).manual_seed(0)
    ends = torch.tensor([0, *_TRIED_LENGTHS]).cumsum(0).to(torch.int32)
    packing = Packing(
        cu_seqlens=ends.to(device),
        lengths=_TRIED_LENGTHS,
        positions=torch.cat([torch.arange(length) for length in _TRIED_LENGTHS]).to(device),
        max_length=max(_TRIED_LENGTHS),
    )
    shapes = [(sum(_TRIED_LENGTHS), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v, d_out = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in [*shapes, shapes[0]])
    scale = head_dim**-0.5
    for window in sorted(set(windows), key=str):
        try:
            ours = _both_passes(attend, (q, k, v), d_out, packing, scale, window)
        except (RuntimeError, ValueError, AssertionError) as error:  # whatever the fault, torch's attention takes its place
            return first_line(error)
        exact = _both_passes(per_sample_attention, (q.float(), k.float(), v.float()), d_out.float(), packing, scale, window)
        for name, got, truth in zip(("output", "dq", "dk", "dv"), ours, exact, strict=True):
            error = float((got.float() - truth).norm() / truth.norm())
            if not error < 0.03:  # NaN too
                return f"its {name} is off by {error:.2g}"
    return ""


def _both_passes(
    attend: Attend, qkv: tuple[Tensor, ...], d_out: Tensor, packing: Packing, scale: float, window: int | None
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of q, k and v."""
    outputs, grads = gradients(lambda q, k, v: (attend(q, k, v, packing, scale, window),), qkv, (d_out,))
    return *outputs, *grads
