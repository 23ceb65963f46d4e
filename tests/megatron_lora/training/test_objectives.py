"""Preference objectives against their formulas in float64, and what backward starts from against autograd over all rows."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save

from megatron_lora.config.objective_keys import LOSS_TYPES, CpoConfig, DpoConfig, KtoConfig, OrpoConfig, SimpoConfig
from megatron_lora.data.microbatch import Pairs
from megatron_lora.data.sample_arrays import Sample, Samples
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import job_steps
from megatron_lora.training.objectives import PAIR_SUMS, labelled, preference
from megatron_lora.training.references import Known, ReferenceCache, References
from scheduling.data_parallel import DealtJob
from scheduling.job_lengths import read_lengths
from scheduling.types import VALIDATION

LENGTHS = (5, 3, 7, 7, 2, 9)  # of three pairs' sequences
WEIGHTS = torch.tensor([1.0, 2.5, 0.4])  # of the records
TARGETS = (3, 2, 6, 1, 1, 8)  # their last rows but one: a sequence's last row predicts nothing


def scene():
    generator, rows = torch.Generator().manual_seed(0), []
    for length, targets in zip(LENGTHS, TARGETS, strict=True):
        held = torch.rand(length, generator=generator) * 3
        held[: length - 1 - targets], held[-1] = 0.0, 0.0
        rows.append(held)
    pairs = Pairs(
        edges=torch.tensor(np.cumsum([0, *LENGTHS])), longest=max(LENGTHS), num_targets=torch.tensor(TARGETS).view(-1, 2).float(),
        places=torch.arange(3), pair_weight=1 / 8, token_weight=1 / 40, weights=WEIGHTS,
        is_desirable=torch.ones(3).bool(), num_desirable=3,
    )  # fmt: skip
    return torch.cat(rows), pairs, torch.randn(3, 2, generator=generator) - 8


def expected(kind, beta, smoothing, logps, reference):
    (c, r), (c0, r0) = logps.T, reference.T
    d, targets = (c - c0) - (r - r0), torch.tensor(TARGETS).view(-1, 2).T
    return (
        {
            "sigmoid": lambda: (1 + (-beta * d).exp()).log(),
            "hinge": lambda: (1 - beta * d).clamp(min=0),
            "ipo": lambda: ((c - c0) / targets[0] - (r - r0) / targets[1] - 0.5 / beta) ** 2,
            "robust": lambda: (-(1 - smoothing) * F.logsigmoid(beta * d) + smoothing * F.logsigmoid(-beta * d)) / (1 - 2 * smoothing),
        }[kind]()
        @ WEIGHTS.double()
        / 8
    )


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_losses_and_row_weights_are_those_of_the_formula(kind):
    rows, pairs, reference = scene()
    config = DpoConfig(type="dpo", beta=0.4, loss_type=(kind,), loss_weights=(0.5,), label_smoothing=0.1)
    outcome = preference(config, rows, pairs, reference, rows)
    leaf = rows.double().requires_grad_()
    logps = torch.stack([-part.sum() for part in leaf.split(LENGTHS)]).view(-1, 2)
    loss = -logps[:, 0] @ WEIGHTS.double() / 40 if kind == "sft" else expected(kind, 0.4, 0.1, logps, reference.double())
    (0.5 * loss).backward()
    assert float(outcome.sums[0]) == pytest.approx(float(0.5 * loss), rel=1e-6)
    torch.testing.assert_close(outcome.row_weights.double(), leaf.grad, rtol=1e-5, atol=1e-9)
    rewards = 0.4 * (logps.detach() - reference.double())
    told = dict(zip(PAIR_SUMS, outcome.sums[1:].tolist(), strict=False))
    assert told["rewards/chosen"] == pytest.approx(float(rewards[:, 0].sum() / 8), rel=1e-6)
    assert told["rewards/accuracies"] == float((rewards[:, 0] > rewards[:, 1]).sum() / 8)
    assert told["logps/rejected"] == pytest.approx(float(logps[:, 1].sum() / 8), rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        CpoConfig(type="cpo", beta=0.3, cpo_alpha=0.7, label_smoothing=0.1),
        CpoConfig(type="cpo", beta=0.3, cpo_alpha=0.0, loss_type="hinge"),
        CpoConfig(type="cpo", beta=0.3, loss_type="ipo"),
        SimpoConfig(type="simpo", beta=2.0, simpo_gamma=0.4, label_smoothing=0.05),
    ],
)
def test_without_a_reference_losses_rewards_and_row_weights_are_those_of_trl(config):
    """TRL's own function over log-probabilities, sums or means as its trainer takes them; its mean over a batch is our pair weight."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    rows, pairs, _ = scene()
    outcome = preference(config, rows, pairs, None, rows)
    leaf = rows.double().requires_grad_()
    sums = torch.stack([-part.sum() for part in leaf.split(LENGTHS)]).view(-1, 2)
    loss_type = getattr(config, "loss_type", "simpo")
    logps = sums / pairs.num_targets if loss_type in ("ipo", "simpo") else sums
    told = SimpleNamespace(alpha=0.0, beta=config.beta, loss_type=loss_type, label_smoothing=config.label_smoothing)
    told.simpo_gamma, told.accelerator = getattr(config, "simpo_gamma", 0.0), SimpleNamespace(device="cpu")
    losses, *rewards = trainer.cpo_loss(told, logps[:, 0], logps[:, 1])
    loss = losses @ WEIGHTS.double() / 8 - getattr(config, "cpo_alpha", 0.0) * sums[:, 0] @ WEIGHTS.double() / 40
    loss.backward()
    assert float(outcome.sums[0]) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(outcome.row_weights.double(), leaf.grad, rtol=1e-5, atol=1e-9)
    wanted = [*rewards, (rewards[0] > rewards[1]).double(), *logps.detach().T]
    torch.testing.assert_close(outcome.sums[1:6].double(), torch.stack(wanted).sum(dim=1) / 8, rtol=1e-5, atol=1e-9)


