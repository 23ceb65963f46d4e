"""A stage on a GPU: what the CPU computes, the same bits under every recomputation policy, less memory, and no wait for the device.

The functions that run on the rank take the device. Where there is no GPU they still run, on the CPU, so that they keep up with what they
call; what only a GPU can show (its bits, its memory, its waits) is then not looked at.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_factor, save_model

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.collate import collate
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.steps import job_steps
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.stage import build_stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import Links, MessageLayout
from megatron_lora.parallel.process_groups import Position
from megatron_lora.training.evaluate import EvaluationSums
from megatron_lora.training.executor import Executor
from megatron_lora.training.objectives import cross_entropy
from megatron_lora.training.optimizer import JobOptimizer, OptimizerSettings
from scheduling.cost import OFFLOADED
from scheduling.follow import Window
from scheduling.pipeline import endings, with_drain
from scheduling.planner import plan_stream
from scheduling.types import Microbatch, Segment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])

DROPOUTS = (0.1, 0.0)
SETTINGS = OptimizerSettings(
    learning_rate=1e-3, lr_scheduler="cosine", warmup_ratio=0.1, num_steps=4, weight_decay=0.01,
    adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0,
)  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_model(path, request.param)
    return path


def job_rows(job: int) -> JobSamples:
    """Return 8 samples of one job, two in each of its 4 steps."""
    generator = np.random.default_rng(job)
    samples = []
    for row in range(8):
        tokens = generator.integers(0, 61, generator.integers(3, 40)).astype(np.int32)
        samples.append(Sample(row, tokens, np.arange(len(tokens)) > 1))
    return JobSamples(seed=job, samples=Samples.of(samples), steps=job_steps(8, 2, 1, None, False, 0))


def sft(rows, part, weights):
    """The outcome of cross-entropy."""
    return cross_entropy(rows, weights)


class Scene:
    """A stage with two jobs' adapters, B not zero, and all that the executor needs."""

    def __init__(self, directory, recompute, dtype, device):
        self.device, self.dtype = torch.device(device), dtype
        offload = recompute == OFFLOADED
        self.stage = build_stage(
            read_architecture(directory), directory, ParallelConfig(), dtype=dtype, device=self.device,
            recompute="full" if offload else recompute, activation_offloading=offload,
        )  # fmt: skip
        self.stage.reserve_host_memory(80)
        specs = [
            AdapterSpec(r=r, scale=2.0, dropout=p, target_modules=frozenset(TARGET_MODULES)) for r, p in zip((8, 20), DROPOUTS, strict=True)
        ]
        self.arena = Arena(self.stage.linears, specs, tensor_rank=0, tensor_ranks=1, dtype=dtype, device=self.device)
        for row, factors in enumerate(self.arena.factors):
            for factor in factors:
                self.arena.view(factor, self.arena.master).copy_(random_factor(factor.path, factor.kind, row, factor.r, factor.width))
            self.arena.publish(row)
        self.rows = [job_rows(0), job_rows(1)]
        lengths = [rows.lengths() for rows in self.rows]
        self.stream = with_drain(plan_stream(lengths, 1, 80, 0), 1, 0)
        self.first_steps = Microbatch(tuple(Segment(job, 0, (0, 1), sum(steps[0])) for job, steps in enumerate(lengths)))

    def load(self, microbatch):
        jobs = {number: SimpleNamespace(step_samples=rows, adapter_row=number) for number, rows in enumerate(self.rows)}
        return collate(microbatch, jobs, multiple=1, device=self.device)

    def executor(self) -> Executor:
        self.steps = []
        return Executor(
            self.stage, Position(stage=0, num_stages=1, delay=0), Links(None, None, None, None),
            MessageLayout(max_endings=2, hidden_size=self.stage.architecture.hidden_size, dtype=self.dtype),
            load=self.load, num_rows=lambda microbatch: microbatch.num_tokens,
            jobs={row: SimpleNamespace(optimizer=JobOptimizer(self.arena, row, SETTINGS), outcome=sft, references=None)
                  for row in range(2)},
            evaluations=EvaluationSums(None, self.device), on_evaluation=lambda done: None,
            on_step=self.steps.append, on_forward=lambda microbatch: None, on_window=lambda window: None,
            move=lambda job, step: None, with_references=lambda microbatch: nullcontext(),
            timeline=Timeline(self.device), device=self.device,
        )  # fmt: skip


def one_backward(directory, recompute, dtype, device) -> dict:
    """Return losses and adapter gradients of both jobs' first steps in one microbatch, and the bytes that its forward kept (CPU: 0)."""
    scene = Scene(directory, recompute, dtype, device)
    data = scene.load(scene.first_steps)
    assert len(data.route.segments) == 2
    with torch.no_grad():
        scene.stage(data)  # what is made on first use (the route's tables, workspaces) is not what a forward keeps
    gc.collect()  # an earlier test's stage, or its memory would come back in the middle
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    hidden = scene.stage(data)
    kept = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    losses = scene.stage.losses(hidden, data.labels, data.targets)
    (losses * data.weights).sum().backward()
    gradients = {
        f"{f.path} {f.kind} {row}": scene.arena.view(f, scene.arena.grad).cpu() for row in range(2) for f in scene.arena.factors[row]
    }
    return {"losses": losses.detach().cpu(), "gradients": gradients, "kept": kept}


def train(directory, recompute, dtype, device) -> list[float]:
    """Train the complete stream; in its second half, a wait for the device is an error. Returns the steps' losses."""
    scene = Scene(directory, recompute, dtype, device)
    ended = endings(scene.stream)
    cut = len(scene.stream) // 2
    quiet = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    jobs_before = []

    def windows():
        yield Window(scene.stream[:cut], ended[:cut])  # makes what is made on first use
        jobs_before.extend(done.job for done in scene.steps)
        quiet("error")
        yield Window(scene.stream[cut:], ended[cut:])
        quiet("default")

    try:
        scene.executor().run(windows())
    finally:
        quiet("default")
    jobs = [done.job for done in scene.steps]
    assert len(jobs) == 8 and set(jobs_before) == set(jobs[len(jobs_before) :]) == {0, 1}
    return [float(done.sums[0]) for done in scene.steps]


@needs_gpu
def test_float32_is_what_the_cpu_computes(directory, run_on):
    ours, expected = (run_on(device, one_backward, directory, "none", torch.float32) for device in ("cuda", "cpu"))
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    for name, gradient in expected["gradients"].items():
        assert gradient.any() and (ours["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_give_the_same_bits_and_keep_less(dtype, device, directory, run_on):
    policies = ("none", "cheap", "full", OFFLOADED)
    none, cheap, full, offloaded = (run_on(device, one_backward, directory, policy, dtype) for policy in policies)
    for other in (cheap, full, offloaded):
        assert torch.equal(other["losses"], none["losses"])
        for name, gradient in none["gradients"].items():
            assert gradient.any() and torch.equal(other["gradients"][name], gradient), name
    kept = [kind["kept"] for kind in (none, cheap, full, offloaded)]
    assert device == "cpu" or kept[0] > kept[1] > kept[2] > kept[3], kept


@on_each_device
@pytest.mark.parametrize("recompute", ["none", "cheap", "full", OFFLOADED])
def test_nothing_waits_for_the_device(recompute, device, directory, run_on):
    losses = run_on(device, train, directory, recompute, torch.bfloat16)
    assert all(np.isfinite(losses))
