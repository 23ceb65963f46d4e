"""Attention whose scores are capped, softmax(c tanh(q k scale / c)) v, in plain torch: no library's fast attention has it.

A block of BLOCK_ROWS query rows of one sample is computed at a time, and again in backward, so that only q, k and v are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.launch.backend import gradients
from megatron_lora.data.microbatch import Packing

BLOCK_ROWS = 64


def capped_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None, cap: float) -> Tensor:
    """Attend from each row to the rows of its sample up to itself, within the window; [T, heads, d], key and value [T, kv heads, d]."""
    return _CappedAttention.apply(query, key, value, packing.lengths, scale, window, cap)


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, lengths, scale, window, cap):
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.settings = list(_blocks(lengths, window)), (scale, window, cap)
        out = torch.empty_like(query)
        for rows, keys in ctx.blocks:
            out[rows] = _block(query[rows], key[keys], value[keys], rows.start - keys.start, *ctx.settings)
        return out

    @staticmethod
    def backward(ctx, d_out):
        query, key, value = ctx.saved_tensors
        d_query, sums = torch.empty_like(query), [torch.zeros_like(each, dtype=torch.float32) for each in (key, value)]
        for rows, keys in ctx.blocks:
            behind = rows.start - keys.start
            _, (d_query[rows], *others) = gradients(
                lambda q, k, v, behind=behind: (_block(q, k, v, behind, *ctx.settings),),
                (query[rows], key[keys], value[keys]),
                (d_out[rows],),
            )
            for total, part in zip(sums, others, strict=True):
                total[keys] += part
        return d_query, *(total.to(key.dtype) for total in sums), None, None, None, None


def _blocks(lengths: tuple[int, ...], window: int | None):
    """Yield the rows of each block, and the rows that they may attend to."""
    end = 0
    for length in lengths:
        start, end = end, end + length
        for first in range(start, end, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, end)
            yield slice(first, last), slice(start if window is None else max(start, first - window + 1), last)


def _block(query: Tensor, key: Tensor, value: Tensor, behind: int, scale: float, window: int | None, cap: float) -> Tensor:
    """Attend from n rows to m keys, of which the first query row is number `behind`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    q = query.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)  # [kv, group, n, d]
    scores = cap * torch.tanh(q @ key.permute(1, 2, 0)[:, None] * (scale / cap))
    distance = torch.arange(behind, behind + len(query), device=q.device)[:, None] - torch.arange(len(key), device=q.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = scores.float().masked_fill(hidden, float("-inf")).softmax(-1).to(value.dtype)
    return (weights @ value.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