def test_odds_ratios_count_the_answers_alone_and_their_cross_entropy_the_prompt_too():
    """TRL's own function of the odds; the first term is over all rows of chosen sequences, of which prompts have weight 0."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    answers, pairs, _ = scene()
    rows = torch.where(answers > 0, answers, torch.rand(len(answers), generator=torch.Generator().manual_seed(1)))
    rows[pairs.edges[1:] - 1] = 0.0  # the last row predicts nothing
    outcome = preference(OrpoConfig(type="orpo", beta=0.7), rows, pairs, None, answers)
    leaf = rows.double().requires_grad_()
    logps = torch.stack([-part.sum() for part in (leaf * (answers > 0)).split(LENGTHS)]).view(-1, 2) / pairs.num_targets
    told = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    losses, *rewards, ratio, odds = trainer.odds_ratio_loss(told, logps[:, 0], logps[:, 1])
    nll = torch.stack([part.sum() for part in leaf.split(LENGTHS)[::2]]) @ WEIGHTS.double() / 40
    loss = nll - losses.double() @ WEIGHTS.double() / 8
    loss.backward()
    assert float(outcome.sums[0]) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(outcome.row_weights.double() * (rows > 0), leaf.grad * (rows > 0), rtol=1e-5, atol=1e-9)
    reported = torch.stack([*(reward.sum() / 8 for reward in rewards), nll, ratio * 3 / 8, odds * 3 / 8]).detach()
    torch.testing.assert_close(outcome.sums[[1, 2, 6, 7, 8]], reported.float(), rtol=1e-5, atol=1e-6)


def test_labelled_answers_weigh_by_their_label_and_record():
    """The formula of TRL's kto_trainer.py in float64, of three answers."""
    rows, pairs, _ = scene()
    label, reference, kl = torch.tensor([True, False, True, True, False, True]), torch.linspace(-9, -2, 6)[:, None], torch.tensor(0.4)
    answers = replace(
        pairs, num_targets=torch.tensor(TARGETS).view(-1, 1).float(), weights=torch.linspace(0.5, 2, 6), is_desirable=label,
        pair_weight=1 / 8, num_desirable=5,
    )  # fmt: skip
    config = KtoConfig(type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    outcome = labelled(config, rows, answers, reference, kl)
    leaf = rows.double().requires_grad_()
    ratio = torch.stack([-part.sum() for part in leaf.split(LENGTHS)]) - reference[:, 0].double()
    losses = torch.where(label, 1.3 * (1 - torch.sigmoid(0.3 * (ratio - kl))), 0.6 * (1 - torch.sigmoid(0.3 * (kl - ratio))))
    loss = (losses * answers.weights).sum() / 8
    loss.backward()
    assert float(outcome.sums[0]) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(outcome.row_weights.double(), leaf.grad, rtol=1e-5, atol=1e-9)
    told = [0.4 * 6 / 8, *(0.3 * float(ratio.detach()[held].sum()) / count for held, count in ((label, 5), (~label, 3)))]
    assert outcome.sums[1:4].tolist() == pytest.approx(told, rel=1e-5)
    assert float(labelled(config, rows, answers, reference, -kl).sums[1]) == 0


def test_references_are_wanted_once_of_each_pair_and_of_rounds_that_hold_one():
    samples = Samples.of(Sample(i, np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, border=3) for i in range(5))
    data = JobData.of(samples)
    steps = job_steps(5, 2, 2, None, False, 0)  # 0 1 | 2 3 | 4 | 0 1 | 2 3 | 4
    values = np.full((5, 2), np.nan, np.float32)
    values[[0, 3]] = -1.0
    dealt = DealtJob.of(read_lengths(0, [[6] * len(steps[step]) for step in range(6)]), 2)
    fresh = References(Known("key", None), data, steps, 0, False)
    assert {step: set(held.values()) for step, held in fresh.unknown.items()} == {0: {0, 1}, 1: {2, 3}, 2: {4}}
    known = References(Known("key", values), data, steps, 2, False)
    assert {step: set(held.values()) for step, held in known.unknown.items()} == {2: {4}, 3: {1}, 4: {2}}
    assert known.wanted(dealt) == {2: {0}, 3: {0}, 4: {0}}
    held = JobData(samples=samples, mixture=data.mixture, num_records=5, validation=data)
    assert References(Known("key", None), held, steps, 0, True).unknown[VALIDATION] == {k: 5 + k for k in range(5)}


def test_a_segment_of_a_reference_is_kept_where_its_pairs_lie():
    rows, pairs, _ = scene()
    data = JobData.of(Samples.of(Sample(i, np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, border=3) for i in range(3)))
    references = References(Known("key", None), data, job_steps(3, 3, 1, None, False, 0), 0, False)
    assert references.changed() is None
    references.keep(rows, pairs)
    kept = references.changed()
    assert kept is not None and not np.isnan(kept).any() and references.changed() is None
    assert kept[2, 1] == pytest.approx(-float(rows[-LENGTHS[-1] :].sum())) and math.isfinite(references.of(pairs).sum())


def test_a_job_that_knows_less_takes_nothing_from_the_references_that_are_kept(tmp_path):
    cache = ReferenceCache(mock.Mock(), tmp_path, tmp_path)
    for place, value in ((0, -1.0), (2, -2.0)):
        values = np.full((3, 2), np.nan, np.float32)
        values[place] = value
        cache.store(mock.Mock(key="key", changed=lambda values=values: values))
    np.testing.assert_array_equal(cache._kept("key", (3, 2))[:, 0], [-1.0, np.nan, -2.0])
    assert cache._kept("key", (4, 2)) is None and cache._kept("another", (3, 2)) is None
    cache._file("key").write_bytes(save({"values": values}))  # without its digest
    assert cache._kept("key", (3, 2)) is None
