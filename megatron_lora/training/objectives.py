"""What a segment is trained for: from its rows' cross-entropies to what backward starts from, and the sums that are reported.

    objective(rows, part, weights) -> (row_weights, sums)        rows [n] = -log p(label), without a graph; 0 in rows that are no target

Backward starts from sum(rows * row_weights). The head's gradient of each row was computed with its cross-entropy (model/loss.py) and is
scaled by the row's weight there, so no objective needs a second pass over the head. `sft` weighs every target row 1 / targets of
the global batch. A preference weighs a row by the derivative of its pair's loss by its sequence's log-probability. With

    c, r      log-probability of the chosen and rejected targets: minus the sum of their rows
    c0, r0    the same under the reference, which has no gradient
    d         (c - c0) - (r - r0)                |c|, |r|   their numbers of targets

a pair's loss, as TRL 1.16.0 (trainer/dpo_trainer.py) has it, is the weighted sum of

    sigmoid   -log s(beta d)                                            s: the logistic function
    hinge     max(0, 1 - beta d)
    ipo       ((c - c0) / |c| - (r - r0) / |r| - 1 / (2 beta))^2
    robust    (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)    e: label_smoothing
    sft       -c                                                        over the chosen targets of the batch

Without a reference, by TRL's cpo_trainer.py, with q = beta (c - r) in cpo, beta (c / |c| - r / |r|) - gamma in simpo, e: label_smoothing

    cpo       -(1 - e) log s(q) - e log s(-q), or as hinge and ipo above with c0 = r0 = 0; and cpo_alpha times sft's
    simpo     the same of its q, and nothing else

and by its orpo_trainer.py, with the means c / |c| and r / |r| in place of c and r,

    orpo      -log(P) - beta log s(o)       o = (c - r) - (log(1 - exp c) - log(1 - exp r)), the odds ratio's logarithm
              P: of every token of the chosen sequences but the first, prompts included, over their number

Of single answers with a label, by its kto_trainer.py, with d = c - c0,

    kto       desirable_weight (1 - s(beta (d - k))) where the label is true, undesirable_weight (1 - s(beta (k - d))) where it is false
    k         max(0, mean of d over the batch, each prompt with the completion of the answer before it, the first with the last
              one's), without a gradient

each times its record's weight, averaged over the pairs of the batch, sft's over its chosen targets; a batch is the global one, or the
validation set. Reported, over pairs: rewards/chosen = beta (c - c0), rewards/rejected = beta (r - r0), their difference rewards/margins,
rewards/accuracies the share of pairs with rewards/chosen above rewards/rejected, logps/chosen = c and logps/rejected = r; of orpo nll_loss,
its first term, log_odds_ratio = log s(o), and log_odds_chosen = o; of kto k as kl, and the others over the answers with their label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.config.objective_keys import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, PairObjective, Preference, SimpoConfig
from megatron_lora.data.microbatch import Pairs
from megatron_lora.parallel.messages import NUM_SUMS

PAIR_SUMS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")  # behind the loss
ODDS_SUMS = ("nll_loss", "log_odds_ratio", "log_odds_chosen")  # behind these, of orpo
LABELLED_SUMS = ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")  # behind the loss, of kto
assert len(PAIR_SUMS) + len(ODDS_SUMS) < NUM_SUMS


class Outcome(NamedTuple):
    """What backward starts from, the weights of a segment's rows fp32 [n], and its parts of the sums, fp32 [NUM_SUMS]: the loss first."""

    row_weights: Tensor
    sums: Tensor


def cross_entropy(rows: Tensor, weights: Tensor) -> Outcome:
    """Return sft's outcome: rows [n] as they are weighed."""
    return Outcome(weights, F.pad((rows * weights).sum()[None], (0, NUM_SUMS - 1)))


def log_probabilities(rows: Tensor, pairs: Pairs) -> Tensor:
    """Return the log-probability of each sequence's targets, fp32 [n, 2], or [n, 1] of labelled answers.

    Rows of a sequence are added in the same order anywhere.
    """
    first, end = pairs.edges[:-1, None], pairs.edges[1:, None]
    at = first + torch.arange(pairs.longest, device=rows.device)
    held = rows[at.clamp_(max=len(rows) - 1)].masked_fill_(at >= end, 0.0)
    return -held.sum(dim=1).view(pairs.num_targets.shape)


def preference(config: PairObjective, rows: Tensor, pairs: Pairs, reference: Tensor | None, weights: Tensor) -> Outcome:
    """Return a preference's outcome; `reference` fp32 [n, 2] are the log-probabilities under the reference, if the objective has one.

    Rows of the answers have `weights` above 0; those of prompts are counted by orpo's cross-entropy alone.
    """
    is_answer = weights > 0
    logps = log_probabilities(rows * is_answer, pairs)
    more: list[Tensor] = []
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        if isinstance(config, DpoConfig):
            loss = _dpo(config, leaf, pairs, reference)
        elif isinstance(config, OrpoConfig):
            loss, more = _odds(config, leaf, pairs)
        else:
            loss = _without_reference(config, leaf, pairs)
        (slope,) = torch.autograd.grad(loss, leaf)
    lengths = pairs.edges.diff()
    row_weights = torch.repeat_interleave(-slope.reshape(-1), lengths, output_size=len(rows))
    if isinstance(config, OrpoConfig):
        nll = _chosen(log_probabilities(rows, pairs), pairs)
        loss, more = loss + nll, [nll, *more]
        of_chosen = F.pad(pairs.weights[:, None] * pairs.token_weight, (0, 1)).reshape(-1)
        row_weights = row_weights * is_answer + torch.repeat_interleave(of_chosen, lengths, output_size=len(rows))
    seen = _means(logps, pairs) if _takes_means(config) else logps
    rewards = config.beta * (seen if reference is None else seen - reference)
    right = (rewards[:, :1] > rewards[:, 1:]).float()
    reported = torch.cat([rewards, right, seen], dim=1).sum(dim=0) * pairs.pair_weight
    found = torch.stack([loss, *reported, *more]).detach()
    return Outcome(row_weights, F.pad(found, (0, NUM_SUMS - len(found))))


