"""Configs of whole runs whose samples have the lengths of a named workload (lengths.json), as `megatron-lora train` runs them.

Job i has the lengths of the workload's job i modulo its number of jobs, and every further round of jobs starts one step later; steps go
around when more are asked for than the workload has. The last `completion` of each sample's tokens are its targets.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lora.errors import UserError
from scheduling.types import Lengths

SUITE = Path(__file__).resolve().parent / "lengths.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpecs:
    """What all jobs of a case have in common, and the rank and dropout of each (the last of either for all further jobs)."""

    count: int
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    completion: float = 0.25
    learning_rate: float = 1e-4

    def configs(self, lengths: Lengths, max_steps: int, folder: Path) -> list[dict]:
        """Write each job's lengths [job][step][sample] into a folder; return the jobs as a config has them."""
        jobs = []
        for job, steps in enumerate(lengths):
            if len({len(batch) for batch in steps}) > 1:
                raise UserError("--workload: a job's global batches are of several sizes, and a config has one")
            file = folder / f"job-{job}.jsonl"
            write_lengths(file, [tokens for batch in steps for tokens in batch], self.completion)
            r = self.ranks[min(job, len(self.ranks) - 1)]
            lora = {"r": r, "lora_alpha": 2.0 * r, "lora_dropout": self.dropouts[min(job, len(self.dropouts) - 1)]}
            schedule = {"learning_rate": self.learning_rate, "lr_scheduler": "constant", "warmup_ratio": 0.0, "max_steps": max_steps}
            data = {"datasets": [{"path": str(file), "type": "lengths"}], "shuffle": False, "global_batch_size": len(steps[0])}
            longest = max(tokens for batch in steps for tokens in batch)
            jobs.append({"name": f"job-{job}", "seed": job, "sequence_len": max(2, longest), **data, **lora, **schedule})
        return jobs


def write_lengths(file: Path, lengths: Sequence[int], completion: float) -> None:
    """Write rows of type lengths, of each sample the last `completion` as targets."""
    rows = ({"tokens": max(2, n), "targets": min(max(2, n) - 1, max(1, math.ceil(n * completion)))} for n in lengths)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_workload(path: Path, name: str) -> Lengths:
    """Return the lengths [job][step][sample] of a named workload; UserError where there is none.

    A name like 16x4096 is one job with 16 samples of 4,096 tokens in each step.
    """
    if even := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return [[[int(even[2])] * int(even[1])]]
    try:
        workloads = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--lengths: {path} cannot be read ({error}); name a JSON file of workloads") from None
    if name not in workloads:
        raise UserError(f"--workload: {path.name} has no {name!r}; choose among {', '.join(workloads)}, or say 16x4096")
    return workloads[name]["data"]


def take(workload: Lengths, num_jobs: int) -> Lengths:
    """Return lengths for any number of jobs of a workload, each of which begins with another step once the workload's are used up."""
    chosen = []
    for job in range(num_jobs):
        steps, first = workload[job % len(workload)], job // len(workload)
        chosen.append([steps[(first + step) % len(steps)] for step in range(len(steps))])
    return chosen


def head(lengths: Lengths, tokens: int) -> Lengths:
    """Return of each job's first step as many samples, one at least, as give about `tokens` tokens in all."""
    per_job, chosen = max(1, math.ceil(tokens / len(lengths))), []
    for steps in lengths:
        count = 1
        while count < len(steps[0]) and sum(steps[0][: count + 1]) <= per_job:
            count += 1
        chosen.append([steps[0][:count]])
    return chosen
