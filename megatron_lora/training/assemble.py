"""Assembles a rank's parts: its backends, the arena of its adapters, its executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.data.collate import collate, num_rows
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.model import cudnn_attention, transformer_engine
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.backends import Backends, backend_of, choose, fall_back, import_engine, this_machine
from megatron_lora.model.stage import Stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import Links, MessageLayout
from megatron_lora.parallel.process_groups import position_of
from megatron_lora.training.executor import Executor, StepDone
from megatron_lora.training.jobs import Jobs
from scheduling.types import Microbatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_backends(config: RunConfig, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Backends:
    """Return which libraries compute this rank's norms and attention (backends.py).

    cuDNN's or Transformer Engine's attention is tried on this device before it is used; the first rank prints the result.
    """
    machine = this_machine()
    backends = choose(backend_of(config), machine)
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


def make_arena(stage: Stage, parallel: ParallelConfig, adapters: Sequence[AdapterSpec]) -> Arena:
    """Give the stage's linears an arena with room for these adapters, all zero, in rows 0, 1, ..."""
    return Arena(
        stage.linears,
        adapters,
        tensor_rank=stage.tensor_group.rank(),
        tensor_ranks=parallel.tensor,
        dtype=stage.dtype,
        device=stage.device,
    )


def make_executor(
    stage: Stage,
    parallel: ParallelConfig,
    links: Links,
    layout: MessageLayout,
    *,
    jobs: Jobs,
    on_step: Callable[[StepDone], None],
    on_forward: Callable[[Microbatch], None],
    timeline: Timeline,
) -> Executor:
    """Make the executor of this rank's stage."""
    multiple = parallel.row_multiple
    return Executor(
        stage,
        position_of(parallel),
        links,
        layout,
        load=lambda microbatch: collate(microbatch, jobs, multiple=multiple, device=stage.device),
        num_rows=lambda microbatch: num_rows(microbatch, multiple) // multiple,
        jobs=jobs,
        on_step=on_step,
        on_forward=on_forward,
        timeline=timeline,
        device=stage.device,
    )