def labelled(config: KtoConfig, rows: Tensor, answers: Pairs, reference: Tensor, divergence: Tensor) -> Outcome:
    """Return the outcome of answers with a label; `divergence` []: the batch's mismatched mean of d."""
    logps, kl = log_probabilities(rows, answers), divergence.to(rows.dtype).clamp(min=0)
    sign = answers.is_desirable.float() * 2 - 1
    ratios = (logps - reference)[:, 0]
    weights = torch.where(answers.is_desirable, config.desirable_weight, config.undesirable_weight) * answers.weights * answers.pair_weight
    right = torch.sigmoid(config.beta * sign * (ratios - kl))
    slope = -weights * config.beta * sign * right * (1 - right)
    row_weights = torch.repeat_interleave(-slope, answers.edges.diff(), output_size=len(rows))
    found = [(weights * (1 - right)).sum(), kl * len(ratios) * answers.pair_weight]
    for values in (config.beta * ratios, logps[:, 0]):
        for held, count in ((answers.is_desirable, answers.num_desirable), (~answers.is_desirable, answers.num_undesirable)):
            found.append((values * held).sum() / count if count else torch.full_like(kl, math.nan))
    return Outcome(row_weights, F.pad(torch.stack(found), (0, NUM_SUMS - len(found))))


def _dpo(config: DpoConfig, logps: Tensor, pairs: Pairs, reference: Tensor | None) -> Tensor:
    """Return the pairs' part of the batch's loss, []."""
    assert reference is not None
    ratios = logps - reference
    scaled = config.beta * (ratios[:, 0] - ratios[:, 1])
    total = logps.new_zeros(())
    for name, weight in config.weights:
        if name == "sft":
            total = total + weight * _chosen(logps, pairs)
            continue
        if name == "sigmoid":
            losses = -F.logsigmoid(scaled)
        elif name == "hinge":
            losses = F.relu(1 - scaled)
        elif name == "ipo":
            losses = _ipo(_means(ratios, pairs), config.beta)
        else:
            assert name == "robust", name
            smoothing = config.label_smoothing
            losses = (smoothing * F.logsigmoid(-scaled) - (1 - smoothing) * F.logsigmoid(scaled)) / (1 - 2 * smoothing)
        total = total + weight * _over_pairs(losses, pairs)
    return total


def _without_reference(config: CpoConfig | SimpoConfig, logps: Tensor, pairs: Pairs) -> Tensor:
    """Return the pairs' part of the batch's loss, [], of the objectives that have no reference."""
    seen = _means(logps, pairs) if _takes_means(config) else logps
    scaled = config.beta * (seen[:, 0] - seen[:, 1])
    if isinstance(config, SimpoConfig):
        scaled = scaled - config.simpo_gamma
    if isinstance(config, CpoConfig) and config.loss_type == "ipo":
        losses = _ipo(seen, config.beta)
    elif isinstance(config, CpoConfig) and config.loss_type == "hinge":
        losses = F.relu(1 - scaled)
    else:
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)
    total = _over_pairs(losses, pairs)
    return total + config.cpo_alpha * _chosen(logps, pairs) if isinstance(config, CpoConfig) else total


def _odds(config: OrpoConfig, logps: Tensor, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
    """Return the odds ratio's part of the batch's loss, [], and what is reported of it."""
    means = _means(logps, pairs)
    no = torch.where(means < -math.log(2), torch.log1p(-means.exp()), torch.log(-torch.expm1(means)))  # log(1 - exp) of each
    odds = (means[:, 0] - means[:, 1]) - (no[:, 0] - no[:, 1])
    ratios = F.logsigmoid(odds)
    return -config.beta * _over_pairs(ratios, pairs), [pairs.pair_weight * ratios.sum(), pairs.pair_weight * odds.sum()]


def _takes_means(config: PairObjective) -> bool:
    """Whether rewards and reported log-probabilities are means over targets, as TRL reports them."""
    return isinstance(config, SimpoConfig | OrpoConfig) or (isinstance(config, CpoConfig) and config.loss_type == "ipo")


def _means(values: Tensor, pairs: Pairs) -> Tensor:
    return values / pairs.num_targets.clamp(min=1.0)


def _chosen(logps: Tensor, pairs: Pairs) -> Tensor:
    """Return the chosen answers' cross-entropy, over the chosen targets of the batch."""
    return -pairs.token_weight * (pairs.weights * logps[:, 0]).sum()


def _over_pairs(losses: Tensor, pairs: Pairs) -> Tensor:
    """Return the pairs' part of the mean of losses [n] over the batch, each times its record's weight."""
    return pairs.pair_weight * (pairs.weights * losses).sum()


def _ipo(means: Tensor, beta: float) -> Tensor:
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square()


def named(config: Preference | None, sums: list[float], prefix: str = "") -> Mapping[str, float]:
    """Return what a job's objective reports besides the loss, by name, from the `sums` of an ending."""
    if config is None:
        return {}
    names = LABELLED_SUMS if isinstance(config, KtoConfig) else PAIR_SUMS + ODDS_SUMS * isinstance(config, OrpoConfig)
    found: dict[str, float] = dict(zip(names, sums[1:], strict=False))
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return {prefix + name: value for name, value in found.items()}
