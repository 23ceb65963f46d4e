"""A tiny stage in bf16 on a GPU: forward and backward of one microbatch, for tests that compare who computes norms and attention."""

from __future__ import annotations

import torch
from tiny import attach_adapters, stage_input

from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.route import make_route
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Packing, StageInput
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.backends import Backends
from megatron_lora.model.stage import build_stage


def to_gpu(microbatch: StageInput) -> StageInput:
    """Return a microbatch of `stage_input` on the GPU."""
    packing = microbatch.packing
    return StageInput(
        tokens=microbatch.tokens.cuda(),
        labels=microbatch.labels.cuda(),
        weights=microbatch.weights.cuda(),
        packing=Packing(
            cu_seqlens=packing.cu_seqlens.cuda(),
            lengths=packing.lengths,
            positions=packing.positions.cuda(),
            max_length=packing.max_length,
        ),
        route=make_route(microbatch.route.num_rows, microbatch.route.segments, microbatch.route.row_keys, "cuda"),
    )


def one_backward(directory, backends: Backends, recompute: str) -> dict:
    """Return losses and all adapter gradients of one microbatch; runs on the only rank."""
    architecture = read_architecture(directory)
    stage = build_stage(
        architecture, directory, ParallelConfig(), dtype=torch.bfloat16, device=torch.device("cuda"), recompute=recompute, backends=backends
    )
    attach_adapters(stage.linears, 1, dropout=0.25)
    for linear in stage.linears:
        group = linear.adapters
        linear.adapters = LoraGroup(
            a_RK=group.a_RK.bfloat16().cuda(),
            b_RN=tuple(b.bfloat16().cuda() for b in group.b_RN),
            grad_a_RK=group.grad_a_RK.cuda(),
            grad_b_RN=tuple(grad.cuda() for grad in group.grad_b_RN),
            **{name: getattr(group, name) for name in ("columns", "a_rows", "b_rows", "adapters", "first_feature")},
        )
    microbatch = to_gpu(stage_input((5, 22, 1, 16), architecture.vocab_size, ((2, 9, 1), (9, 40, 0))))
    losses = stage.losses(stage(microbatch), microbatch.labels)
    (losses * microbatch.weights).sum().backward()
    grads = [grad for linear in stage.linears for grad in (linear.adapters.grad_a_RK, *linear.adapters.grad_b_RN)]
    return {"losses": losses.detach().cpu(), "gradients": torch.cat([grad.flatten() for grad in grads]).cpu()}
