"""Measures whether memory grows in a run of weeks: many steps of jobs that come and go, with the real control, plan feed and planner.

A rank without a model takes each step when its STEP comes (tests/living_plan.py). Appends a JSON line to
scripts/bench/results/long_run.jsonl: the resident memory of the first rank's process and of the planner's eleven times in the
run, and by how much each grew per 10,000 steps over the second half.

    python -m scripts.bench.long_run [--steps 100000] [--jobs 1000] [--output FILE]      from the root of the repository; Linux
"""

import dataclasses
import gc
import os
import random
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch.distributed as dist

from megatron_lora.commands.launch import children_of
from scheduling.types import MAX_ENDINGS
from scheduling.windows import WINDOW_SLOTS
from scripts.bench.plan_windows import memory_mib
from scripts.bench.stamp import append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, whole

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from living_plan import Resident, World, job_config  # noqa: E402

NUM_STAGES, RESIDENT, CAPACITY = 2, 8, 256


class LongWorld(World):
    """Keeps nothing of a job that is done, but counts its steps; notes the memory eleven times."""

    def __init__(self, path: Path, num_jobs: int, num_steps: int):
        """Make `num_jobs` jobs of as many steps each as give `num_steps` together."""
        steps = range(-(-num_steps // num_jobs))
        jobs = [job_config(f"job-{k}", r=random.Random(k).choice((8, 16, 32))) for k in range(num_jobs)]
        lengths = {job.name: [[random.Random(f"{job.name} {step}").randint(4, 28)] for step in steps] for job in jobs}
        room = sorted(jobs, key=lambda job: -job.r)[:RESIDENT]
        super().__init__(path, jobs, lengths, num_stages=NUM_STAGES, room=room, capacity=CAPACITY)
        self.settings = dataclasses.replace(self.settings, num_slots=WINDOW_SLOTS, max_endings=MAX_ENDINGS)  # those of real runs
        self.recent, self.windows = deque(maxlen=self.gap), deque(maxlen=1)  # type: ignore[assignment]
        self.num_taken, self.marks = 0, [len(steps) * num_jobs * mark // 100 for mark in range(9, 100, 9)]
        self.memory: dict[str, list[float]] = {"rank": [], "planner": []}

    def _step(self, ending, window) -> None:
        resident: Resident = self.residents[ending.job]
        super()._step(ending, window)
        self.num_taken += 1
        if self.num_taken in self.marks:
            gc.collect()
            planner = next(pid for pid in children_of(os.getpid()) if "scheduling.serve" in Path(f"/proc/{pid}/cmdline").read_text())
            for name, pid in (("rank", os.getpid()), ("planner", planner)):
                self.memory[name].append(memory_mib(pid))
        if resident.taken == resident.num_steps:
            self.check(resident.name)
            del self.trained[resident.name]


def measure(num_jobs: int, num_steps: int) -> dict:
    """Run it; returns the figures."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = LongWorld(Path(folder) / "run", num_jobs, num_steps)
        world.run()
        assert set(world.states.values()) == {"done"}
        num_files = len(list((Path(folder) / "run" / "plan").iterdir()))
    middle = len(world.marks) // 2
    half = (world.marks[-1] - world.marks[middle]) / 10_000
    growth = {name: round((found[-1] - found[middle]) / half, 2) for name, found in world.memory.items()}
    figures = {"steps": world.num_taken, "memory_mib": world.memory, "growth_mib_per_10000_steps": growth}
    return figures | {"plan_files": num_files, "seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    """Measure and append a line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole, default=100_000)
    parser.add_argument("--jobs", type=whole, default=1000)
    result_options(parser, "long_run.jsonl")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    case = f"{options.jobs} jobs, {options.steps} steps, {NUM_STAGES} stages, {RESIDENT} resident"
    line = {"case": case} | measure(options.jobs, options.steps)
    append_line(options.output, line | stamp(options.hardware, options.commit))
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
