"""The sums of evaluations on the last stage: what a job's objective reports, and right predictions, over its validation set.

    eval_loss = loss sum / targets, or of a preference the loss itself            eval_accuracy = num_right / targets

Slots of an evaluation add to its sums as they run forward. When it has ended, they are summed over replicas, each of which has
evaluated its own samples; like a gradient norm's, that sum is read a slot later, so that the stage waits for nothing (executor.py).
All in fp32, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lora.data.microbatch import Part
from megatron_lora.parallel.messages import NUM_SUMS
from scheduling.types import Microbatch


class EvaluationSums:
    """The evaluations that are under way on this rank, by job and number of steps taken."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        """`group`: the ranks of this stage that hold the other replicas' parts; None for one replica."""
        self.group = group
        self.device = device
        self.sums: dict[tuple[int, int], Tensor] = {}  # (job, steps taken) -> [1 + NUM_SUMS]: right predictions, then the sums
        self.works: dict[tuple[int, int], dist.Work] = {}

    def add(self, job: int, step: int, sums: Tensor, num_right: Tensor) -> None:
        """Add the sums of a segment's rows, fp32 [NUM_SUMS], and how many are right, int64 []."""
        self._of(job, step).add_(torch.cat((num_right.float()[None], sums)))

    def sums_over_replicas(self, microbatch: Microbatch, losses: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return the summed losses of each segment of a slot, which some replicas may have no samples of: fp64 [segments]."""
        own = {part.job: losses[part.first : part.end].double().sum() for part in parts}
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.stack([own.get(segment.job, none) for segment in microbatch.segments])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums

    def start_reduction(self, job: int, step: int) -> None:
        """Start to sum a complete evaluation over replicas; the same order on all of them."""
        if self.group is not None:
            work = dist.all_reduce(self._of(job, step), group=self.group, async_op=True)
            assert work is not None
            self.works[job, step] = work

    def finish_reduction(self, job: int, step: int) -> Tensor:
        """Wait for an evaluation's sums; return [1 + NUM_SUMS], right predictions first, and forget them."""
        if (job, step) in self.works:
            self.works.pop((job, step)).wait()
        found = self._of(job, step)
        del self.sums[job, step]
        return found

    def _of(self, job: int, step: int) -> Tensor:
        if (job, step) not in self.sums:
            self.sums[job, step] = torch.zeros(1 + NUM_SUMS, dtype=torch.float32, device=self.device)
        return self.sums[job, step]
