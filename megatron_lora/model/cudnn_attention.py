"""Attention over packed samples by cuDNN's fused kernels, through the optional package nvidia-cudnn-frontend.

    o_i = sum_j softmax_j(scale q_i . k_j) v_j        over the rows j of i's sample with i - window < j <= i

q and o [T, heads, d], k and v [T, kv heads, d] and their gradients lie packed, as they are. A sample is found by its offset (int32, in
numbers) and its length; both are on the device, made once a microbatch from the lengths that the host knows, so nothing waits.

A plan is compiled for a number of samples and of rows, 0.2 s each, 1 to 2 s where its kernel is new to the process. Microbatches with
fewer of both fit it too, missing samples being empty ones: what a plan takes depends on its real samples alone (measured on an H200:
within 3% up to ten times the samples and three times the longest). So numbers of samples go in powers of two, and rows are those of the
largest microbatch so far, which the warm-up runs first: a run has about ten plans, of which the usual ones are compiled there.

Backward's workspace has dQ and, where heads are grouped, every query head's dK and dV in float32, for all rows of the plan. It is asked of
torch's allocator for the length of one backward, as flash attention does with its own, and the memory model counts it at that moment.
The order of backward's sums is not fixed: gradients differ in their last bits from run to run, as flash attention's do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lora.data.microbatch import Packing
from megatron_lora.model.attention import PackedRows, fault_of, varlen_attention
from megatron_lora.model.backends import first_line

USUAL_SAMPLES = (8, 16, 32, 64)  # of a microbatch; the first is the fewest that a plan is for
_ROW_ALIGN = 128  # of a plan's rows: a tile
_INT32 = 2**31
_WORKSPACE_NUMBERS = 4  # float32 numbers of workspace for a number of q, at most: three, and rows of sums


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What all calls of a layer have in common; heads are this rank's."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SampleOffsets:
    """Where samples lie: `lengths` int32 [samples], and the numbers before each, int32 [samples + 1], in q, in k and in the sums."""

    lengths: Tensor
    query: Tensor
    key: Tensor
    sums: Tensor


class PlannedAttention:
    """Attention of all layers of a stage, with the plans that they share."""

    def __init__(self, compile_plan: Callable[[AttentionShape, int, int], CudnnPlan], usual_samples: tuple[int, ...] = USUAL_SAMPLES):
        """`compile_plan(shape, samples, rows)` makes a plan; those for `usual_samples` are made with the first of a shape."""
        self.compile_plan = compile_plan
        self.usual_samples = usual_samples
        self.num_rows = 0
        self.plans: dict[tuple[AttentionShape, int], CudnnPlan] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float, window: int | None) -> Tensor:
        """Return [T, heads, d] of q [T, heads, d], k and v [T, kv heads, d]; torch's flash attention where an offset has no int32."""
        packing = rows.packing
        assert packing is not None
        if query.numel() + _ROW_ALIGN * query[0].numel() >= _INT32:
            return varlen_attention(query, key, value, packing, scale, window)
        _, heads, head_dim = query.shape
        shape = AttentionShape(heads=heads, kv_heads=key.shape[1], head_dim=head_dim, scale=scale, window=window, dtype=query.dtype)
        plan = self.plan(shape, len(packing.lengths), query.shape[0])
        if rows.offsets is None:  # the same for all layers
            rows.offsets = sample_offsets(packing.lengths, plan.num_samples, shape, query.device)
        return _Attention.apply(query, key, value, plan, rows.offsets)

    def plan(self, shape: AttentionShape, num_samples: int, num_rows: int) -> CudnnPlan:
        """Return a plan that fits a microbatch, compiled now if there is none; a larger one than any before makes all plans anew."""
        if num_rows > self.num_rows:
            self.num_rows = -(-num_rows // _ROW_ALIGN) * _ROW_ALIGN
            self.plans = {}  # those in use stay with their microbatches
        if shape.window is not None and shape.window >= self.num_rows:
            shape = replace(shape, window=None)
        wanted = samples_of_plan(num_samples)
        if (shape, wanted) not in self.plans:
            is_first = all(other != shape for other, _ in self.plans)
            for samples in {wanted, *(self.usual_samples if is_first else ())}:
                self.plans[shape, samples] = self.compile_plan(shape, samples, self.num_rows)
        return self.plans[shape, wanted]


def samples_of_plan(num_samples: int) -> int:
    """Return the number of samples that the plan for a microbatch of `num_samples` is compiled for."""
    return max(USUAL_SAMPLES[0], 1 << (num_samples - 1).bit_length())


def sample_offsets(lengths: tuple[int, ...], num_samples: int, shape: AttentionShape, device: torch.device) -> SampleOffsets:
    """Return the offsets of samples of such lengths, filled up to `num_samples` with empty ones; no wait for the device."""
    filled = torch.zeros(num_samples + 1, dtype=torch.int64)
    filled[1 : len(lengths) + 1] = torch.tensor(lengths)
    ends = filled.cumsum(0)
    width = -(-(num_samples + 1) // 32) * 32  # every part begins at a multiple of 128 bytes
    host = torch.zeros(4, width, dtype=torch.int32)
    host[0, :num_samples] = filled[1:]
    for part, numbers in enumerate((shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.heads), 1):
        host[part, : num_samples + 1] = ends * numbers
    sent = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    return SampleOffsets(sent[0, :num_samples], *(sent[part, : num_samples + 1] for part in (1, 2, 3)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, offsets):
        out, sums = plan.forward(query, key, value, offsets)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.plan, ctx.offsets = plan, offsets
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *ctx.plan.backward(d_out.contiguous(), ctx.saved_tensors, ctx.offsets), None, None


class Cudnn:
    """The package, with a handle of cuDNN on the current device."""

    def __init__(self):
        """Raises ImportError or RuntimeError where the package or its cuDNN does not work."""
        self.package = importlib.import_module("cudnn")
        self.handle = self.package.create_handle()

    def compile_plan(self, shape: AttentionShape, num_samples: int, num_rows: int) -> CudnnPlan:
        """Compile both directions of a shape; raises RuntimeError where cuDNN has no kernel for it, or one that needs too much memory."""
        try:
            return CudnnPlan(self, shape, num_samples, num_rows)
        except self.package.cudnnGraphNotSupportedError as error:
            raise RuntimeError(first_line(error)) from error

    def execute(self, graph, tensors: dict, num_bytes: int, device: torch.device) -> None:
        """Launch a graph on torch's current stream."""
        self.package.set_stream(self.handle, torch.cuda.current_stream(device).cuda_stream)
        workspace = torch.empty(max(1, num_bytes), dtype=torch.uint8, device=device)
        graph.execute(tensors, workspace, handle=self.handle)


class CudnnPlan:
    """Forward and backward of a shape's attention, compiled for a limited number of samples and rows; outputs are new tensors."""

    def __init__(self, cudnn: Cudnn, shape: AttentionShape, num_samples: int, num_rows: int, deterministic: bool = False):
        """`deterministic` fixes the order of backward's sums; its workspace grows with samples times rows squared."""
        self.cudnn = cudnn
        self.num_samples = num_samples
        self.num_rows = num_rows
        options = {"attn_scale": shape.scale, "use_causal_mask": True, "use_padding_mask": True}
        options |= {} if shape.window is None else {"sliding_window_length": shape.window}
        self.ahead = ahead = _PackedGraph(cudnn, shape, num_samples, num_rows)
        self.back = back = _PackedGraph(cudnn, shape, num_samples, num_rows)
        package = cudnn.package
        self.out, self.sums = ahead.graph.sdpa(
            name="attention", q=ahead.query, k=ahead.key, v=ahead.value, is_inference=False, **ahead.lengths_of_both, **options
        )
        ahead.make_output(self.out, shape.heads, ahead.query_offset)
        self.sums.set_output(True).set_data_type(package.data_type.FLOAT)
        self.sums.set_dim(ahead.sums_dim).set_stride(ahead.sums_stride).set_ragged_offset(ahead.sums_offset)
        self.saved_out = back.packed("o", shape.heads, back.query_offset)
        self.d_out = back.packed("do", shape.heads, back.query_offset)
        self.saved_sums = back.graph.tensor(name="sums", dim=back.sums_dim, stride=back.sums_stride, data_type=package.data_type.FLOAT)
        self.saved_sums.set_ragged_offset(back.sums_offset)
        self.grads = back.graph.sdpa_backward(
            name="gradients", q=back.query, k=back.key, v=back.value, o=self.saved_out, dO=self.d_out, stats=self.saved_sums,
            max_total_seq_len_q=num_rows, max_total_seq_len_kv=num_rows, use_deterministic_algorithm=deterministic,
            **back.lengths_of_both, **options,
        )  # fmt: skip
        back.make_output(self.grads[0], shape.heads, back.query_offset)
        for grad in self.grads[1:]:
            back.make_output(grad, shape.kv_heads, back.key_offset)
        self.ahead_bytes, self.back_bytes = ahead.compile(), back.compile()
        largest, most = max(self.ahead_bytes, self.back_bytes), 4 * _WORKSPACE_NUMBERS * num_rows * shape.heads * shape.head_dim + 2**24
        if largest > most and not deterministic:
            raise RuntimeError(f"its kernels need {largest / 1e9:.1f} GB of workspace")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, offsets: SampleOffsets) -> tuple[Tensor, Tensor]:
        """Return the output [T, heads, d] and the logarithms of softmax's sums, fp32 [T, heads]."""
        assert query.shape[0] <= self.num_rows and all(x.is_contiguous() for x in (query, key, value))
        out, sums = torch.empty_like(query), torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        tensors = self.ahead.bound(query, key, value, offsets) | {self.out: out, self.sums: sums}
        self.cudnn.execute(self.ahead.graph, tensors, self.ahead_bytes, query.device)
        return out, sums

    def backward(self, d_out: Tensor, saved: tuple[Tensor, ...], offsets: SampleOffsets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v; `saved` has q, k, v, the output and the sums."""
        query, key, value, out, sums = saved
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        tensors = self.back.bound(query, key, value, offsets) | dict(zip(self.grads, grads, strict=True))
        tensors |= {self.saved_out: out, self.d_out: d_out, self.saved_sums: sums}
        self.cudnn.execute(self.back.graph, tensors, self.back_bytes, query.device)
        return grads


class _PackedGraph:
    """A graph of cuDNN with what both directions read: q, k and v, packed, and where samples lie in them."""

    def __init__(self, cudnn: Cudnn, shape: AttentionShape, num_samples: int, num_rows: int):
        kinds = cudnn.package.data_type
        self.package = cudnn.package
        self.number = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[shape.dtype]
        self.graph = cudnn.package.pygraph(
            io_data_type=self.number, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT, handle=cudnn.handle
        )
        self.num_samples = num_samples
        self.num_rows = num_rows
        self.head_dim = shape.head_dim
        self.lengths = self._index("lengths", num_samples)
        self.query_offset = self._index("at_q", num_samples + 1)
        self.key_offset = self._index("at_k", num_samples + 1)
        self.sums_offset = self._index("at_sums", num_samples + 1)
        self.query = self.packed("q", shape.heads, self.query_offset)
        self.key = self.packed("k", shape.kv_heads, self.key_offset)
        self.value = self.packed("v", shape.kv_heads, self.key_offset)
        self.sums_dim = [num_samples, shape.heads, num_rows, 1]
        self.sums_stride = [num_rows * shape.heads, 1, shape.heads, 1]
        self.lengths_of_both = {"seq_len_q": self.lengths, "seq_len_kv": self.lengths}

    def _index(self, name: str, count: int):
        return self.graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.package.data_type.INT32)

    def packed(self, name: str, heads: int, offset):
        """Declare an input [samples, heads, rows, d] of packed rows."""
        dim, stride = self._layout(heads)
        return self.graph.tensor(name=name, dim=dim, stride=stride, data_type=self.number).set_ragged_offset(offset)

    def make_output(self, tensor, heads: int, offset) -> None:
        """Let an output [samples, heads, rows, d] lie in packed rows."""
        dim, stride = self._layout(heads)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_ragged_offset(offset)

    def _layout(self, heads: int) -> tuple[list[int], list[int]]:
        width = heads * self.head_dim
        return [self.num_samples, heads, self.num_rows, self.head_dim], [self.num_rows * width, self.head_dim, width, 1]

    def compile(self) -> int:
        """Finish the graph and return the bytes of workspace that it needs."""
        modes = self.package.heur_mode
        self.graph.build([modes.A, modes.FALLBACK])
        return self.graph.get_workspace_size()

    def bound(self, query: Tensor, key: Tensor, value: Tensor, offsets: SampleOffsets) -> dict:
        """Return which tensor stands for which of the graph."""
        places = {self.lengths: offsets.lengths, self.query_offset: offsets.query, self.key_offset: offsets.key}
        return {self.query: query, self.key: key, self.value: value, **places, self.sums_offset: offsets.sums}


def cudnn_attention() -> PlannedAttention:
    """Return cuDNN's attention on the current device."""
    return PlannedAttention(Cudnn().compile_plan)


def attention_fault(
    heads: int, kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: torch.dtype, device: torch.device, num_rows: int
) -> str:
    """Try cuDNN's attention on a device, in plans for `num_rows` rows; return what is wrong with it in a line, or nothing."""
    try:
        attention = PlannedAttention(Cudnn().compile_plan, usual_samples=())
    except (ImportError, OSError, RuntimeError) as error:  # whatever it is, torch's attention takes its place
        return first_line(error)
    attention.num_rows = -(-num_rows // _ROW_ALIGN) * _ROW_ALIGN

    def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
        return attention(query, key, value, PackedRows(qkv_format="thd", packing=packing), scale, window)

    return fault_of(attend, heads, kv_heads, head_dim, windows, dtype, device)
