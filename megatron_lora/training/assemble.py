"""Puts a rank's parts together: its backends, the arena of its adapters, its executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.data.collate import collate, num_rows
from megatron_lora.data.steps import JobRows
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.model.adapter_arena import AdapterSpec, Arena
from megatron_lora.model.backends import Backends, choose, fall_back_from_te, import_engine, this_machine
from megatron_lora.model.stage import Stage
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import Links, MessageLayout
from megatron_lora.parallel.process_groups import position_of
from megatron_lora.training.executor import Executor, StageOptimizer, StepDone
from scheduling.types import Microbatch


def choose_backends(config: RunConfig, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Backends:
    """Return what computes this rank's norms and attention; Transformer Engine's attention is tried first, and the first rank says how."""
    machine = this_machine()
    backends = choose(config.backend, machine)
    if "te" not in (backends.norms, backends.attention):
        return backends
    from megatron_lora.model.transformer_engine import attention_fault

    import_engine(config.backend)
    tensor = config.parallel.tensor
    heads, kv_heads = architecture.num_heads // tensor, architecture.num_kv_heads // tensor
    fault = attention_fault(heads, kv_heads, architecture.head_dim, architecture.sliding_windows, dtype, device)
    backends, line = fall_back_from_te(backends, machine, fault)
    if dist.get_rank() == 0:
        print(line, flush=True)
    return backends


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Return the number format that a config's ranks compute in on this machine."""
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": auto}[config.precision]


def make_arena(stage: Stage, parallel: ParallelConfig, adapters: Sequence[AdapterSpec]) -> Arena:
    """Give the stage's linears their adapters, one slot per job, all zero."""
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
    rows: Sequence[JobRows],
    optimizers: Sequence[StageOptimizer],
    on_step: Callable[[StepDone], None],
    on_forward: Callable[[Microbatch], None],
    timeline: Timeline,
) -> Executor:
    """Give this rank its part: its stage at its place, connected to its neighbours."""
    multiple = parallel.tensor if parallel.sequence else 1
    return Executor(
        stage,
        position_of(parallel),
        links,
        layout,
        load=lambda microbatch: collate(microbatch, rows, multiple=multiple, device=stage.device),
        num_rows=lambda microbatch: num_rows(microbatch, multiple) // multiple,
        optimizers=optimizers,
        on_step=on_step,
        on_forward=on_forward,
        timeline=timeline,
        device=stage.device,
    )
