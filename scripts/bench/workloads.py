"""Configs of whole runs whose samples have the lengths of a named workload (lengths.json), as `megatron-lora train` runs them.

Job i has the lengths of the workload's job i modulo its number of jobs, and every further round of jobs starts one step later; steps go
around when more are asked for than the workload has. The last `completion` of each sample's tokens are its targets.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from megatron_lora.errors import UserError
from scheduling.types import Lengths

SUITE = Path(__file__).resolve().parent / "lengths.json"


def job_configs(
    lengths: Lengths,
    max_steps: int,
    folder: Path,
    ranks: Sequence[int],
    dropouts: Sequence[float] = (0.0,),
    completion: float = 0.25,
    expert_r: int = 0,
    num_dpo: int = 0,
) -> list[dict]:
    """Write each job's lengths [job][step][sample] into a folder; return the jobs as a config has them.

    `ranks` and `dropouts` are those of each job, the last of either for all further jobs; `expert_r` is of all, 0: experts are
    frozen. The first `num_dpo` jobs train by DPO: each of their samples is a pair of as many tokens.
    """
    jobs = []
    for job, steps in enumerate(lengths):
        if len({len(batch) for batch in steps}) > 1:
            raise UserError("--workload: a job's global batches are of several sizes, and a config has one")
        file = folder / f"job-{job}.jsonl"
        write_lengths(file, [tokens for batch in steps for tokens in batch], completion, pairs=job < num_dpo)
        r = ranks[min(job, len(ranks) - 1)]
        of_experts = {"experts": True, "expert_r": expert_r} if expert_r else {}
        lora = of_experts | {"r": r, "lora_alpha": 2.0 * r, "lora_dropout": dropouts[min(job, len(dropouts) - 1)]}
        schedule = {"learning_rate": 1e-4, "lr_scheduler": "constant", "warmup_ratio": 0.0, "max_steps": max_steps}
        data = {"datasets": [{"path": str(file), "type": "lengths"}], "shuffle": False, "global_batch_size": len(steps[0])}
        longest = max(tokens for batch in steps for tokens in batch)
        objective = {"objective": "dpo"} if job < num_dpo else {}
        jobs.append({"name": f"job-{job}", "seed": job, "sequence_len": max(2, longest), **data, **lora, **schedule, **objective})
    return jobs


def write_lengths(file: Path, lengths: Sequence[int], completion: float, pairs: bool = False) -> None:
    """Write rows of type lengths, of each sequence the last `completion` as targets; `pairs`: of two halves."""

    def row(n: int) -> dict[str, int]:
        short = max(2, n // 2 if pairs else n)
        targets = {"targets": min(short - 1, max(1, math.ceil(short * completion)))}
        return {"chosen": max(2, n - n // 2), "rejected": short, **targets} if pairs else {"tokens": short, **targets}

    rows = map(row, lengths)
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
    begun = ((workload[job % len(workload)], job // len(workload)) for job in range(num_jobs))
    return [[steps[(first + step) % len(steps)] for step in range(len(steps))] for steps, first in begun]


def head(lengths: Lengths, tokens: int) -> Lengths:
    """Return of each job's first step as many samples, one at least, as give about `tokens` tokens in all."""
    counts = (sum(end <= math.ceil(tokens / len(lengths)) for end in accumulate(steps[0])) for steps in lengths)
    return [[steps[0][: max(1, count)]] for steps, count in zip(lengths, counts, strict=True)]
