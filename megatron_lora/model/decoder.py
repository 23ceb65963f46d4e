"""One decoder layer: Megatron's layer with another forward, which fuses the operations between the GEMMs and can recompute.

    x, h = norm(h)          h = h + W_o attention(rope(W_qkv x))
    x, h = norm(h)          h = h + W_down swiglu(W_gate_up x)         the second norm's kernel also adds the first sum

or with experts in place of the MLP (experts.py).

A family may norm what attention and the MLP give before it is added (Gemma), which keeps 2 H more, scale it
(Granite), and have another activation than SiLU in place of SwiGLU's.

Its `recompute` policy decides what it keeps for backward, in numbers per row (H hidden size, F
feed-forward size, Q width of q, k and v together):

    none    every linear's input: about 4 H + Q + 3 F
    cheap   the GEMMs' outputs: about 2 H + Q + 2 F. Backward of a norm or SwiGLU computes its output again
            in the same pass, and gives it to the linear that needs it (fused_ops.lora.refill)
    full    the layer's input alone: H. Backward runs the layer's forward again, as `cheap` and up to
            W_down's input: no gradient depends on W_down's product, except where a norm follows it

All policies give the same bits: the same kernels recompute from the same numbers, and dropout masks
depend on counters alone, not on a random generator's state. Adapter gradients are accumulated in the
linears' backward, which every policy runs once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from fused_ops.elementwise.swiglu import swiglu
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.refill import Refill
from megatron_lora.model.attention import MergedSelfAttention, PackedRows
from megatron_lora.model.experts import Experts
from megatron_lora.model.linears import MultiLoraColumnParallelLinear, MultiLoraLinear, MultiLoraRowParallelLinear
from megatron_lora.model.norm import RMSNorm
from megatron_lora.model.transformer_engine import EngineNorm


class Mlp(Protocol):
    """The linears of Megatron's MLP, as our specs build it."""

    linear_fc1: MultiLoraColumnParallelLinear
    linear_fc2: MultiLoraRowParallelLinear


