"""How an adapter is written for those who serve it: the numbers' type, and a form that every reader of PEFT directories reads alike.

    scale * B A  =  (r' / r') * B' A'        portable: r' is the largest rank, A' and B' = scale * B padded with zeros, lora_alpha = r'

Some readers ignore rank_pattern, alpha_pattern or use_rslora without a word; a portable adapter has none of them.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from megatron_lora.huggingface.adapter_files import AdapterFile
from megatron_lora.huggingface.adapter_targets import Targets

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(adapter: AdapterFile, form: str, dtype: str) -> AdapterFile:
    """Return an adapter in the `form` peft or portable, in a `dtype` of EXPORT_DTYPES; fp32 where fp16 has no number for one of its."""
    if form == "portable":
        adapter = portable(adapter)
    kind = EXPORT_DTYPES[dtype]
    weights = {path: (a_RK.to(kind), b_NR.to(kind)) for path, (a_RK, b_NR) in adapter.weights.items()}
    magnitudes = {path: m.to(kind) for path, m in adapter.magnitudes.items()}
    converted = dataclasses.replace(adapter, weights=weights, magnitudes=magnitudes)
    fits = all(bool(torch.isfinite(factor).all()) for factors in converted.factors.values() for factor in factors)
    return converted if fits else adapter


def portable(adapter: AdapterFile) -> AdapterFile:
    """Return an adapter that computes the same with one rank, whose scale is 1. A DoRA adapter has no such form."""
    assert not adapter.magnitudes
    r = max(a_RK.shape[0] for a_RK, _ in adapter.weights.values())
    weights = {
        path: (pad(a_RK.float(), (0, 0, 0, r - a_RK.shape[0])), pad(adapter.scale(path) * b_NR.float(), (0, r - b_NR.shape[1])))
        for path, (a_RK, b_NR) in adapter.weights.items()
    }
    chosen = adapter.targets  # by paths where not by names: every reader takes those
    targets = Targets(target_modules=tuple(weights)) if chosen is not None and chosen.choose_by_more_than_names else None
    alike = {"r": r, "expert_r": r if adapter.expert_r else 0, "lora_alpha": float(r), "use_rslora": False, "alphas": {}}
    return dataclasses.replace(adapter, **alike, weights=weights, targets=targets)


def with_alphas(adapter: AdapterFile, alphas: Mapping[str, float]) -> AdapterFile:
    """Return an adapter that computes the same with other alphas, path -> alpha."""
    other = dataclasses.replace(adapter, lora_alpha=max(alphas.values()), alphas=alphas)
    weights = {path: (a_RK, b_NR * (adapter.scale(path) / other.scale(path))) for path, (a_RK, b_NR) in adapter.weights.items()}
    return dataclasses.replace(other, weights=weights)
