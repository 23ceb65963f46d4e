"""A job's adapter as the arena has it, in checkpoints, and as it is written for others.

The arena has one scale for all linears of a job. Where the job gives some another one, B there is multiplied by the ratio, and so it
is in checkpoints, whose alphas say so: what is resumed has the bits that were saved. The PEFT directory has the job's own alphas.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lora.config.schema import JobConfig
from megatron_lora.huggingface import base_files
from megatron_lora.huggingface.adapter_files import AdapterFile, layer_of
from megatron_lora.huggingface.export import with_alphas
from megatron_lora.planning.targets import targets_of

Weights = dict[str, tuple[Tensor, ...]]  # path -> (A [r, K], B [N, r]), with DoRA also m [N]; fp32, all shards joined


def adapter_of(job: JobConfig, weights: Weights, rests_on: Mapping[str, str]) -> AdapterFile:
    """Return a job's adapter in PEFT's format, as the arena has it, for the base model whose files have the digests `rests_on`."""
    alphas = {}
    if job.linears:
        alphas = {path: job.scale * len(a_RK) ** (0.5 if job.use_rslora else 1.0) for path, (a_RK, *_) in weights.items()}
    return AdapterFile(
        r=job.lora_rank,
        expert_r=job.expert_rank,
        lora_alpha=max(alphas.values(), default=job.lora_alpha * job.times_alpha),
        alphas=alphas,
        targets=targets_of(job, job.target_modules) if job.linears else None,
        use_rslora=job.use_rslora,
        lora_dropout=0.0 if job.experts else job.lora_dropout,  # PEFT refuses another for experts
        target_modules=tuple(dict.fromkeys(path.rpartition(".")[2] for path in weights)),
        weights={path: (tensors[0], tensors[1]) for path, tensors in weights.items()},
        magnitudes={path: tensors[2] for path, tensors in weights.items() if len(tensors) > 2},
        revision=rests_on.get(base_files.COMMIT),
        base_digest=rests_on.get(base_files.WEIGHTS, ""),
    )


def as_trained(job: JobConfig, adapter: AdapterFile) -> AdapterFile:
    """Return a job's adapter with the alphas that the job gives its linears."""
    if not job.linears:
        return adapter
    alphas = {path: job.times_alpha * job.alpha_at(path.rpartition(".")[2], layer_of(path)) for path in adapter.weights}
    return with_alphas(adapter, alphas)


def as_in_arena(job: JobConfig, adapter: AdapterFile) -> Weights:
    """Return the weights of an adapter with a job's alphas as the arena has them."""
    if not job.linears:
        return dict(adapter.factors)
    return {
        path: (a_RK, b_NR.float() * (adapter.scale(path) / job.scale), *magnitudes)
        for path, (a_RK, b_NR, *magnitudes) in adapter.factors.items()
    }
