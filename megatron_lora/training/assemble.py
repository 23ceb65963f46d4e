"""Assembles a rank's parts: its backends, its stage with the jobs that are resident on it, its executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.data.collate import collate, num_rows
from megatron_lora.data.microbatch import StageInput
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.model import cudnn_attention, transformer_engine
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec, Room
from megatron_lora.model.backends import Backends, backend_of, choose, fall_back, import_engine, this_machine
from megatron_lora.model.stage import Stage, build_stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import MessageLayout, connect
from megatron_lora.parallel.process_groups import pipelines, position_of, stage_groups
from megatron_lora.training.evaluate import EvaluationSums
from megatron_lora.training.executor import EvaluationDone, Executor, StepDone
from megatron_lora.training.jobs import Jobs
from megatron_lora.training.near_ties import NearTies
from megatron_lora.training.saving import read_start, start_job
from scheduling.follow import Window
from scheduling.types import Microbatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_backends(config: RunConfig, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Backends:
    """Return which libraries compute this rank's norms and attention (backends.py).

    cuDNN's or Transformer Engine's attention is tried on this device before it is used; the first rank prints the result.
    """
    machine = this_machine()
    backends = choose(backend_of(config), machine)
    if architecture.attention_cap is not None:
        if dist.get_rank() == 0:
            print("attention: ours in plain torch, a slow one, since this base model caps its scores", flush=True)
        return dataclasses.replace(backends, attention="torch")
    if backends.attention == "torch":
        return backends
    tensor = config.parallel.tensor
    heads, kv_heads = architecture.num_heads // tensor, architecture.num_kv_heads // tensor
    shape = (heads, kv_heads, architecture.head_dim, architecture.sliding_windows, dtype, device)
    if backends.attention == "te":
        import_engine(backend_of(config))
        fault = transformer_engine.attention_fault(*shape)
    else:
        fault = cudnn_attention.attention_fault(*shape, num_rows=int(config.microbatch_tokens))
    backends, line = fall_back(backends, machine, fault)
    if dist.get_rank() == 0:
        print(line, flush=True)
    return backends


def make_stage(config: ResolvedConfig, architecture: Architecture, model_dir: Path, device: torch.device) -> Stage:
    """Build this rank's stage."""
    dtype = DTYPES[config.precision]
    return build_stage(
        architecture,
        model_dir,
        config.parallel,
        dtype=dtype,
        device=device,
        load_weights=config.load_weights,
        seed=config.seed,
        recompute=config.recompute,
        base_weights=config.base_weights,
        activation_offloading=config.activation_offloading,
        backends=choose_backends(config, architecture, dtype, device),
    )


def make_arena(stage: Stage, parallel: ParallelConfig, adapters: Sequence[AdapterSpec], room: Room | None = None) -> Arena:
    """Give the stage's linears an arena of `room` (default: for these adapters alone), with the adapters in rows 0, 1, ..., all zero."""
    return Arena(
        stage.adapted,
        adapters,
        room=room,
        tensor_rank=stage.tensor_group.rank(),
        tensor_ranks=parallel.tensor,
        dtype=stage.dtype,
        device=stage.device,
    )


def make_resident(
    config: ResolvedConfig, architecture: Architecture, model_dir: Path, jobs: Jobs, device: torch.device
) -> tuple[Stage, Arena]:
    """Build this rank's stage, and an arena in which all jobs are resident, each where it starts or resumes."""
    stage = make_stage(config, architecture, model_dir, device)
    arena = make_arena(stage, config.parallel, [job.adapter_spec() for job in jobs.values()])
    groups = stage_groups(config.parallel)
    for row, job in enumerate(jobs.values()):
        start_job(job, arena, row, groups, read_start(job, arena))
    return stage, arena


def make_executor(
    stage: Stage,
    parallel: ParallelConfig,
    max_endings: int,
    *,
    jobs: Jobs,
    on_step: Callable[[StepDone], None],
    on_evaluation: Callable[[EvaluationDone], None],
    on_forward: Callable[[Microbatch], None],
    on_window: Callable[[Window], None],
    move: Callable[[int, int], None],
    with_references: Callable[[Microbatch], AbstractContextManager[None]],
    is_stopped: Callable[[], bool],
    timeline: Timeline,
    near_ties: NearTies,
) -> Executor:
    """Connect this rank's stage to those beside it, and make its executor.

    Collective. At most `max_endings` steps and evaluations end in a slot.
    """
    multiple, device = parallel.row_multiple, stage.device

    def load(microbatch: Microbatch) -> StageInput:
        data = collate(microbatch, jobs, multiple=multiple, device=device)
        near_ties.note(data, jobs)
        return data

    layout = MessageLayout(max_endings=max_endings, hidden_size=stage.architecture.hidden_size, dtype=stage.dtype)
    return Executor(
        stage,
        position_of(parallel),
        connect(pipelines(parallel), layout, device),
        layout,
        load=load,
        num_rows=lambda microbatch: num_rows(microbatch, multiple) // multiple,
        jobs=jobs,
        evaluations=EvaluationSums(stage_groups(parallel).data, device),
        on_step=on_step,
        on_evaluation=on_evaluation,
        on_forward=on_forward,
        on_window=on_window,
        move=move,
        with_references=with_references,
        is_stopped=is_stopped,
        timeline=timeline,
        device=device,
    )
