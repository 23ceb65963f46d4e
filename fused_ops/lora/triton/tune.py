"""Measures how to cut matrix products on this GPU: what gemm_choices.json holds (gemm_config.py says what for).

    for key, fields, milliseconds in tune(): ...

In 16 bits a product without a LoRA term has a choice (hopper/gemm.py has none where there is one); over 8-bit operands every kind has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch

from fused_ops.launch.timing import measure
from fused_ops.lora import fused
from fused_ops.lora.adapters import AdapterTable, LoraGroup
from fused_ops.lora.fp8 import quantise_rows, quantise_weight
from fused_ops.lora.route import make_route
from fused_ops.lora.triton.gemm import gemm
from fused_ops.lora.triton.gemm_config import GemmConfig, choice_key

# Features in, columns of each module: linears of Llama 8B and 70B, Qwen 32B.
SHAPES = ((4096, (4096,)), (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)), (5120, (5120,)), (8192, (8192,)))
RANK, NUM_JOBS, NUM_ROWS = 16, 4, 8192
PLAIN = [{}, {"stages": 3}, {"stages": 3, "persistent": True, "flatten": True}]
PLAIN.append({**PLAIN[2], "group": 16})
TALL, FLAT = {"inner": 128}, {"inner": 128, "stages": 3, "persistent": True, "flatten": True}
SMALL = {"inner": 128, "columns": 128, "warps": 4, "stages": 3}  # two of them on a multiprocessor: one stores while the other multiplies
WITH_TERM = [TALL, {**TALL, "stages": 3}, {**TALL, "group": 16}, {**TALL, "parts": 4}, SMALL, {**SMALL, "group": 16}]
IN_8_BITS = {
    "none": [FLAT, {**FLAT, "group": 16}, TALL, SMALL],
    "narrow": WITH_TERM,
    "wide": WITH_TERM,
    "dropout": [TALL, {**TALL, "parts": 4}, SMALL, {**SMALL, "group": 16}],
}

Choice = tuple[str, dict, dict[str, float]]  # key, the fastest's fields beside the defaults, fields as JSON -> milliseconds


def tune(rounds: int = 8) -> Iterator[Choice]:
    """Yield the choice for every product of SHAPES, measured on the current GPU."""
    in_8_bits = torch.cuda.get_device_capability() >= (8, 9)
    for num_in, columns in SHAPES:
        x, dy = _random(NUM_ROWS, num_in), _random(NUM_ROWS, sum(columns))
        weight = _random(sum(columns), num_in) * num_in**-0.5
        for backward, value, num_out in ((False, x, sum(columns)), (True, dy, num_in)):

            def run(config: GemmConfig, value=value, backward=backward) -> object:
                return gemm(value, weight, None, None, None, None, backward, config=config)  # noqa: B023 (called at once)

            yield _fastest(choice_key(len(value), value.shape[1], num_out, backward, 0, False), PLAIN, run, rounds)
        if in_8_bits:
            yield from _tune_8_bits(x, dy, weight, columns, rounds)
        torch.cuda.empty_cache()


def _tune_8_bits(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, columns: tuple[int, ...], rounds: int) -> Iterator[Choice]:
    narrow = quantise_weight(weight)
    for dropout in (0.0, 0.1):
        group, route = _adapters(x.shape[1], columns, dropout)
        s = fused.down(x, group, route)
        for backward, value, matrix in ((False, x, narrow.by_output), (True, dy, narrow.by_input)):
            if dropout and not backward:
                continue  # the mask is in S already
            width = group.width if backward and not dropout else group.max_padded_rank
            terms = [(width, bool(dropout), (s, group, route))] + ([] if dropout else [(0, False, (None, None, None))])
            rows = quantise_rows(value)
            for term_width, drops, term in terms:
                key = choice_key(len(value), value.shape[1], len(matrix.values), backward, term_width, drops)

                def run(config: GemmConfig, rows=rows, matrix=matrix, term=term, backward=backward) -> object:
                    return gemm(rows, matrix, None, *term, backward, torch.bfloat16, config)

                yield _fastest(key + ", fp8", IN_8_BITS[key.rsplit(", ", 1)[1]], run, rounds)


def _fastest(key: str, candidates: list[dict], run, rounds: int) -> Choice:
    """Time a product cut in each way."""
    found = {json.dumps(fields): partial(run, GemmConfig(**fields)) for fields in candidates}
    times = {name: median for name, (median, *_) in measure(found, rounds, repeats=3).items()}
    best, usual = asdict(GemmConfig(**json.loads(min(times, key=lambda name: times[name])))), asdict(GemmConfig())
    return key, {name: value for name, value in best.items() if value != usual[name]}, times


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _adapters(num_in: int, columns: tuple[int, ...], dropout: float):
    """Return a group of NUM_JOBS adapters of one rank, random, and the route of as many rows of each."""
    a = _random(NUM_JOBS * len(columns) * RANK, num_in)
    b = tuple(_random(NUM_JOBS * RANK, width) for width in columns)
    group = LoraGroup(
        a_RK=a,
        b_RN=b,
        grad_a_RK=torch.zeros_like(a, dtype=torch.float32),
        grad_b_RN=tuple(torch.zeros_like(each, dtype=torch.float32) for each in b),
        columns=tuple(pairwise(accumulate(columns, initial=0))),
        a_rows=tuple(tuple((job * len(columns) + module) * RANK for module in range(len(columns))) for job in range(NUM_JOBS)),
        b_rows=tuple((job * RANK,) * len(columns) for job in range(NUM_JOBS)),
        adapters=AdapterTable(ranks=(RANK,) * NUM_JOBS, scales=(2.0,) * NUM_JOBS, dropouts=(dropout,) * NUM_JOBS),
    )
    share = NUM_ROWS // NUM_JOBS
    segments = [(job * share, (job + 1) * share, job) for job in range(NUM_JOBS)]
    return group, make_route(NUM_ROWS, segments, np.arange(NUM_ROWS, dtype=np.int32), "cuda")
