"""Packed attention against its definition: softmax over the rows of one's own sample, up to oneself, within the window."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import stage_input

from fused_ops.elementwise.rope import rotate
from fused_ops.launch.backend import gradients
from megatron_lora.data.microbatch import Packing
from megatron_lora.huggingface.architecture import Rope
from megatron_lora.huggingface.rope import frequencies, rotary_table
from megatron_lora.model.attention import PackedAttention, PackedRows, can_varlen, per_sample_attention, varlen_attention
from megatron_lora.model.capped_attention import capped_attention

LENGTHS = (3, 11, 1, 8)


def packing_of(lengths=LENGTHS, device="cpu") -> Packing:
    packing = stage_input(lengths, 10).packing
    return Packing(
        cu_seqlens=packing.cu_seqlens.to(device), lengths=packing.lengths, positions=packing.positions.to(device), max_length=max(lengths)
    )


def random_qkv(heads, kv_heads, head_dim=8, lengths=LENGTHS, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim))
    return [torch.randn(sum(lengths), *s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def by_definition(query, key, value, packing, window):
    """Attention by the full [T, T] score matrix, masked."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    sample = torch.repeat_interleave(torch.arange(len(packing.lengths)), torch.tensor(packing.lengths)).to(query.device)
    rows = torch.arange(len(sample), device=query.device)
    behind = rows[:, None] - rows
    seen = (sample[:, None] == sample) & (behind >= 0) & (behind < (window or len(rows)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 11, 50])
def test_per_sample_equals_definition(heads, kv_heads, window):
    results = []
    for attend in (
        lambda q, k, v: per_sample_attention(q, k, v, packing_of(), q.shape[-1] ** -0.5, window),
        lambda q, k, v: by_definition(q, k, v, packing_of(), window),
    ):
        inputs = random_qkv(heads, kv_heads)
        out = attend(*inputs)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (9, 3)])
def test_varlen_equals_per_sample(window, heads, kv_heads):
    lengths = (130, 7, 1, 300)
    packing = packing_of(lengths, "cuda")
    results = []
    for attend, dtype in (
        (varlen_attention, torch.bfloat16),
        (per_sample_attention, torch.bfloat16),
        (per_sample_attention, torch.float32),
    ):
        inputs = random_qkv(heads, kv_heads, 64, lengths, dtype, "cuda")
        out = attend(*inputs, packing, 0.125, window)
        out.float().square().sum().backward()
        results.append([x.float() for x in (out.detach(), *(x.grad for x in inputs))])
    for ours, twin, exact in zip(*results, strict=True):
        assert (ours - exact).square().mean().sqrt() <= 2 * (twin - exact).square().mean().sqrt() + 1e-4


def test_only_cuda_in_16_bit_takes_flash_attention():
    assert not can_varlen(random_qkv(2, 2, dtype=torch.bfloat16)[0])


def core(window=None, head_dim=8):
    architecture = SimpleNamespace(sliding_windows=(None, window), softmax_scale=head_dim**-0.5, attention_cap=None)
    return PackedAttention(SimpleNamespace(architecture=architecture), layer_number=2)


def run_core(attention, query, key, value, lengths=LENGTHS):
    rows = PackedRows(qkv_format="thd", packing=packing_of(lengths))
    return attention(query, key, value, None, attn_mask_type=None, attention_bias=None, packed_seq_params=rows)


def test_core_attention_keeps_samples_apart_within_its_window():
    query, key, value = random_qkv(4, 2)
    packed = run_core(core(window=5), query, key, value)
    alone = [
        run_core(core(window=5), *parts, lengths=(len(parts[0]),))
        for parts in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    ]
    assert packed.shape == (sum(LENGTHS), 32)
    assert torch.equal(packed, torch.cat(alone))
    assert not torch.allclose(packed, run_core(core(), query, key, value))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, generator=generator)
    freqs, scale = frequencies(Rope(theta=1e4), 16)

    def score(i, j):
        table_i, table_j = (rotary_table(torch.tensor([position]), freqs, scale, torch.float32) for position in (i, j))
        return (rotate(query, table_i) * rotate(key, table_j)).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert (score(7, 3) - score(7, 1)).abs() > 0.1
    table = rotary_table(torch.tensor([50]), freqs, scale, torch.float32)
    torch.testing.assert_close(rotate(query, table).norm(), query.norm())


@pytest.mark.parametrize("window", [None, 9, 100])
def test_capped_attention_in_blocks(window):
    """Blocks of rows give what all scores at once give, forward and backward."""
    lengths, cap, scale = (70, 1, 130), 1.5, 0.9
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))

    def at_once(q, k, v):
        outs = []
        for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            b, c = (x.repeat_interleave(2, dim=1) for x in (b, c))
            behind = torch.arange(len(a))[:, None] - torch.arange(len(a))
            seen = (behind >= 0) & (behind < (window or len(a)))
            scores = cap * torch.tanh(torch.einsum("ihd,jhd->hij", a, b) * scale / cap)
            outs.append(torch.einsum("hij,jhd->ihd", scores.where(seen, -torch.inf).softmax(-1), c))
        return (torch.cat(outs),)

    ours, grads = gradients(lambda *x: (capped_attention(*x, packing_of(lengths), scale, window, cap),), (q, k, v), (d_out,))
    theirs, expected = gradients(at_once, (q, k, v), (d_out,))
    for found, truth in zip((*ours, *grads), (*theirs, *expected), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
