"""cuDNN's attention without a GPU: which plans are compiled, where samples lie, what takes its place; a stand-in computes from offsets."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import attach_adapters, save_model, stage_input, train_step

from fused_ops.launch.backend import gradients
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Packing
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model import cudnn_attention, stage
from megatron_lora.model.attention import PackedRows, per_sample_attention
from megatron_lora.model.backends import Backends
from megatron_lora.model.cudnn_attention import AttentionShape, PlannedAttention, attention_fault, sample_offsets, samples_of_plan
from megatron_lora.model.stage import build_stage

CPU = torch.device("cpu")


def shape_of(window=None, heads=4, kv_heads=2, head_dim=8) -> AttentionShape:
    return AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.5, window=window, dtype=torch.float32)


class PlainPlan:
    """A plan that finds samples as cuDNN does, by offsets and lengths alone, and attends to one after the other."""

    fault = None

    def __init__(self, shape, num_samples, num_rows):
        self.shape, self.num_samples, self.num_rows = shape, num_samples, num_rows
        if self.fault == "refused":
            raise RuntimeError("No valid execution plans\nbuilt.")

    def _attend(self, query, key, value, offsets):
        assert len(offsets.lengths) == self.num_samples and len(offsets.query) == self.num_samples + 1
        shape, window = self.shape, None if self.fault == "no window" else self.shape.window
        assert sum(offsets.lengths.tolist()) == query.shape[0] <= self.num_rows
        outs = []
        for k, length in enumerate(offsets.lengths.tolist()):
            parts = []
            for x, offset, heads in ((query, offsets.query, shape.heads), *((y, offsets.key, shape.kv_heads) for y in (key, value))):
                first = int(offset[k])
                assert int(offset[k + 1]) - first == length * heads * shape.head_dim
                parts.append(x.flatten()[first : first + length * heads * shape.head_dim].view(length, heads, shape.head_dim))
            if length:
                packing = Packing(cu_seqlens=offsets.lengths, lengths=(length,), positions=offsets.lengths, max_length=length)
                outs.append(per_sample_attention(*parts, packing, shape.scale, window))
        return torch.cat(outs)

    def forward(self, query, key, value, offsets):
        assert [int(at) // self.shape.heads for at in offsets.sums] == [0, *offsets.lengths.cumsum(0).tolist()]
        return self._attend(query, key, value, offsets), torch.zeros(query.shape[:2])

    def backward(self, d_out, saved, offsets):
        *qkv, out, sums = saved
        assert out.shape == qkv[0].shape and sums.shape == out.shape[:2] and d_out.is_contiguous()
        return gradients(lambda *x: (self._attend(*x, offsets),), tuple(qkv), (d_out,))[1]


def packed(lengths) -> PackedRows:
    return PackedRows(qkv_format="thd", packing=stage_input(lengths, 10).packing)


def random_qkv(num_rows, heads=4, kv_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(num_rows)
    return tuple(torch.randn(num_rows, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(("lengths", "num_samples"), [((3, 11, 1, 8), 8), ((5,), 8), ((1,) * 33, 64)])
def test_offsets_are_numbers_before_each_sample(lengths, num_samples):
    offsets = sample_offsets(lengths, num_samples, shape_of(), CPU)
    ends = [sum(lengths[:k]) for k in range(num_samples + 1)]
    assert offsets.lengths.tolist() == [*lengths, *[0] * (num_samples - len(lengths))]
    assert offsets.query.tolist() == [32 * end for end in ends]
    assert offsets.key.tolist() == [16 * end for end in ends] and offsets.sums.tolist() == [4 * end for end in ends]
    for part in (offsets.lengths, offsets.query, offsets.key, offsets.sums):
        assert part.dtype == torch.int32 and part.storage_offset() % 32 == 0 and part.is_contiguous()


def test_samples_go_in_powers_of_two():
    assert [samples_of_plan(count) for count in (1, 8, 9, 16, 17, 64, 65, 200)] == [8, 8, 16, 16, 32, 64, 128, 256]


def test_few_plans_serve_all_microbatches():
    made = []

    def compile_plan(shape, num_samples, num_rows):
        made.append((shape.window, num_samples, num_rows))
        return PlainPlan(shape, num_samples, num_rows)

    attention = PlannedAttention(compile_plan)
    attention.plan(shape_of(), 3, 1000)
    assert sorted(made) == [(None, samples, 1024) for samples in (8, 16, 32, 64)]
    for num_samples, num_rows in ((1, 1), (8, 1000), (50, 1024), (64, 64)):
        plan = attention.plan(shape_of(), num_samples, num_rows)
        assert plan.num_samples >= num_samples and plan.num_rows >= num_rows
    assert attention.plan(shape_of(window=5000), 1, 1) is attention.plan(shape_of(), 1, 1)  # a window that no sample fills
    assert len(made) == 4
    attention.plan(shape_of(window=16), 3, 1000)
    assert sorted(made[4:]) == [(16, samples, 1024) for samples in (8, 16, 32, 64)]
    attention.plan(shape_of(), 100, 1000)
    assert made[8:] == [(None, 128, 1024)]
    assert attention.plan(shape_of(), 1, 1025).num_rows == 1152  # a microbatch larger than any before
    assert len(made) == 13 and len(attention.plans) == 4


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [(3, 11, 1, 8), (23,), (1,) * 20])
def test_values_and_gradients_are_those_of_samples_by_themselves(window, lengths):
    attention, rows = PlannedAttention(PlainPlan), packed(lengths)
    query, key, value = random_qkv(sum(lengths))
    d_out = torch.randn(4, sum(lengths), 8, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    ours = gradients(lambda *x: (attention(*x, rows, 0.5, window),), (query, key, value), (d_out,))
    offsets = rows.offsets
    theirs = gradients(lambda *x: (per_sample_attention(*x, rows.packing, 0.5, window),), (query, key, value), (d_out,))
    for mine, truth in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(mine, truth)
    attention(query, key, value, rows, 0.5, None)
    assert rows.offsets is offsets  # made once for all layers


def test_offsets_beyond_int32_are_left_to_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(cudnn_attention, "varlen_attention", lambda *args: seen.append(args) or args[0])
    monkeypatch.setattr(cudnn_attention, "_INT32", (23 + 128) * 32)
    attention, (query, key, value) = PlannedAttention(PlainPlan), random_qkv(23)
    assert attention(query, key, value, packed((23,)), 0.5, 7) is query and seen[0][4:] == (0.5, 7) and not attention.plans
    monkeypatch.setattr(cudnn_attention, "_INT32", (23 + 128) * 32 + 1)
    attention(query, key, value, packed((23,)), 0.5, 7)
    assert len(seen) == 1 and attention.plans


@pytest.fixture
def stand_in(monkeypatch):
    """Let PlainPlan be what cuDNN compiles; its `fault` breaks it."""
    module = ModuleType("cudnn")
    module.create_handle = lambda: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(cudnn_attention.Cudnn, "compile_plan", lambda self, *shape: PlainPlan(*shape))
    return module


def fault_of(dtype=torch.bfloat16, windows=(None, 7, None)) -> str:
    return attention_fault(4, 2, 16, windows, dtype, CPU, num_rows=500)


@pytest.mark.parametrize(("fault", "says"), [(None, ""), ("refused", "No valid execution plans"), ("no window", "its output is off by")])
def test_it_is_tried_with_every_window(fault, says, stand_in, monkeypatch):
    monkeypatch.setattr(PlainPlan, "fault", fault)
    said = fault_of()
    assert said.startswith(says) and (said == says or fault == "no window")


def test_what_does_not_load_is_a_line(stand_in, monkeypatch):
    assert fault_of(torch.float32) == "it takes 16 bits alone"
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert "cudnn" in fault_of() and "\n" not in fault_of()

    def no_handle():
        raise RuntimeError("cudnnHandle Create failed\nno device")

    stand_in.create_handle = no_handle
    monkeypatch.setitem(sys.modules, "cudnn", stand_in)
    assert fault_of() == "cudnnHandle Create failed"


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])  # a window in all layers, and in some
def test_a_stage_computes_the_same(kind, recompute, monkeypatch, tmp_path, one_process):
    save_model(tmp_path, kind)
    answers = []
    shared = PlannedAttention(PlainPlan)
    monkeypatch.setattr(stage, "cudnn_attention", lambda: shared)
    for attention in ("torch", "cudnn"):
        built = build_stage(
            read_architecture(tmp_path), tmp_path, ParallelConfig(),
            dtype=torch.float32, device=CPU, recompute=recompute, backends=Backends(attention=attention),
        )  # fmt: skip
        attach_adapters(built.linears, 1, dropout=0.25)
        answers.append(train_step(built, stage_input((5, 22, 1, 16), 61, ((2, 9, 1), (9, 40, 0))), ParallelConfig()))
    assert {samples for _, samples in shared.plans} == {8, 16, 32, 64}
    torch.testing.assert_close(answers[1]["losses"], answers[0]["losses"], rtol=1e-5, atol=1e-5)
    for name, gradient in answers[0]["gradients"].items():
        assert gradient.any() and (answers[1]["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
