"""Where a GPU's time goes: the share of every kind of kernel in a profiled run, and of time without any.

A kernel is known by its own name where that says enough (ours, flash attention, NCCL), else by what launched it: torch.profiler's trace
links it to a launch, and the launch lies within operators, the innermost of which that is known here names the kind. So a GEMM inside
the loss counts as loss, and a gradient of A that waited for its norm's backward as LoRA.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

BY_KERNEL = (  # kind -> parts of kernels' names
    ("GEMM", ("_gemm_kernel", "_hopper_kernel")),
    ("experts' GEMM", ("_grouped_kernel",)),
    ("experts", ("expert_",)),
    ("FP8 quantisation", ("_quantise_kernel",)),
    ("unpacking", ("_unpack_kernel",)),
    ("LoRA", ("_down_kernel", "_rows_kernel", "_grad_sb_kernel", "_finish_kernel")),
    ("loss", ("_softmax_sums_kernel", "_softmax_residual_kernel", "_scatter_scaled_kernel")),
    ("optimizer", ("_adamw_kernel",)),
    ("RoPE", ("_rope_kernel",)),
    ("attention", ("flash", "fmha", "_sdpa", "mha_", "dot_do_o", "convert_dq", "qkv_tma")),
    ("communication", ("nccl",)),
)
BY_OPERATOR = (  # kind -> parts of the names of what launched a kernel
    ("loss", ("_ChunkedCrossEntropy", "nll_loss", "cross_entropy", "log_softmax")),
    ("optimizer", ("optimizer",)),
    ("norms", ("_RmsNorm",)),
    ("RoPE", ("_RotateQkv",)),
    ("SwiGLU", ("_SwiGLU",)),
    ("experts", ("_ExpertMlp",)),
    ("attention", ("attention", "varlen", "attn")),
)
LINEARS = ("_MultiLoraLinear", "_PlainLora")
GEMMS = ("gemm", "nvjet", "cutlass", "xmma", "matmul", "splitk")
SPAN = ("cpu_op", "user_annotation")
LAUNCH = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Profiled:
    """Profiles what runs inside its `with` block; then there are `shares` of its time on this rank's device, and `kernels` by name."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.shares: dict[str, float] = {}
        self.kernels: dict[str, float] = {}

    def __enter__(self) -> "Profiled":
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        torch.cuda.synchronize()
        self.profiler.__exit__(*exception)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
            self.shares, self.kernels = shares(trace), by_name(trace)


def shares(trace: Sequence[dict]) -> dict[str, float]:
    """Return kind -> share of the time from the first kernel to the last, "idle" among them; kernels that overlap count each.

    Also the seconds of that time, the number of kernels, and how often the host waited for the device.
    """
    events = [event for event in trace if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ON_DEVICE]
    around = operators_around(events)
    start, end = min(event["ts"] for event in kernels), max(event["ts"] + event["dur"] for event in kernels)
    sums: dict[str, float] = defaultdict(float)
    busy, until = 0.0, start
    for event in sorted(kernels, key=lambda event: event["ts"]):
        sums[kind_of(event, around.get(event["args"].get("correlation"), ()))] += event["dur"]
        busy += max(0.0, event["ts"] + event["dur"] - max(until, event["ts"]))
        until = max(until, event["ts"] + event["dur"])
    total = end - start
    found = {kind: time / total for kind, time in sorted(sums.items(), key=lambda item: -item[1])}
    waits = sum("Synchronize" in event["name"] for event in events if event.get("cat") in LAUNCH)
    return found | {"idle": 1 - busy / total, "seconds": total / 1e6, "kernels": len(kernels), "host waits": waits}


def by_name(trace: Sequence[dict], most: int = 20) -> dict[str, float]:
    """Return the names of the kernels that take most time -> seconds of each."""
    sums: dict[str, float] = defaultdict(float)
    for event in trace:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            sums[event["name"][:80]] += event["dur"] / 1e6
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:most])


def operators_around(events: Sequence[dict]) -> dict[int, tuple[str, ...]]:
    """Return, for every launch by its correlation, the names of the operators that it lies in, the innermost first."""
    around = {}
    by_thread: dict[object, list[dict]] = defaultdict(list)
    for event in events:
        if event.get("cat") in SPAN or event.get("cat") in LAUNCH:
            by_thread[event.get("pid"), event.get("tid")].append(event)
    for listed in by_thread.values():
        stack: list[dict] = []
        for event in sorted(listed, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] < event["ts"]:
                stack.pop()
            if event["cat"] in SPAN:
                stack.append(event)
            elif "correlation" in event.get("args", {}):
                around[event["args"]["correlation"]] = tuple(outer["name"] for outer in reversed(stack))
    return around


def kind_of(kernel: dict, operators: Sequence[str]) -> str:
    """Name the kind of one kernel, copy or fill."""
    name = kernel["name"]
    is_gemm = any(part in name.lower() for part in GEMMS)
    for kind, parts in BY_KERNEL:
        if any(part in name.lower() for part in parts):
            return kind
    for operator in operators:
        for kind, parts in BY_OPERATOR:
            if any(part in operator for part in parts):
                return kind
        if any(part in operator for part in LINEARS):
            return "GEMM" if is_gemm else "LoRA"
    return "GEMM" if is_gemm else "copies" if kernel["cat"] != "kernel" else "other"
