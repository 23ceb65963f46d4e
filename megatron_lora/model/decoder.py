"""One decoder layer: Megatron's layer with a forward of its own, which fuses what lies between the GEMMs and knows what backward needs.

    x, h = norm(h)          h = h + W_o attention(rope(W_qkv x))
    x, h = norm(h)          h = h + W_down swiglu(W_gate_up x)         the first sum happens inside the second norm's pass

What a layer keeps for backward is its `recompute` policy, per T rows (H hidden, F feed-forward, d qkv = width of q, k and v):

    none    every linear's input: about 4 H + d qkv + 3 F
    cheap   the GEMMs' outputs: about 2 H + d qkv + 2 F; norm and SwiGLU outputs are made again while backward reads the same rows
    full    the layer's input alone, H; backward runs the layer again, with its microbatch bound again

All policies give the same bits: what is made again is made by the same kernels from the same numbers, and dropout masks are functions of
counters. Adapter gradients are written by the linears' backwards, which under every policy run once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from fused_ops.refill import Refill
from fused_ops.swiglu import swiglu
from megatron_lora.model.attention import PackedRows


class DecoderLayer(TransformerLayer):
    """Built as Megatron builds its layer; `recompute` is set by the stage."""

    recompute = "none"

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedRows, **_) -> tuple[Tensor, None]:
        """Return the layer's output [T_local, 1, H], and None in the place of a cross-attention context."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            return self._compute(hidden_states, packed_seq_params, self.recompute == "cheap"), None
        binding = self.self_attention.linear_qkv.binding
        microbatch = binding.microbatch

        def run(hidden: Tensor) -> Tensor:
            with binding.bound(microbatch):
                return self._compute(hidden, packed_seq_params, False)

        return _Rerun.apply(hidden_states, run), None

    def _compute(self, hidden: Tensor, rows: PackedRows, cheap: bool) -> Tensor:
        """Run the layer; when `cheap`, the linears behind norms and SwiGLU keep no input."""
        for_qkv, for_up, for_down = (Refill() if cheap else None for _ in range(3))
        x, hidden = self.input_layernorm.add(hidden, refill=for_qkv)
        attended = self.self_attention(x, rows, for_qkv)
        x, hidden = self.pre_mlp_layernorm.add(attended, hidden, for_up)
        gate_up, _ = self.mlp.linear_fc1(x, refill=for_up)
        x = swiglu(gate_up, for_down)
        out, _ = self.mlp.linear_fc2(x, refill=for_down)
        return hidden + out


class _Rerun(torch.autograd.Function):
    """Run a function of one tensor and keep only the tensor; backward runs it again and goes back through it.

    The tensor must require a gradient, or backward would never come here: the stage makes the embedding's output require one.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run = run
        return run(hidden)

    @staticmethod
    def backward(ctx, d_output: Tensor):
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(hidden)
        (d_hidden,) = torch.autograd.grad(output, hidden, d_output)
        return d_hidden, None
