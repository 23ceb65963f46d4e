"""One pipeline stage of a frozen base model: megatron-core's GPTModel, with our linears, norms and attention in its ModuleSpec.

`build_stage` builds this rank's part of the GPTModel that an `Architecture` describes. It differs from
Megatron's in these points:

    positions      Megatron gets position_embedding_type "none"; our attention applies the rotary embedding
    output layer   returns hidden states, because the loss computes logits in chunks (loss.py)
    tied head      first and last stage each hold a copy (one stage: one copy); neither is trained
    gradients      no parameter requires one: adapters lie in the arena, outside the module tree

    stage = build_stage(read_base_model(directory), directory, parallel, dtype=torch.bfloat16, device=device)
    hidden = stage(microbatch, received)            # received: None on the first stage
    losses = stage.losses(hidden, microbatch.labels, microbatch.targets)     # on the last stage
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import StageInput
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.rope import Rotary
from megatron_lora.huggingface.weight_slices import Checkpoint, Part, RandomTensors, load
from megatron_lora.model import loss
from megatron_lora.model.attention import MergedSelfAttention, PackedAttention, PackedRows
from megatron_lora.model.backends import OURS, Backends
from megatron_lora.model.base_weights import fill
from megatron_lora.model.cudnn_attention import cudnn_attention
from megatron_lora.model.decoder import DecoderLayer
from megatron_lora.model.experts import ExpertLinear, Experts
from megatron_lora.model.linears import MultiLoraColumnParallelLinear, MultiLoraLinear, MultiLoraRowParallelLinear, freeze
from megatron_lora.model.norm import RMSNorm
from megatron_lora.model.offloading import HostPool, LayerInputs
from megatron_lora.model.stage_weights import parts_of
from megatron_lora.model.transformer_engine import EngineAttention, EngineNorm
from megatron_lora.parallel import compat
from megatron_lora.parallel.partition import check_layout, layers_of_stages, recompute_of_layers
from megatron_lora.parallel.process_groups import tensor_group
from scheduling.cost import OFFLOADED, offloaded


@dataclass
class StageConfig(TransformerConfig):
    """Megatron's configuration, which every module receives, with the base model's architecture added."""

    architecture: Architecture | None = None
    base_weights: str = "native"
    expert_ranks: int = 1  # that each have some of a layer's experts


class Stage(torch.nn.Module):
    """This rank's part of the model: `layers` are the global indices of its layers, `linears` its linears in layer order.

    `adapted` are all that can have adapters, in the same order: its linears, and those of experts.
    """

    def __init__(self, model: GPTModel, architecture: Architecture, layers: range, device: torch.device):
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.layers = layers
        self.device = device
        self.is_first = model.pre_process
        self.is_last = model.post_process
        self.dtype = model.config.params_dtype
        self.tensor_group = tensor_group()
        self.sequence_parallel = model.config.sequence_parallel
        self.adapted: tuple[MultiLoraLinear | ExpertLinear, ...] = tuple(self._bind_linears())
        self.linears = tuple(linear for linear in self.adapted if isinstance(linear, MultiLoraLinear))
        scale = architecture.embedding_scale
        self.embedding_scale = float(torch.tensor(scale, dtype=self.dtype)) if architecture.family.scaled_embedding else scale
        self.rotaries = {rope: Rotary(rope, architecture.head_dim, device) for rope in {architecture.ropes[layer] for layer in layers}}

    @property
    def blocks(self) -> Sequence[DecoderLayer]:
        """The stage's layers as modules."""
        return cast(Sequence[DecoderLayer], self.model.decoder.layers)

    def _bind_linears(self) -> Iterator[MultiLoraLinear | ExpertLinear]:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            assert block.layer_number == layer + 1
            for linear in block.linears:
                linear.set_layer(layer)
                yield linear
            if block.experts is not None:
                block.experts.set_layer(layer)
                yield from block.experts.linears

    def set_recompute(self, recompute: str | tuple[str, ...], offload: bool = False) -> None:
        """Set the recomputation policy of all layers, or of each layer of the model; `offload` inputs of `full` layers to host memory."""
        policies = recompute_of_layers(recompute, self.architecture.num_layers)
        own = tuple(policies[layer] for layer in self.layers)
        for block, policy, where in zip(self.blocks, own, offloaded(own, self.is_first), strict=True):
            block.recompute, block.offloads = policy, offload and where == OFFLOADED
        self.host_pool = HostPool(self.device) if any(block.offloads for block in self.blocks) else None

    def reserve_host_memory(self, num_rows: int) -> None:
        """Allocate the host memory of all microbatches that may be in flight; the largest has `num_rows` rows on this rank."""
        if self.host_pool is not None:
            in_flight = parallel_state.get_pipeline_model_parallel_world_size() - parallel_state.get_pipeline_model_parallel_rank()
            number = in_flight * sum(block.offloads for block in self.blocks)
            self.host_pool.reserve(number, num_rows * self.architecture.hidden_size, self.dtype)

    def set_attention(self, attention: str) -> None:
        """Set who computes the attention of all layers: "cudnn" by plans that they share, else what stands in their slots."""
        self.attention = attention
        attend = cudnn_attention() if attention == "cudnn" else None
        for block in self.blocks:
            block.self_attention.core_attention.attend = attend

    def forward(self, microbatch: StageInput, hidden: Tensor | None = None) -> Tensor:
        """Compute the stage's layers over one microbatch.

        `hidden` [T_local, H] is the output of the previous stage; None on the first stage, which embeds the
        tokens. Returns [T_local, H], on the last stage after the final norm. The result is never a view, so
        that its memory can be freed once it is sent. T_local is T, or T / tensor under sequence parallelism.
        """
        packing = microbatch.packing
        rotary = {rope: each.table(packing.positions, packing.cu_seqlens, self.dtype) for rope, each in self.rotaries.items()}
        if self.is_first:
            assert hidden is None
            embedded = self.model.embedding(input_ids=microbatch.tokens[None], position_ids=None)
            if self.embedding_scale != 1.0:
                embedded = embedded * self.embedding_scale
            if torch.is_grad_enabled():
                embedded = _Differentiable.apply(torch.zeros((), device=self.device, requires_grad=True), embedded)
        else:
            assert hidden is not None
            embedded = None
            self.model.set_input_tensor(hidden.unsqueeze(1))
        inputs = LayerInputs(self.host_pool) if self.host_pool is not None and torch.is_grad_enabled() else None
        out = self.model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            packed_seq_params=PackedRows(qkv_format="thd", packing=packing, rotary=rotary, route=microbatch.route, inputs=inputs),
        )
        out = out.squeeze(0 if self.is_last else 1)  # GPTModel gives [1, T, H] from its output layer, [T, 1, H] before it
        return make_viewless_tensor(out, requires_grad=out.requires_grad, keep_graph=True)

    @property
    def head(self) -> loss.Head:
        """The output matrix on the last stage, without the rows that pad the vocabulary."""
        weight = head_weight(self.model)
        first = self.tensor_group.rank() * weight.shape[0]
        return loss.Head(
            weight_VH=weight[: max(0, self.architecture.vocab_size - first)],
            first_token=first,
            widest=weight.shape[0],
            group=self.tensor_group,
            sequence_parallel=self.sequence_parallel,
            divisor=self.architecture.logit_divisor,
            cap=self.architecture.logit_cap,
        )

    def losses(self, hidden: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return each row's cross-entropy, fp32 [T] (label -100: 0), differentiable in `hidden` [T_local, H]. Last stage only.

        `targets` lists the rows that have a label: logits are computed for these alone. None: for all rows.
        """
        return loss.cross_entropy(hidden, labels, self.head, targets)

    def evaluate(self, hidden: Tensor, labels: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return each row's cross-entropy, fp32 [T], and whether its label has the highest logit, bool [T] (label -100: 0, False)."""
        return loss.evaluate(hidden, labels, self.head, targets)

    def parts(self) -> Iterator[Part]:
        """Yield each part of this rank's parameters, with the name and slice of the checkpoint tensor that it is loaded from."""
        return parts_of(self.model, self.architecture, self.layers, self.linears, self.tensor_group.rank())


class _Differentiable(torch.autograd.Function):
    """Lets a tensor require a gradient, which is dropped: otherwise the first layer's adapters would get none.

    As a leaf, the tensor would be held by the graph for as long as the microbatch is in flight.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, _):
        return None, None


def head_weight(model: GPTModel) -> torch.nn.Parameter:
    """Return the weight of the last stage's output layer."""
    weight = model.output_layer.weight
    assert weight is not None
    return weight


class PassThrough(torch.nn.Module):
    """GPTModel's output layer, which returns the hidden states; it holds the head's weight for the loss."""

    def __init__(self, weight: torch.nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
        """Return the hidden states and no bias."""
        return hidden, None


def build_stage(
    architecture: Architecture,
    model_dir: str | Path | None,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_weights: bool = True,
    seed: int = 0,
    recompute: str | tuple[str, ...] = "none",
    base_weights: str = "native",
    backends: Backends = OURS,
    activation_offloading: bool = False,
) -> Stage:
    """Build this rank's stage and load its weights: from `model_dir`'s safetensors, or random ones if not `load_weights`.

    `recompute` is the policy of all layers, or of each layer of the complete model (decoder.py); `activation_offloading`
    lets the inputs of `full` layers wait in host memory (offloading.py).
    `base_weights` says how the linears' weights are stored (base_weights.py). `backends` chooses the
    norms and the attention (backends.py). Megatron's `parallel_state` must be initialised
    (process_groups.initialize_parallel). Raises UserError where model, files and layout do not fit together.
    """
    check_layout(architecture, parallel, base_weights)
    compat.quieten_gpt_model()
    layers = layers_of_stages(architecture.num_layers, parallel)[parallel_state.get_pipeline_model_parallel_rank()]
    config = _stage_config(architecture, parallel, dtype, device, base_weights)
    with compat.attention_variables_kept():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, len(layers), backends),
            vocab_size=-(-architecture.vocab_size // parallel.tensor) * parallel.tensor,
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
        )
    if model.post_process:
        shared = architecture.tied_head and model.pre_process
        model.add_module("output_layer", PassThrough(model.embedding.word_embeddings.weight if shared else head_weight(model)))
    freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the rows that pad the vocabulary stay zero
    stage = Stage(model, architecture, layers, device)
    stage.set_recompute(recompute, activation_offloading)
    stage.set_attention(backends.attention)
    assert model_dir is not None or not load_weights
    source = Checkpoint(model_dir, architecture) if load_weights and model_dir else RandomTensors(architecture, seed, dtype, device)
    load(stage.parts(), source)
    if base_weights != "native":
        fill(stage.linears, source, base_weights, dtype, device)
    return stage


def _stage_config(
    architecture: Architecture, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, base_weights: str
) -> StageConfig:
    layout = None
    if parallel.pipeline > 1:
        layout = [["decoder"] * len(layers) for layers in layers_of_stages(architecture.num_layers, parallel)]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
    return StageConfig(
        architecture=architecture,
        base_weights=base_weights,
        expert_ranks=parallel.expert,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,  # our linears decide by the architecture, and add their bias themselves
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=layout,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
    )


class _SpecProvider(LocalSpecProvider):
    """The modules that Megatron's specs use, with our linears in place of Megatron's."""

    def column_parallel_linear(self) -> type:
        return MultiLoraColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return MultiLoraRowParallelLinear


def _block_spec(config: StageConfig, num_layers: int, backends: Backends) -> Any:
    """Return Megatron's TransformerBlockSubmodules.

    Any, here and below: Megatron's annotations name other arguments than it passes to the modules of a spec.
    """
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    assert config.architecture is not None
    norm = EngineNorm if backends.norms == "te" and not config.architecture.family.zero_centred else RMSNorm
    core_attention = EngineAttention if backends.attention == "te" and config.architecture.attention_cap is None else PackedAttention
    attention = ModuleSpec(
        module=MergedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=cast(Any, MultiLoraColumnParallelLinear),
            core_attention=cast(Any, core_attention),
            linear_proj=cast(Any, MultiLoraRowParallelLinear),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    layer = ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            pre_mlp_layernorm=norm,
            mlp=cast(Any, Experts) if config.architecture.num_experts else get_mlp_module_spec_for_backend(_SpecProvider()),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=cast(Any, norm))
