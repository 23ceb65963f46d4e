"""Near ties of the choice of experts are counted for the jobs whose tokens they are, once for each forward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from tiny import save_model, stage_input

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Part
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.stage import build_stage
from megatron_lora.training.near_ties import NearTies


def test_each_job_has_those_of_its_tokens(one_process, tmp_path, capsys):
    save_model(tmp_path, "qwen3_moe")
    architecture = read_architecture(tmp_path)
    layout, device = ParallelConfig(), torch.device("cpu")
    stage = build_stage(architecture, tmp_path, layout, dtype=torch.float32, device=device, recompute="full")
    experts = stage.blocks[1].experts
    assert experts is not None
    experts.router.zero_()  # all experts of a layer are alike
    jobs = {7: SimpleNamespace(name="one", adapter_row=1), 8: SimpleNamespace(name="two", adapter_row=0)}
    near_ties = NearTies()
    for _ in range(2):
        data = stage_input((5, 22, 1, 16), architecture.vocab_size, ((2, 9, 1), (9, 40, 0)))
        data = replace(data, parts=(Part(job=7, step=0, first=2, end=9, batch=0), Part(job=8, step=0, first=9, end=40, batch=0)))
        near_ties.note(data, cast(Any, jobs))
        stage(data).sum().backward()
    near_ties.say(1, cast(Any, None))
    assert "experts: 88 times (no job's 12, one 14, two 62), over all tokens and layers, a token's" in capsys.readouterr().out
