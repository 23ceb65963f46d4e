"""Tiny models, microbatches and adapters for tests, equal on every layout of ranks.

`save_model` writes a random transformers model of one of `KINDS`; `stage_input` packs samples; `attach_adapters` gives every linear of a
stage a LoraGroup cut out of factors that depend on the module's path alone; `train_step` runs one forward and backward through the
pipeline with blocking sends, freeing what was sent; `joined_gradients` joins the factors' gradients of all tensor ranks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from full_logits import full_logits
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from fused_ops.lora.adapters import AdapterTable, LoraGroup
from fused_ops.lora.route import make_route
from megatron_lora.data.microbatch import Packing, StageInput

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.0, 2.5, 7.0]}  # fmt: skip
KINDS = {  # name: (transformers class, what differs); query heads per kv head: 1, 3, 4, 7, 2, 2
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True,
                        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama-tied": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "tie_word_embeddings": True,
                             "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 7}),
    "qwen2": ("Qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56, "tie_word_embeddings": True,
                        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN}),
    "qwen3-biased": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True,
                               "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
                               "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3_moe-unnormalised": ("Qwen3Moe", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "num_experts": 5,
                                            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "use_sliding_window": True,
                                            "sliding_window": 7, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}),
    "granite": ("Granite", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
                            "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.5}),
    "smollm3": ("SmolLM3", {"num_attention_heads": 4, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1], "pad_token_id": None,
                            "use_sliding_window": True, "sliding_window": 5}),
    "ministral": ("Ministral", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5,
                                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 9, "original_max_position_embeddings": 16,
                      "rope_parameters": LONGROPE, "pad_token_id": None}),
    "gemma2": ("Gemma2", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, "attention_bias": True,
                          "query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.9}),
    "gemma3_text": ("Gemma3Text", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5,
                                   "query_pre_attn_scalar": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                   "rope_parameters": {
                                       "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}}),
}  # fmt: skip


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
MULTIMODAL = {  # name: (kind of its text part, transformers class, vision class, what differs)
    "gemma3": ("gemma3_text", "Gemma3", "SiglipVision", {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", "Mistral3", "PixtralVision", {"tie_word_embeddings": False}),
}


def save_multimodal(directory: Path, kind: str):
    """Write a random model of text and images, and return it."""
    import transformers

    text, name, vision, values = MULTIMODAL[kind]
    part = getattr(transformers, KINDS[text][0] + "Config")(**{**BASE, **KINDS[text][1]})
    tower = getattr(transformers, vision + "Config")(**TOWER)
    config = getattr(transformers, name + "Config")(text_config=part.to_dict(), vision_config=tower.to_dict(), **values)
    return save_random(transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval(), directory)


def save_model(directory: Path, kind: str, max_shard_size: str = "5GB", more=()):
    """Write a random float32 model of a kind, with `more` of its config, every parameter of it random, and return it."""
    import transformers

    name, values = KINDS[kind]
    transformers.utils.logging.set_verbosity_error()
    config = getattr(transformers, name + "Config")(**{**BASE, **values, **dict(more)})
    return save_random(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), directory, max_shard_size)


def save_random(model, directory: Path, max_shard_size: str = "5GB"):
    """Write a model with random parameters, and return it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.dim() == 1))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def stage_input(lengths, vocab_size: int, segments=(), seed: int = 0) -> StageInput:
    """Return a microbatch of random tokens and labels (every fifth label none); `segments` are (first row, end row, job)."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(lengths)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[::5] = -100
    keys = torch.randint(-(2**31), 2**31, (num_rows,), generator=generator).to(torch.int32)
    return StageInput(
        tokens=torch.randint(vocab_size, (num_rows,), generator=generator),
        labels=labels,
        weights=torch.rand(num_rows, generator=generator),
        packing=Packing(
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            lengths=tuple(lengths),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            max_length=max(lengths),
        ),
        route=make_route(num_rows, segments, keys, "cpu") if segments else None,
    )


def random_factor(path: str, what: str, job: int, *shape: int) -> torch.Tensor:
    """Return one job's A [r, K] or B transposed [r, N] of a module, for all tensor ranks together."""
    key = hashlib.sha256(f"{path} {what} {job}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))) * 0.2


def attach_adapters(
    linears, tensor_ranks: int, dropout: float = 0.0, ranks=(4, 17), skip=((1, "k_proj"), (0, "up_proj"), (1, "gate_up_proj"))
) -> None:
    """Give every linear the adapters of `len(ranks)` jobs; `skip` names (job, module) that are not targeted."""
    table = AdapterTable(ranks=tuple(ranks), scales=tuple(0.5 + job for job in range(len(ranks))), dropouts=(dropout,) * len(ranks))
    for linear in linears:
        geometry = linear.geometry
        column = geometry.parallel == "column"
        a_blocks, b_blocks = [], [[] for _ in geometry.modules]
        a_rows, b_rows = [], []
        for job, r in enumerate(ranks):
            height = -(-r // 16) * 16
            a_row, b_row = [], []
            for m, (module, path) in enumerate(zip(geometry.modules, geometry.paths, strict=True)):
                if (job, module) in skip:
                    a_row.append(-1)
                    b_row.append(-1)
                    continue
                k, n = geometry.in_features, geometry.out_features[m]
                a = random_factor(path, "A", job, r, k if column else k * tensor_ranks)
                b = random_factor(path, "B", job, r, n * tensor_ranks if column else n)
                a = a[:, geometry.first_feature :][:, :k]
                b = torch.cat([b[:, at : at + width] for at, width in geometry.pieces(m, linear.tp_group.rank())], dim=1)
                a_row.append(sum(map(len, a_blocks)))
                b_row.append(sum(map(len, b_blocks[m])))
                a_blocks.append(torch.nn.functional.pad(a, (0, 0, 0, height - r)))
                b_blocks[m].append(torch.nn.functional.pad(b, (0, 0, 0, height - r)))
            a_rows.append(tuple(a_row))
            b_rows.append(tuple(b_row))
        a_RK, b_RN = torch.cat(a_blocks), tuple(torch.cat(blocks) for blocks in b_blocks)
        linear.adapters = LoraGroup(
            a_RK=a_RK,
            b_RN=b_RN,
            grad_a_RK=torch.zeros_like(a_RK),
            grad_b_RN=tuple(map(torch.zeros_like, b_RN)),
            columns=geometry.columns,
            a_rows=tuple(a_rows),
            b_rows=tuple(b_rows),
            adapters=table,
            first_feature=geometry.first_feature,
        )


def joined_gradients(linears) -> dict[str, torch.Tensor]:
    """Return "path kind job" -> gradient of each factor, of all tensor ranks: shards side by side, replicated factors summed."""
    grads = {}
    for linear in linears:
        geometry, group = linear.geometry, linear.adapters
        for job, r in enumerate(group.adapters.ranks):
            for m, path in enumerate(geometry.paths):
                if group.a_rows[job][m] < 0:
                    continue
                a_row, b_row = group.a_rows[job][m], group.b_rows[job][m]
                a, b = group.grad_a_RK[a_row : a_row + r].contiguous(), group.grad_b_RN[m][b_row : b_row + r].contiguous()
                for what, grad, sharded in (("A", a, geometry.parallel == "row"), ("B", b, geometry.parallel == "column")):
                    parts = [torch.empty_like(grad) for _ in range(linear.tp_group.size())]
                    dist.all_gather(parts, grad, group=linear.tp_group)
                    full = torch.stack(parts).sum(0)
                    if sharded:
                        pieces = [geometry.pieces(m, rank) if what == "B" else ((rank, part.shape[1]),) for rank, part in enumerate(parts)]
                        full = joined(parts, pieces)
                    grads[f"{path} {what} {job}"] = full
    return grads


def joined(parts, pieces) -> torch.Tensor:
    """Join columns of several ranks, whose `pieces` say where they belong."""
    found = {}
    for part, of_rank in zip(parts, pieces, strict=True):
        found |= zip((first for first, _ in of_rank), part.split([width for _, width in of_rank], dim=1), strict=True)
    return torch.cat([found[first] for first in sorted(found)], dim=1)


def train_step(stage, microbatch: StageInput, parallel) -> dict:
    """Run one forward and backward through the pipeline; return this rank's losses and logits (last stage) and factor gradients."""
    hidden_size, stride = stage.architecture.hidden_size, parallel.tensor * parallel.data
    num_rows = microbatch.tokens.shape[0] // (parallel.tensor if stage.sequence_parallel else 1)
    rank, received, answer = dist.get_rank(), None, {}
    if not stage.is_first:
        received = torch.empty(num_rows, hidden_size, dtype=stage.dtype)
        dist.recv(received, rank - stride)
        received.requires_grad_()
    out = stage(microbatch, received)
    assert out.shape == (num_rows, hidden_size) and out._base is None
    if stage.is_last:
        losses = stage.losses(out, microbatch.labels)
        answer = {"losses": losses.detach(), "logits": full_logits(out, stage.head).detach()}
        (losses * microbatch.weights).sum().backward()
    else:
        dist.send(out.detach(), rank + stride)
        grad = torch.empty_like(out)
        deallocate_output_tensor(out, True)
        dist.recv(grad, rank + stride)
        custom_backward(out, grad)
    if received is not None:
        dist.send(received.grad, rank - stride)
    return answer | {"gradients": joined_gradients(stage.linears) if stage.linears[0].adapters else {}}
