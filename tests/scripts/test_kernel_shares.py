"""Shares of kernels: names, what launched them, overlap and gaps; on a trace written by hand, since profiles need a GPU."""

import re
from pathlib import Path

import pytest

from scripts.bench.kernel_shares import BY_KERNEL, by_name, kind_of, shares

ROOT = Path(__file__).resolve().parents[2]


def event(cat, name, ts, dur, correlation=None, tid=1):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid, "args": arguments}


def trace():
    """Two threads launch; kernels run from 100 to 200: norm, GEMM of the loss, deferred dA, a copy, an NCCL kernel beside a GEMM, a gap."""
    return [
        {"ph": "M", "name": "process_name", "pid": 0},
        event("cpu_op", "_RmsNorm", 0, 20),
        event("cuda_driver", "cuLaunchKernelEx", 5, 2, 1),
        event("cpu_op", "_ChunkedCrossEntropy", 30, 20),
        event("cpu_op", "aten::mm", 31, 10),
        event("cuda_runtime", "cudaLaunchKernel", 35, 1, 2),
        event("cpu_op", "autograd::engine::evaluate_function: _RmsNormBackward", 10, 50, tid=2),
        event("cuda_driver", "cuLaunchKernelEx", 15, 2, 3, tid=2),
        event("cuda_runtime", "cudaMemcpyAsync", 55, 1, 4),
        event("cpu_op", "_MultiLoraLinear", 60, 10),
        event("cuda_runtime", "cudaLaunchKernel", 61, 1, 5),
        event("cuda_runtime", "cudaLaunchKernel", 80, 1, 6),
        event("user_annotation", "optimizer", 90, 9),
        event("cuda_runtime", "cudaStreamSynchronize", 99, 1),
        event("cuda_runtime", "cudaLaunchKernel", 95, 1, 7),
        event("kernel", "_forward_kernel", 100, 10, 1, tid=7),
        event("kernel", "nvjet_tst_128x256", 110, 20, 2, tid=7),
        event("kernel", "_rows_kernel", 130, 10, 3, tid=7),
        event("gpu_memcpy", "Memcpy HtoD", 140, 5, 4, tid=7),
        event("kernel", "_gemm_kernel", 150, 30, 5, tid=7),
        event("kernel", "ncclDevKernel_SendRecv", 160, 30, 6, tid=8),
        event("kernel", "void at::native::elementwise_kernel", 195, 5, 7, tid=7),
    ]


def test_kinds_and_idle_time():
    found = shares(trace())
    assert (found.pop("kernels"), found.pop("host waits")) == (7, 1)
    assert found.pop("idle") == pytest.approx(0.10) and found.pop("seconds") == pytest.approx(100e-6)
    assert found == pytest.approx(
        {"norms": 0.1, "loss": 0.2, "LoRA": 0.1, "copies": 0.05, "GEMM": 0.3, "communication": 0.3, "optimizer": 0.05}
    )


def test_the_longest_kernels_by_name():
    assert by_name(trace(), most=2) == pytest.approx({"_gemm_kernel": 30e-6, "ncclDevKernel_SendRecv": 30e-6})


def test_every_kernel_of_ours_is_known():
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "fused_ops").rglob("*.py")]
    names = {name for source in sources for name in re.findall(r"\bjit\b[^\n]*\)?\n(?:@[^\n]*\n)*def (\w+_kernel)\(", source)}
    assert {"_gemm_kernel", "_down_kernel", "_forward_kernel"} <= names
    told_by_operator = {"_forward_kernel", "_backward_kernel"}
    known = [part for _, parts in BY_KERNEL for part in parts]
    assert [name for name in names - told_by_operator if not any(part in name for part in known)] == []


def test_what_is_not_ours_goes_by_its_operator_or_name():
    def kind(name, *operators):
        return kind_of({"name": name, "cat": "kernel"}, operators)

    assert kind("fmha_cutlassF_bf16") == "attention" and kind("sm90_xmma_gemm_bf16") == "GEMM"
    assert kind("vectorized_elementwise_kernel", "aten::mul", "_PlainLora") == "LoRA"
    assert kind("vectorized_elementwise_kernel", "aten::add") == "other"
    assert kind("_backward_kernel", "_SwiGLUBackward", "_RerunBackward") == "SwiGLU"
