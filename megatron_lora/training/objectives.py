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

averaged over the pairs of the batch, the last over its chosen targets; a batch is the global one, or the validation set. Reported, over
pairs: rewards/chosen = beta (c - c0), rewards/rejected = beta (r - r0), their difference rewards/margins, rewards/accuracies the
share of pairs with rewards/chosen above rewards/rejected, logps/chosen = c and logps/rejected = r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lora.config.objective_keys import ObjectiveConfig
from megatron_lora.data.microbatch import Pairs
from megatron_lora.parallel.messages import NUM_SUMS

PAIR_SUMS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")  # behind the loss
assert len(PAIR_SUMS) < NUM_SUMS


class Outcome(NamedTuple):
    """What backward starts from, the weights of a segment's rows fp32 [n], and its parts of the sums, fp32 [NUM_SUMS]: the loss first."""

    row_weights: Tensor
    sums: Tensor


def cross_entropy(rows: Tensor, weights: Tensor) -> Outcome:
    """Return sft's outcome: rows [n] as they are weighed."""
    return Outcome(weights, F.pad((rows * weights).sum()[None], (0, NUM_SUMS - 1)))


def log_probabilities(rows: Tensor, pairs: Pairs) -> Tensor:
    """Return the log-probability of each sequence's targets, fp32 [n, 2]: rows of a sequence are added in the same order anywhere."""
    first, end = pairs.edges[:-1, None], pairs.edges[1:, None]
    at = first + torch.arange(pairs.longest, device=rows.device)
    held = rows[at.clamp_(max=len(rows) - 1)].masked_fill_(at >= end, 0.0)
    return -held.sum(dim=1).view(-1, 2)


def preference(config: ObjectiveConfig, rows: Tensor, pairs: Pairs, reference: Tensor) -> Outcome:
    """Return a preference's outcome; `reference` fp32 [n, 2] are the log-probabilities under the reference."""
    logps = log_probabilities(rows, pairs)
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = pair_loss(config, leaf, pairs, reference)
        (slope,) = torch.autograd.grad(loss, leaf)
    lengths = pairs.edges.diff()
    row_weights = torch.repeat_interleave(-slope.reshape(-1), lengths, output_size=len(rows))
    rewards = config.beta * (logps - reference)
    right = (rewards[:, :1] > rewards[:, 1:]).float()
    reported = torch.cat([rewards, right, logps], dim=1).sum(dim=0) * pairs.pair_weight
    return Outcome(row_weights, torch.cat([loss.detach()[None], reported]))


def pair_loss(config: ObjectiveConfig, logps: Tensor, pairs: Pairs, reference: Tensor) -> Tensor:
    """Return the pairs' part of the batch's loss, []."""
    ratios = logps - reference
    scaled = config.beta * (ratios[:, 0] - ratios[:, 1])
    total = logps.new_zeros(())
    for name, weight in config.weights:
        if name == "sft":
            total = total - weight * pairs.token_weight * logps[:, 0].sum()
            continue
        if name == "sigmoid":
            losses = -F.logsigmoid(scaled)
        elif name == "hinge":
            losses = F.relu(1 - scaled)
        elif name == "ipo":
            means = ratios / pairs.num_targets.clamp(min=1.0)
            losses = (means[:, 0] - means[:, 1] - 1 / (2 * config.beta)).square()
        else:
            assert name == "robust", name
            smoothing = config.label_smoothing
            losses = (smoothing * F.logsigmoid(-scaled) - (1 - smoothing) * F.logsigmoid(scaled)) / (1 - 2 * smoothing)
        total = total + weight * pairs.pair_weight * losses.sum()
    return total


def named(config: ObjectiveConfig | None, sums: list[float], prefix: str = "") -> Mapping[str, float]:
    """Return what a job's objective reports besides the loss, by name, from the `sums` of an ending."""
    if config is None:
        return {}
    found: dict[str, float] = dict(zip(PAIR_SUMS, sums[1:], strict=True))
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return {prefix + name: value for name, value in found.items()}
