"""Jobs that come, go and move on a GPU: no kernel is compiled after the warm-up, and a job's gradients do not depend on where it lies.

What runs on a rank takes the device, so that it keeps up with what it calls where there is no GPU. There, kinds of calls stand for kernels.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fused_ops.launch.shapes import rank_class
from fused_ops.lora import reference
from fused_ops.lora.route import make_route
from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec, room_of
from megatron_lora.model.stage import build_stage
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.training.determinism import determinism
from megatron_lora.training.warm_up import dummy, warm_up

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two layers of a small model."""
    root = tmp_path_factory.mktemp("model")
    config = {"model_type": "mistral", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "head_dim": 128}
    config |= {"vocab_size": 4096, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_key_value_heads": 2}
    (root / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "sliding_window": None}))
    return root


def adapter(r: int, dropout: float = 0.0, targets=TARGET_MODULES) -> AdapterSpec:
    return AdapterSpec(r=r, scale=1.0, dropout=dropout, target_modules=frozenset(targets))


def train(stage, data) -> None:
    (stage.losses(stage(data), data.labels) * data.weights).sum().backward()


@contextmanager
def noting(names: set, device: str):
    """Add the names of kernels that are compiled; on CPU, each operator that is called, with what it would be compiled for."""
    with ExitStack() as stack:
        if device == "cuda":
            from triton import knobs

            stack.enter_context(mock.patch.object(knobs.runtime, "jit_post_compile_hook", lambda **about: names.add(about["fn"].name)))
        else:
            for name in ("down", "grad_s_and_b"):  # the first operators of forward and of backward
                operator = getattr(reference, name)

                def noted(*given, name=name, operator=operator):
                    group = given[-2]
                    names.add((name, rank_class(group.max_padded_rank), group.num_modules, group.has_dropout))
                    return operator(*given)

                stack.enter_context(mock.patch.object(reference, name, noted))
        yield


def compiled_late(directory, device: str) -> set:
    """Return the kernels that training and evaluating residents of every kind compile after a warm-up with the first of them."""
    kind, rows = {"dtype": torch.bfloat16, "device": torch.device(device)}, 4096 if device == "cuda" else 64
    stage = build_stage(read_architecture(directory), None, ParallelConfig(), **kind, load_weights=False)
    specs = {
        "a": adapter(8),
        "b": adapter(24, 0.1),
        "c": adapter(64),
        "d": adapter(128, 0.05, ["down_proj", "q_proj"]),
        "e": adapter(40, 0.0),
    }
    room = room_of(list(specs.values()))
    arena, book = Arena(stage.linears, [], tensor_rank=0, tensor_ranks=1, **kind, room=room), Book(room)
    rows_of = {"a": arena.add(specs["a"], book.take("a", specs["a"]))}
    early, late = set(), set()
    with noting(early, device):
        warm_up(stage, arena, rows, adapters=list(specs.values()))
    for joins, leaves in (("", ""), ("b", ""), ("d", "b"), ("", "d"), ("e", "a"), ("c", ""), ("", "e"), ("bd", "c"), ("ace", "")):
        for name in leaves:
            book.give_back(name)
            arena.remove(rows_of.pop(name))
        for name in joins:
            rows_of[name] = arena.add(specs[name], book.take(name, specs[name]))
        for num_rows in (rows, rows * 3 // 4, rows // 3):
            data, there = dummy(num_rows, len(rows_of), torch.device(device)), sorted(rows_of.values())
            segments = [(first, end, there[which]) for first, end, which in data.route.segments]
            with noting(late, device):
                train(stage, replace(data, route=make_route(num_rows, segments, data.route.row_keys, device)))
                with torch.no_grad():
                    evaluated = replace(data, route=make_route(num_rows, segments, data.route.row_keys, device, dropout=False))
                    stage.evaluate(stage(evaluated), data.labels, data.targets)
    assert len(arena.specs) == 5
    return late - early if device == "cpu" else late


def gradients_here_and_there(directory, device: str) -> list[torch.Tensor]:
    """Return all gradients of a job before and after its neighbour left and it moved to the neighbour's rows."""
    kind, rows = {"dtype": torch.bfloat16, "device": torch.device(device)}, 2048 if device == "cuda" else 64
    found = []
    with determinism(True):
        stage = build_stage(read_architecture(directory), None, ParallelConfig(), **kind, load_weights=False)
        arena = Arena(stage.linears, [adapter(16, 0.1), adapter(16), adapter(16, 0.1)], tensor_rank=0, tensor_ranks=1, **kind)
        for row in range(3):
            arena.put(row, arena.draw(arena.specs[row], row), arena.master)
            for factor in arena.factors[row]:
                arena.view(factor, arena.master).add_(0.01)
            arena.publish(row)
        data = dummy(rows, 2, torch.device(device))
        middle = rows // 2 - 5
        data = replace(data, route=make_route(rows, [(0, middle, 1), (middle, rows, 2)], data.route.row_keys, device))
        data.tokens.copy_(torch.arange(rows) * 7 % 4096)
        for moves in (False, True):
            if moves:
                places = arena.places[0]
                arena.remove(0)
                arena.move(1, places)
            arena.grad.zero_()
            train(stage, data)
            found.append(torch.cat([arena.view(factor, arena.grad).flatten().cpu() for factor in arena.factors[1]]))
    return found


@on_each_device
def test_no_kernel_is_compiled_after_the_warm_up(device, directory, run_on):
    assert run_on(device, compiled_late, directory) == set()


@on_each_device
def test_a_job_that_moved_has_the_same_gradients(device, directory, run_on):
    before, after = run_on(device, gradients_here_and_there, directory)
    assert before.any() and torch.equal(before, after)
