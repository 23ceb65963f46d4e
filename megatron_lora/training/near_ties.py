"""How many choices of experts other arithmetic might make differently, of each job: counted on the device, read when a run ends.

Top-k is not continuous: where a token's last expert and the next one are a near tie (fused_ops.experts.route), another layout or other
neighbours may choose the other, and a job's updates are then not bound to those that it makes alone.
"""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch import Tensor

from fused_ops.experts.route import NEAR
from fused_ops.lora.route import Route
from megatron_lora.data.microbatch import StageInput
from megatron_lora.training.jobs import Jobs


class NearTies:
    """The near ties that this rank's layers have counted, by the name of the job; "" where a token is no job's."""

    def __init__(self):
        self.counted: dict[str, Tensor] = {}  # int64 [], on the device
        self._last: tuple[Route, list[str]] | None = None

    def note(self, data: StageInput, jobs: Jobs) -> None:
        """Count what follows for the jobs of a microbatch, whose forward comes next; that of the one before is complete."""
        self._add_last()
        if data.route is None:
            return
        names = {jobs[part.job].adapter_row: jobs[part.job].name for part in data.parts}
        self._last = data.route, [*(names[adapter] for _, _, adapter in data.route.segments), ""]

    def _add_last(self) -> None:
        if self._last is not None and self._last[0].has_near_ties:
            for name, count in zip(self._last[1], self._last[0].near_ties, strict=True):
                self.counted[name] = self.counted[name] + count if name in self.counted else count
        self._last = None

    def say(self, tensor_ranks: int, host_group: dist.ProcessGroup) -> None:
        """Print them on the first rank; collective. Each tensor rank has counted all of its stage."""
        self._add_last()
        own, of_rank = {name: int(count) for name, count in self.counted.items()}, [{}] * dist.get_world_size()
        dist.all_gather_object(of_rank, own, group=host_group)
        total = Counter()
        for counts in of_rank:
            total.update(counts)
        if dist.get_rank() == 0:
            found = [(name or "no job's", count // tensor_ranks) for name, count in sorted(total.items()) if count]
            whose = f" ({', '.join(f'{name} {count:,}' for name, count in found)})" if found else ""
            times = f"experts: {sum(count for _, count in found):,} times{whose}, over all tokens and layers, a token's last expert"
            print(f"{times} and the next one were within {NEAR:g} in probability: other arithmetic may choose the other", flush=True)
