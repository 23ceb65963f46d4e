"""One job's AdamW: schedule, clipping, update of fp32 master weights (fused_ops.elementwise.adamw has the formulas).

    clip = min(1, max_norm / (norm + 1e-6))       norm over all of the adapter's parameters, on all stages and tensor ranks

A step whose norm is not finite is skipped: weights, moments and Adam's step count stay as they are,
and the learning-rate schedule continues. After three skipped steps in a row the job has failed, and
all its later steps are skipped too. The device decides all of this, so the host never waits for a norm.
With LoRA+ B has a learning rate of its own. Rows that an adapter holds frozen count nowhere; their gradients are zeroed.
DoRA's magnitudes are weights like the others, decay included, as transformers groups them;
their norms are measured anew after each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_ops.elementwise.adamw import adamw_, make_chunks
from fused_ops.lora.route import upload
from megatron_lora.model.adapter_arena import Arena, Factor
from megatron_lora.parallel.messages import NUM_SUMS
from megatron_lora.parallel.process_groups import StageGroups
from megatron_lora.training.schedules import learning_rate, num_warmup_steps

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """A job's optimizer keys, as in the config."""

    learning_rate: float
    lr_scheduler: str
    warmup_ratio: float
    num_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float | None
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_steps: int | None = None
    loraplus_lr_ratio: float | None = None

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0, by the schedule (schedules.py); with LoRA+ that of A."""
        warmup = num_warmup_steps(self.warmup_ratio, self.warmup_steps, self.num_steps)
        how = {"num_steps": self.num_steps, "num_warmup_steps": warmup}
        return learning_rate(self.lr_scheduler, self.learning_rate, step=step, arguments=self.lr_scheduler_kwargs or {}, **how)


class _Times(NamedTuple):
    """What a part of an adapter has in place of the job's own: its learning rate is `lr` times that, its values `ratio` times B."""

    lr: float = 1.0
    ratio: float = 1.0


class _Gradients(NamedTuple):
    """Gradients of the trained rows of some factors, and what each is multiplied by in the norm; None: nothing."""

    views: list[Tensor]
    times: Tensor | None = None


