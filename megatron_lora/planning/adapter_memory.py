"""How large the arena is: `adapter_memory` in rank rows of each module, and what `auto` takes.

    room = rooms(adapters_of(config.jobs), row_bytes, num_bytes)         # module -> rank rows; predict.room_of applies it to a config

Room is made for as many as possible of the largest adapters. What is left over is spread evenly: over
all modules once there is room for every job, which serves jobs that are added later, else over those
that jobs target. Bytes are those of the rank that has the most layers.

`auto` is resolved with the rest of a config (resolve.py). Activations are chosen beside the largest
jobs: those that fill the pipeline's gap twice over, 2 (P + d), or as many as a quarter of the memory
holds. Adapters then take what activations leave, as far as jobs need it.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.planning.adapter_rows import Adapted, modules_of
from scheduling.layer_memory import EXPERT_MODULES, FUSED_MODULES, MAGNITUDES, MODULES, RANK_ALIGN, Adapter

GB = 1e9
ALL_MODULES = tuple(dict.fromkeys((*MODULES, *FUSED_MODULES, MAGNITUDES)))
MODEST_SHARE = 0.25  # of a device's memory: activations leave as much to adapters, if jobs need it


def adapters_of(jobs: Collection[Adapted]) -> tuple[Adapter, ...]:
    """Return the adapters of jobs, as the memory model sees them, the largest rank first."""
    return tuple(
        sorted(
            (Adapter(job.lora_rank, tuple(m for m in ALL_MODULES if m in modules_of(job)), job.expert_rank) for job in jobs),
            key=lambda each: (-each.rank, -each.expert_rank),
        )
    )


def rows_of(adapters: Sequence[Adapter], num: int | None = None) -> dict[str, int]:
    """Return module -> rank rows that the `num` largest (None: all) of the adapters of each module take, which are given largest first."""
    rows = {module: [adapter.rows_of(module) for adapter in adapters if module in adapter.modules] for module in ALL_MODULES}
    return {module: sum(sorted(of_module, reverse=True)[:num]) for module, of_module in rows.items() if of_module}


def bytes_of(room: Mapping[str, int], row_bytes: Mapping[str, float]) -> float:
    """Return the bytes of an arena."""
    return sum(row_bytes.get(module, 0.0) * rows for module, rows in room.items())  # 0: none of a run's jobs adapts experts


def rooms(adapters: Sequence[Adapter], row_bytes: Mapping[str, float], num_bytes: float) -> dict[str, int]:
    """Return the rank rows of each module in an arena of `num_bytes`, for these adapters, which are given largest first."""
    return dict(_rooms(tuple(adapters), tuple(row_bytes.items()), num_bytes))


@lru_cache(maxsize=64)  # a pure function that is asked the same for each budget that is tried
def _rooms(adapters: tuple[Adapter, ...], of_modules: tuple[tuple[str, float], ...], num_bytes: float) -> tuple[tuple[str, int], ...]:
    row_bytes, num = dict(of_modules), most(adapters, dict(of_modules), num_bytes)
    room = rows_of(adapters, num)
    over = list(row_bytes) if num == len(adapters) else [module for module in row_bytes if module in room]
    of_one = {module: 1 if module == MAGNITUDES else RANK_ALIGN for module in over}  # rows of one more adapter
    spare = (num_bytes - bytes_of(room, row_bytes)) / sum(row_bytes[module] * rows for module, rows in of_one.items())
    rows = {module: room.get(module, 0) + of_one[module] * int(spare) for module in over}
    return tuple((module, count) for module, count in rows.items() if count)


def most(adapters: Sequence[Adapter], row_bytes: Mapping[str, float], num_bytes: float) -> int:
    """Return how many of the largest adapters fit into `num_bytes` at once."""
    numbers = range(1, len(adapters) + 1)
    return bisect_left(numbers, True, key=lambda num: bytes_of(rows_of(adapters, num), row_bytes) > num_bytes)


def in_gb(num_bytes: float) -> float:
    """Return bytes as a value of `adapter_memory`: the next kilobyte above them, so that what it was chosen for still fits."""
    return (math.floor(num_bytes / 1e3) + 1) / 1e6


def check_fits(name: str, adapter: Adapted, room: Mapping[str, int], row_bytes: Mapping[str, float], adapter_memory: float) -> None:
    """Raise UserError for a job whose adapter does not fit into an empty arena."""
    own = rows_of(adapters_of([adapter]))
    short = [module for module, rows in own.items() if rows > room.get(module, 0)]
    if short:
        needed = in_gb(bytes_of(own, row_bytes))
        taker = "adapter: dora" if short[0] == MAGNITUDES else f"r: {adapter.lora_rank}"
        there = f"{room.get(short[0], 0)} rank rows for {short[0]}, and {taker} takes {own[short[0]]}"
        remedy = f"use at least {needed:.4g}" if needed > adapter_memory else "use more, or start a run that has the job from the beginning"
        raise UserError(
            f"job {name}: adapter_memory: {adapter_memory:.4g} GB have {there}; its adapter needs {needed:.4g} GB: {remedy}, or a smaller r"
        )


def as_if_kept_alive(config: RunConfig, modules: Collection[str]) -> RunConfig:
    """Return the config with the jobs that a run which is kept alive makes room for: twice as many, each as large as the largest.

    At least as many as twice fill the gap. They target all of the model's `modules`, and its experts where a job does.
    """
    expert_r, largest = max(job.expert_rank for job in config.jobs), max(config.jobs, key=lambda job: job.lora_rank)
    targets = (*modules, *(EXPERT_MODULES if expert_r else ()))
    kind = "dora" if any(job.adapter == "dora" for job in config.jobs) else "lora"
    alike = {"r": largest.lora_rank, "init_lora_weights": True, "linears": None, "adapter": kind}
    largest = dataclasses.replace(largest, **alike, target_modules=targets, experts=expert_r > 0, expert_r=expert_r or None)
    gap = config.parallel.pipeline + config.parallel.norm_delay
    return dataclasses.replace(config, jobs=(largest,) * (2 * max(len(config.jobs), 2 * gap)))