class DecoderLayer(TransformerLayer):
    """Megatron's layer, built by Megatron; the stage sets `recompute`, and whether the input of a `full` layer goes to the host."""

    input_layernorm: RMSNorm | EngineNorm
    self_attention: MergedSelfAttention
    pre_mlp_layernorm: RMSNorm | EngineNorm
    mlp: Mlp  # or Experts, which Megatron takes for its MLP

    recompute = "none"
    offloads = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        family = config.architecture.family
        self.residual_scale, self.gelu = config.architecture.residual_scale, family.activation == "gelu_tanh"
        self.norms_after = torch.nn.ModuleList(RMSNorm(config, config.hidden_size, config.layernorm_epsilon) for _ in family.norms[2:])

    @property
    def experts(self) -> Experts | None:
        """What takes the place of the MLP; None: nothing."""
        return cast(Experts, self.mlp) if isinstance(self.mlp, Experts) else None

    @property
    def linears(self) -> tuple[MultiLoraLinear, ...]:
        """The layer's linears, in order."""
        attention = self.self_attention.linear_qkv, self.self_attention.linear_proj
        return attention if self.experts is not None else (*attention, self.mlp.linear_fc1, self.mlp.linear_fc2)

    @property
    def norms(self) -> tuple[RMSNorm | EngineNorm, ...]:
        """The layer's norms, in the order of Family.norms."""
        return self.input_layernorm, self.pre_mlp_layernorm, *cast(Iterable[RMSNorm], self.norms_after)

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedRows, **_) -> tuple[Tensor, None]:
        """Return the layer's output [T_local, 1, H], and None for Megatron's cross-attention context."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            return self._compute(hidden_states, packed_seq_params, self.recompute == "cheap"), None
        return _Rerun.apply(hidden_states, self, packed_seq_params), None

    def _compute(self, hidden: Tensor, rows: PackedRows, cheap: bool) -> Tensor:
        """Run the layer; if `cheap`, the linears after norms and SwiGLU do not keep their inputs."""
        if self.experts is not None:
            hidden, x = self._through_attention(hidden, rows, cheap)
            return torch.add(hidden, self._normed(self.experts(x, rows.route), 1), alpha=self.residual_scale)
        down = self.mlp.linear_fc2.new_rounded()
        hidden, x, for_down = self._up_to_down(hidden, rows, cheap, down)
        out, _ = self.mlp.linear_fc2(x, rows.route, for_down, down)
        return torch.add(hidden, self._normed(out, 1), alpha=self.residual_scale)

    def for_backward(self, hidden: Tensor, rows: PackedRows) -> tuple[Tensor, Tensor]:
        """Run the layer again for its backward: return the sum's two terms, the second without values."""
        if self.experts is not None:
            hidden, x = self._through_attention(hidden, rows, cheap=True)
            return hidden, self._added(self.experts(x, rows.route, values=bool(self.norms_after)), 1)
        hidden, x, for_down = self._up_to_down(hidden, rows, cheap=True)
        if self.norms_after:
            out, _ = self.mlp.linear_fc2(x, rows.route, for_down)
        else:
            out = self.mlp.linear_fc2.for_backward(x, rows.route, for_down, hidden.shape)
        return hidden, self._added(out, 1)

    def _normed(self, x: Tensor, norm: int) -> Tensor:
        """Return what attention (0) or the MLP (1) gives, normed where the family has norms after them."""
        return self.norms_after[norm](x) if self.norms_after else x

    def _added(self, x: Tensor, norm: int) -> Tensor:
        """Return what is added to the residual."""
        x = self._normed(x, norm)
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def _up_to_down(
        self, hidden: Tensor, rows: PackedRows, cheap: bool, down: Rounded | None = None
    ) -> tuple[Tensor, Tensor, Refill | None]:
        """Run all of the layer before its last linear: return the residual, the linear's input, and its Refill if `cheap`.

        Nothing outlives its last use here: this is the peak of a forward that keeps nothing. `down` gets the input in 8 bits.
        """
        for_up, for_down = (Refill() if cheap else None for _ in range(2))
        up = self.mlp.linear_fc1.new_rounded()
        hidden, x = self._through_attention(hidden, rows, cheap, for_up, up)
        x, _ = self.mlp.linear_fc1(x, rows.route, for_up, up)
        return hidden, swiglu(x, for_down, rounded_up=up, rounded_down=down, gelu=self.gelu), for_down

    def _through_attention(
        self, hidden: Tensor, rows: PackedRows, cheap: bool, for_up: Refill | None = None, up: Rounded | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run attention and the norms around it: return the residual and the normed input of the MLP, or of the experts."""
        for_qkv, qkv = Refill() if cheap else None, self.self_attention.linear_qkv.new_rounded()
        x, hidden = self.input_layernorm.add(hidden, None, for_qkv, qkv)
        x, hidden = self.pre_mlp_layernorm.add(self._added(self.self_attention(x, rows, for_qkv, qkv), 0), hidden, for_up, up)
        return hidden, x


class _Rerun(torch.autograd.Function):
    """Run a layer and keep only its input, here or in host memory; backward runs the layer again, then its backward.

    The input must require a gradient, otherwise autograd does not call this backward. The stage makes the
    embedding's output require one.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: DecoderLayer, rows: PackedRows) -> Tensor:
        ctx.layer, ctx.rows = layer, rows
        if rows.inputs is None:
            ctx.save_for_backward(hidden)
        else:
            ctx.place = rows.inputs.put(hidden, stays=not layer.offloads)
        return layer._compute(hidden, rows, cheap=False)

    @staticmethod
    def backward(ctx, d_output: Tensor):
        hidden = ctx.saved_tensors[0] if ctx.rows.inputs is None else ctx.rows.inputs.take(ctx.place)
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            terms = ctx.layer.for_backward(hidden, ctx.rows)
        (d_hidden,) = torch.autograd.grad(terms, hidden, (d_output, d_output))
        return d_hidden, None, None