class JobOptimizer:
    """AdamW over one job's factors (its A and B matrices, or their shards) on this rank."""

    def __init__(self, arena: Arena, adapter_row: int, settings: OptimizerSettings, groups: StageGroups | None = None):
        """Make the optimizer of the adapter in `adapter_row` of the arena."""
        self.arena = arena
        self.settings = settings
        self.groups = groups or StageGroups()
        self.adapter_row = adapter_row
        device = arena.grad.device
        self.num_updates = torch.zeros((), dtype=torch.float64, device=device)  # Adam's t: steps that were applied
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.reported = torch.zeros(NUM_SUMS, device=device)
        self.sums: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        self.locate()

    def locate(self) -> None:
        """Take where the adapter lies from the arena; to be called after it has moved."""
        assert not self.sums, "the adapter moved while its gradients were summed"
        arena, device = self.arena, self.arena.grad.device
        self.factors: list[Factor] = arena.factors[self.adapter_row]
        self.setting_rows: list[_Times | None] = [_Times()]
        ranges = [part for factor in self.factors for part in self._parts(factor)]
        chunks = make_chunks(ranges) if device.type == "cuda" else torch.tensor(ranges, dtype=torch.int64).view(-1, 3)
        self.chunks = upload(chunks, device)
        self.replicated, self.sharded = (self._gradients([f for f in self.factors if f.sharded == which]) for which in (False, True))

    def _parts(self, factor: Factor) -> list[tuple[int, int, int]]:
        """Return (first element, number of elements, row of settings) of a factor's rows: those that are trained, and those behind.

        As in PEFT, magnitudes learn with LoRA+ as B does.
        """
        times = _Times(lr=self.settings.loraplus_lr_ratio or 1.0, ratio=factor.ratio) if factor.kind != "A" else _Times()
        parts = [(0, factor.trained, times)] + [(factor.trained, factor.r - factor.trained, None)] * (factor.trained < factor.r)
        self.setting_rows += [each for _, _, each in parts if each not in self.setting_rows]
        places = [(first * factor.width, rows * factor.width, self.setting_rows.index(each)) for first, rows, each in parts]
        return [(start + first, length, row) for start in factor.starts for first, length, row in places]

    def _gradients(self, factors: Sequence[Factor]) -> _Gradients:
        views = [self.arena.view(f, self.arena.grad)[..., : f.trained, :] for f in factors]
        if all(f.ratio == 1.0 for f in factors):
            return _Gradients(views)
        return _Gradients(views, upload(torch.tensor([f.ratio for f in factors]), self.arena.grad.device))

    def start_reduction(self, sums: Tensor) -> None:
        """Start the all-reduces of the step's gradients and of its `sums`, fp32 [NUM_SUMS], both complete on this rank.

        Gradients of replicated factors are summed over tensor ranks and replicas; those of sharded factors,
        and the sums, over replicas.
        """
        self.reported = sums
        for tensors, group in ((self.replicated.views, self.groups.both), ([*self.sharded.views, self.reported], self.groups.data)):
            if group is not None and tensors:
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
                work = dist.all_reduce(flat, group=group, async_op=True)
                assert work is not None
                self.sums.append((tensors, flat, work))

    def finish_reduction(self) -> tuple[Tensor, Tensor]:
        """Wait for the all-reduces; return the stage's squared gradient norm, fp32 [], and the sums.

        Each parameter counts once in the norm, whether it is sharded or replicated.
        """
        for tensors, flat, work in self.sums:
            work.wait()
            parts = flat.split([tensor.numel() for tensor in tensors])
            views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(tensors, views)  # pyright: ignore[reportPrivateImportUsage]  torch has no public name for it
        self.sums = []
        device = self.arena.grad.device
        total = _square_sum(self.sharded, device) + _square_sum(self.replicated, device) / self.arena.tensor_ranks
        if self.groups.tensor is not None:
            dist.all_reduce(total, group=self.groups.tensor)
        return total, self.reported

    def step(self, step: int, square_norm: Tensor) -> None:
        """Take or skip one step (from 0) by the verdict `square_norm`, fp32 [], then zero the gradients."""
        finite = torch.isfinite(square_norm)
        alive = self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW
        self.skipped_in_a_row.copy_(torch.where(finite & alive, 0, self.skipped_in_a_row + 1))
        apply = finite & alive
        self.num_updates += apply
        rate, never = self.settings.learning_rate_at(step), torch.zeros_like(apply)
        rows = [self._setting_row(rate, each or _Times(), square_norm, apply if each else never) for each in self.setting_rows]
        a = self.arena
        adamw_(a.master, a.grad, a.exp_avg, a.exp_avg_sq, a.compute, self.chunks, torch.stack(rows))
        a.set_norms(self.adapter_row, self.groups.tensor)

    def _setting_row(self, rate: float, times: _Times, square_norm: Tensor, apply: Tensor) -> Tensor:
        """Return the row of ten numbers that `adamw_` reads, fp32 [10], made on the device in float64.

        Where the arena holds k B in place of B, the gradient of B is k times that of what is there, and its step is taken k times.
        """
        s, lr = self.settings, rate * times.lr
        clip = torch.ones_like(self.num_updates)
        if s.max_grad_norm is not None:
            clip = torch.clamp(s.max_grad_norm / (square_norm.double().sqrt() + 1e-6), max=1.0)
        correction1 = 1.0 - s.adam_beta1**self.num_updates
        correction2 = 1.0 - s.adam_beta2**self.num_updates
        fixed = (s.adam_beta1, s.adam_beta2, s.adam_epsilon, 1.0 - lr * s.weight_decay, 1.0 - s.adam_beta1, 1.0 - s.adam_beta2)
        beta1, beta2, epsilon, keep, rest1, rest2 = upload(torch.tensor(fixed, dtype=torch.float64), clip.device)
        row = (
            times.ratio * lr / correction1,
            beta1,
            beta2,
            epsilon,
            keep,
            times.ratio * clip,
            correction2.sqrt(),
            apply.double(),
            rest1,
            rest2,
        )
        return torch.stack(row).float()

    def restore(self, num_updates: int, skipped_in_a_row: int) -> None:
        """Resume with these counts; weights and moments are restored in the arena."""
        self.num_updates.fill_(num_updates)
        self.skipped_in_a_row.fill_(skipped_in_a_row)

    @property
    def failed(self) -> Tensor:
        """Whether the job has failed, bool [] on the device."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def has_failed(self) -> bool:
        """Return whether the job has failed; waits for the device."""
        return bool(self.failed)

    def moved(self) -> tuple[list[str], Tensor]:
        """Return the paths of all modules, and on the device whether B of each had a gradient in any step so far, bool [modules]."""
        return [f.path for f in self.factors if f.kind == "B"], self.arena.b_moved(self.adapter_row, self.arena.exp_avg)


def _square_sum(gradients: _Gradients, device: torch.device) -> Tensor:
    if not gradients.views:
        return torch.zeros((), dtype=torch.float32, device=device)
    norms = torch.stack(torch._foreach_norm(gradients.views))  # pyright: ignore[reportPrivateImportUsage]  torch has no public name for it
    return (norms if gradients.times is None else norms * gradients.times).square().sum()
