"""The arena's AdamW against torch.optim.AdamW, job by job."""

import pytest
import torch
from kernel_tools import setting_row

from fused_ops.elementwise.adamw import CHUNK, adamw_, make_chunks

JOBS = [  # (first, length), lr, weight decay, betas, clip scale
    ((0, 40), 1e-3, 0.0, (0.9, 0.999), 1.0),
    ((40, CHUNK + 7), 3e-2, 0.1, (0.8, 0.95), 0.25),
    ((CHUNK + 60, 100), 1e-2, 0.01, (0.9, 0.999), 0.5),
]
SIZE = CHUNK + 200


def arena(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "master": torch.randn(SIZE, generator=gen),
        "grad": torch.zeros(SIZE),
        "exp_avg": torch.zeros(SIZE),
        "exp_avg_sq": torch.zeros(SIZE),
        "compute": torch.zeros(SIZE, dtype=torch.bfloat16),
    }


def step(state, grads, count, finite=(True, True, True)):
    state["grad"].copy_(grads)
    rows = [
        setting_row(lr=lr, beta1=b[0], beta2=b[1], epsilon=1e-8, weight_decay=wd, clip_scale=clip, step=count, finite=ok)
        for (_, lr, wd, b, clip), ok in zip(JOBS, finite, strict=True)
    ]
    chunks = make_chunks((first, length, job) for job, ((first, length), *_) in enumerate(JOBS))
    adamw_(*state.values(), chunks, torch.tensor(rows))


def test_every_job_takes_torchs_steps_and_gaps_are_untouched():
    state, gen = arena(), torch.Generator().manual_seed(1)
    start = state["master"].clone()
    params = [torch.nn.Parameter(start[a : a + n].clone()) for (a, n), *_ in JOBS]
    optimizers = [torch.optim.AdamW([p], lr=lr, betas=b, weight_decay=wd) for p, (_, lr, wd, b, _) in zip(params, JOBS, strict=True)]
    for count in range(1, 6):
        grads = torch.randn(SIZE, generator=gen)
        step(state, grads, count)
        for p, optimizer, ((a, n), *_, clip) in zip(params, optimizers, JOBS, strict=True):
            p.grad = grads[a : a + n] * clip
            optimizer.step()
            torch.testing.assert_close(state["master"][a : a + n], p.detach(), rtol=1e-6, atol=3e-7)
            assert torch.equal(state["compute"][a : a + n], state["master"][a : a + n].bfloat16())
            assert not state["grad"][a : a + n].any()
    untouched = torch.ones(SIZE, dtype=torch.bool)
    for (a, n), *_ in JOBS:
        untouched[a : a + n] = False
    assert torch.equal(state["master"][untouched], start[untouched]) and state["grad"][untouched].any()


def test_a_job_that_is_not_finite_is_skipped_bit_for_bit():
    state, alone = arena(), arena()
    before = {name: value.clone() for name, value in state.items()}
    grads = torch.randn(SIZE)
    step(alone, grads, 1)
    grads[45] = float("nan")
    step(state, grads, 1, finite=(True, False, True))
    bad = slice(40, 40 + CHUNK + 7)
    for name in ("master", "exp_avg", "exp_avg_sq", "compute"):
        assert torch.equal(state[name][bad], before[name][bad])
        assert torch.equal(state[name][:40], alone[name][:40]) and torch.equal(state[name][CHUNK + 60 :], alone[name][CHUNK + 60 :])
    assert not state["grad"][bad].any()


def test_what_does_not_fit_is_named():
    state = arena()
    chunks, settings = make_chunks([(0, 4, 0)]), torch.zeros(1, 10)
    with pytest.raises(ValueError, match="grad is torch.bfloat16"):
        adamw_(**{**state, "grad": state["compute"]}, chunks=chunks, settings=settings)
    with pytest.raises(ValueError, match="chunks must be"):
        adamw_(**state, chunks=chunks.int(), settings=settings)
    with pytest.raises(ValueError, match="settings must be"):
        adamw_(**state, chunks=chunks, settings=settings[:, :7])
    with pytest.raises(ValueError, match="step 0"):
        setting_row(lr=1, beta1=0.9, beta2=0.9, epsilon=1e-8, weight_decay=0, clip_scale=1, step=0)
