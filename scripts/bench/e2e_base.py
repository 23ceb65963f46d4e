"""What all cases of a launch share: process groups, this rank's frozen stage, and the connections between stages.

Built once: for a 70B model the random weights are most of what a start costs.
"""

import dataclasses
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lora.config.schema import ParallelConfig, RunConfig
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.model.backends import check_backends
from megatron_lora.model.stage import Stage, build_stage
from megatron_lora.parallel.messages import Links, MessageLayout, connect
from megatron_lora.parallel.process_groups import initialize_parallel, pipelines, position_of, stage_groups
from megatron_lora.planning.devices import this_device
from megatron_lora.planning.resolve import describe, resolve
from megatron_lora.training.assemble import choose_backends
from megatron_lora.training.optimizer import StageGroups
from scheduling.types import Lengths


class Base:
    """One rank's place in a launch: `resolve` the cases, then `build` for each."""

    def __init__(
        self,
        architecture: Architecture,
        parallel: ParallelConfig,
        *,
        seed: int = 0,
        memory_gb: float | None = None,
        model_dir: Path | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Join the process groups of a layout, whose layers need not be resolved yet; `memory_gb` stands for the memory that is free."""
        self.cuda = torch.cuda.is_available()
        self.architecture, self.parallel, self.seed = architecture, parallel, seed
        self.device = initialize_parallel(parallel, "nccl" if self.cuda else "gloo", seed)
        self.dtype = dtype or (torch.bfloat16 if self.cuda else torch.float32)
        self.model_dir = model_dir
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.host, self.plans = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        self.position = position_of(parallel)
        self.groups = StageGroups(**stage_groups(parallel))
        self.model = this_device(int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))  # its figures for the cost and memory models
        if memory_gb is not None:
            self.model = dataclasses.replace(self.model, memory_bytes=memory_gb * 1e9)
        self.max_jobs = 0
        self.links: Links | None = None
        self._stage: Stage | None = None
        self._kind: tuple[str, str] | None = None

    @property
    def replica(self) -> int:
        """Which data-parallel replica this rank belongs to."""
        return self.rank // self.parallel.tensor % self.parallel.data

    @property
    def stages(self) -> list[int]:
        """Every rank's stage."""
        return [rank // (self.parallel.tensor * self.parallel.data) for rank in range(self.world_size)]

    def say(self, line: str) -> None:
        """Print a line of progress on the first rank."""
        if self.rank == 0:
            print(line, flush=True)

    def resolve(self, configs: Sequence[RunConfig], workloads: Sequence[Lengths], target_shares: Sequence[float]) -> list[RunConfig]:
        """Return the cases' configs with every choice made, by the first rank; the first case's split of layers is that of all."""
        resolved = []
        for config in configs:
            check_backends(config)
        if self.rank == 0:
            for config, lengths, share in zip(configs, workloads, target_shares, strict=True):
                if resolved:
                    config = dataclasses.replace(config, parallel=resolved[0].parallel)
                resolved.append(resolve(config, self.architecture, lengths, self.model, share))
                for line in describe(config, resolved[-1], share):
                    print(line, flush=True)
        resolved = self.share(resolved)
        self.parallel = resolved[0].parallel
        self.max_jobs = max(len(config.jobs) for config in resolved)
        return resolved

    @property
    def stage(self) -> Stage:
        """This rank's part of the model; `build` has made it."""
        assert self._stage is not None, "no stage is built"
        return self._stage

    def build(self, config: RunConfig) -> None:
        """Make the stage, of random weights where there is no model directory, unless the last case's serves."""
        kind = (config.base_weights, config.backend)
        if self._kind == kind:
            return
        backends = choose_backends(config, self.architecture, self.dtype, self.device)
        if self._kind is not None and self._kind[0] == kind[0] and "te" not in (self._kind[1], config.backend):
            self._kind = kind
            self.stage.set_attention(backends.attention)  # all else is the same
            return
        self.release()
        self._kind = kind
        start = time.perf_counter()
        self._stage = build_stage(
            self.architecture,
            self.model_dir,
            self.parallel,
            dtype=self.dtype,
            device=self.device,
            load_weights=self.model_dir is not None,
            seed=self.seed,
            base_weights=config.base_weights,
            backends=backends,
        )
        self.wait()
        held = f", {torch.cuda.memory_allocated() / 1e9:.1f} GB" if self.cuda else ""
        self.say(f"  built {len(self._stage.layers)} layers in {time.perf_counter() - start:.1f} s{held}")

    def release(self) -> None:
        """Let go of the stage, if there is one: the next case builds its own."""
        self._stage = self._kind = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def connected(self) -> tuple[Links, MessageLayout]:
        """Return this rank's ends for one run, connected on the first call, for the largest messages of all cases."""
        layout = MessageLayout(max_endings=self.max_jobs, hidden_size=self.architecture.hidden_size, dtype=self.dtype)
        if self.links is None:
            self.links = connect(pipelines(self.parallel), layout, self.device)
        else:
            self.links = self.links.reopened(layout)
        return self.links, layout

    def wait(self) -> None:
        """Wait for this rank's device, then for all ranks."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier(group=self.host)

    def share(self, value):
        """Return the first rank's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.host)
        return box[0]

    def gather(self, value) -> list:
        """Return every rank's value on every rank."""
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values
