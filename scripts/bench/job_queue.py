"""A queue of many jobs beside a few fixed ones with the same samples, and evaluation beside none: tokens/s and memory of whole runs.

    python -m scripts.bench.job_queue [--jobs 256] [--adapter-memory 8] [--cases fixed,queue,plain,evaluated,added]

`queue`: jobs of --steps steps and ranks 8, 16, 24, 32 wait for rows of an arena of --adapter-memory GB, and drain. `fixed`: four jobs of
these ranks that have the queue's samples between them. `evaluated`: four jobs that are evaluated --evaluations times each; `plain`:
the same without. `added`: `plain` in such an arena, and a job is added: how many windows lie between its data being ready and its first
forward. An evaluation's token counts as the share that a forward has of a training token's time in that run. A short run comes first,
which is not counted. All over a frozen model of random weights, as end_to_end.py. Appends a JSON line per case, with the seconds that the
host spends on jobs that come and go.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from megatron_lora.environment import allocator_settings

os.environ.update(allocator_settings(os.environ))  # before anything imports torch

import torch  # noqa: E402

from megatron_lora.commands.finished_run import FinishedRun  # noqa: E402
from megatron_lora.config.schema import RunConfig, load_config  # noqa: E402
from megatron_lora.huggingface.architecture import read_architecture  # noqa: E402
from megatron_lora.output.changes import job_mapping  # noqa: E402
from megatron_lora.output.events import read_events  # noqa: E402
from megatron_lora.output.requests import new_request, write_request  # noqa: E402
from megatron_lora.planning.plan_feed import PlanFeed  # noqa: E402
from megatron_lora.training.control import Control  # noqa: E402
from megatron_lora.training.executor import Executor  # noqa: E402
from megatron_lora.training.job_reader import JobReader  # noqa: E402
from megatron_lora.training.residents import Residents  # noqa: E402
from megatron_lora.training.run_reporter import RunReporter  # noqa: E402
from megatron_lora.training.snapshots import SnapshotCollector  # noqa: E402
from scripts.bench.end_to_end import during, memory  # noqa: E402
from scripts.bench.model_shapes import write_config  # noqa: E402
from scripts.bench.stamp import append_line, result_options, stamp  # noqa: E402
from scripts.bench.trained import trained  # noqa: E402
from scripts.bench.workloads import SUITE, job_configs, read_workload, write_lengths  # noqa: E402
from scripts.one_line import OneLineParser, ended, folder, numbers, positive, whole  # noqa: E402

RANKS = (8, 16, 24, 32)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = ("fixed", "queue", "plain", "evaluated", "added")
ADDED_AT = 2  # the window that is planned when the job of `added` is asked for


def steps_of(pool: list[int], num_jobs: int, num_steps: int, batch: int) -> list[list[list[int]]]:
    """Deal sample lengths to jobs, going around: [job][step][sample]."""
    lengths = iter(pool[k % len(pool)] for k in range(num_jobs * num_steps * batch))
    return [[[next(lengths) for _ in range(batch)] for _ in range(num_steps)] for _ in range(num_jobs)]


def config_of(options: argparse.Namespace, case: str, folder: Path, num_jobs: int):
    """Write a case's model, data and config; return the config."""
    folder.mkdir(parents=True)
    write_config(options.shape, folder, options.num_layers)
    pool = [tokens for steps in read_workload(SUITE, options.workload) for batch in steps for tokens in batch]
    queue = steps_of(pool, num_jobs, options.steps, options.batch)
    joined = [[batch for job in queue[k::4] for batch in job] for k in range(4)]
    lengths = queue if case == "queue" else joined
    jobs = job_configs(lengths, len(lengths[0]), folder, [RANKS[job % 4] for job in range(len(lengths))])
    for job in jobs:
        job["target_modules"] = TARGETS
        if case == "evaluated":
            held = folder / f"{job['name']}-validation.jsonl"
            write_lengths(held, pool[: options.validation], 0.25)
            every = max(1, len(lengths[0]) // options.evaluations)
            job |= {"val_datasets": [{"path": str(held), "type": "lengths"}], "eval_steps": every, "keep": "last"}
    tree = {"base_model": str(folder), "output_dir": str(folder / "run"), "load_weights": False, "microbatch_tokens": options.budget}
    tree |= {"recompute": "none", "jobs": jobs} | ({"adapter_memory": options.adapter_memory} if case in ("queue", "added") else {})
    (folder / "config.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return load_config(folder / "config.yaml")


def figures(run: FinishedRun) -> dict:
    """Return the tokens of training and evaluation, the seconds, and tokens/s with an evaluation's tokens as their share."""
    training = [slot for slot in range(len(run.slots)) if slot not in run.evaluated and run.slots[slot]]
    tokens = {slot: sum(entry[3] for entry in run.slots[slot]) for slot in range(len(run.slots))}
    forward, backward = run.passes("F")[0], run.passes("B")[0]
    per_token = sum(forward[slot] + backward[slot] for slot in training) / sum(tokens[slot] for slot in training)
    evaluated = sum(tokens[slot] for slot in run.evaluated)
    forward_share = sum(forward[slot] for slot in training) / sum(tokens[slot] for slot in training) / per_token
    trained_tokens = sum(tokens[slot] for slot in training)
    events = read_events(run.path)
    return {
        "tokens": trained_tokens,
        "evaluated_tokens": evaluated,
        "forward_share": forward_share,
        "seconds": run.makespan_s,
        "tokens_per_s": (trained_tokens + forward_share * evaluated) / run.makespan_s,
        "slots": len(run.slots),
        "evaluation_slots": len(run.evaluated),
        "noops": len(run.slots) - len(training) - len(run.evaluated),
        "bubble": run.bubble(0),
        "wait_plan": run.seconds(0, "wait plan") / run.makespan_s,
        "most_resident": most_resident(events),
        "mean_segments": statistics.fmean(len({entry[0] for entry in run.slots[slot]}) for slot in training),
    }


@contextmanager
def timed(found: dict):
    """Add up the seconds of the host that the training thread spends on jobs that come and go, in a dict."""
    watched = [
        (Residents, "begin"),
        (SnapshotCollector, "submit"),
        (RunReporter, "on_step"),
        (RunReporter, "on_window"),
        (PlanFeed, "_read"),
    ]
    watched += [(Residents, "read"), (Residents, "prepare"), (Control, "ask"), (Control, "planned")]  # these in the feed's thread

    def around(owner: type, name: str, before):
        def measured(*arguments, **keywords):
            begin = time.perf_counter()
            try:
                return before(*arguments, **keywords)
            finally:
                key = f"{owner.__name__}.{name}"
                found[key] = found.get(key, 0.0) + time.perf_counter() - begin

        return mock.patch.object(owner, name, measured)

    with ExitStack() as stack:
        for owner, name in watched:
            stack.enter_context(around(owner, name, getattr(owner, name)))
        yield


@contextmanager
def adding(config: RunConfig, found: dict):
    """Add a job like the first to the run once it trains; put the times of its way to the first forward, and a window's, into a dict."""
    job = dataclasses.replace(config.jobs[0], name="added")
    times: dict[str, float] = {}
    windows: list[float] = []  # when each was asked for: one is planned while the one before runs

    def wait_until_read(reader: JobReader) -> None:
        while job.name not in reader.asked or reader._ours is None or not reader._ours.poll():
            time.sleep(0.005)
        times["ready"] = time.perf_counter()

    def ask(self, window, slot, before=Control.ask):
        windows.append(time.perf_counter())
        if window == ADDED_AT:
            times["asked"] = time.perf_counter()
            write_request(Path(config.output_dir), new_request("add", jobs=[job_mapping(job)]))
            threading.Thread(target=wait_until_read, args=(self.reader,), daemon=True).start()
        return before(self, window, slot)

    def begin(self, slot, before=Executor._begin):
        if "first forward" not in times and any(segment.job == len(config.jobs) for segment in self.stream[slot].segments):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times["first forward"] = time.perf_counter()
        return before(self, slot)

    with mock.patch.object(Control, "ask", ask), mock.patch.object(Executor, "_begin", begin):
        yield
    usual = statistics.median(end - start for start, end in itertools.pairwise(windows[2:]))  # two are planned before the first runs
    waited = times["first forward"] - times["ready"]
    found |= {"read_s": times["ready"] - times["asked"], "ready_to_forward_s": waited, "window_s": usual, "windows": waited / usual}


def most_resident(events) -> int:
    """Return the most jobs that had begun and were not done at one time."""
    resident, most = 0, 0
    for event in events:
        resident += (event.event == "started") - (event.event == "done")
        most = max(most, resident)
    return most


def main() -> int:
    """Run the cases one after another."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--num-layers", type=whole)
    parser.add_argument("--workload", default="het-s4")
    parser.add_argument("--jobs", type=whole, default=256)
    parser.add_argument("--steps", type=whole, default=2, help="of each job of the queue")
    parser.add_argument("--batch", type=whole, default=4, help="samples of a step")
    parser.add_argument("--budget", type=whole, default=8192)
    parser.add_argument("--adapter-memory", type=positive, default=8.0)
    parser.add_argument("--evaluations", type=whole, default=8, help="of each job of the case evaluated")
    parser.add_argument("--validation", type=whole, default=16, help="samples of a job's validation set")
    parser.add_argument("--eval-jobs", type=whole, default=64, help="jobs of the queue whose samples plain and evaluated have")
    parser.add_argument("--cases", type=numbers(str), default=CASES)
    parser.add_argument("--runs", type=folder, help="where the runs' directories stay; default: they are removed")
    result_options(parser, "job_queue.jsonl")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"--cases: {unknown.pop()!r} is none of {', '.join(CASES)}")
    with nullcontext(options.runs) if options.runs else tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(("fixed", *options.cases)):
            num_jobs = 8 if number == 0 else options.jobs if case in ("fixed", "queue") else options.eval_jobs
            config = config_of(options, case, Path(root) / f"{number}-{case}", num_jobs)
            gauges, host_s = {}, {}
            way: dict = {}
            with timed(host_s), adding(config, way) if case == "added" else nullcontext():
                run = trained(config, around=during(gauges))
            assert run is not None
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            found = figures(run) | {
                "memory": memory(run, read_architecture(config.base_model), "fused", [peak]),
                "gauges": gauges,
                "host_s": host_s,
                **way,
            }
            gc.collect()
            torch.cuda.empty_cache()
            told = [f"{found['tokens_per_s']:,.0f} tokens/s", f"{found['seconds']:.1f} s", f"{found['most_resident']} resident"]
            told += [
                f"peak {peak / 1e9:.2f} GB, predicted {found['memory']['predicted_over_peak']}",
                f"wait for plans {found['wait_plan']:.2%}",
            ]
            told += [f"bubble {found['bubble']:.1%}", *(f"{name} {seconds:.2f} s" for name, seconds in host_s.items())]
            told += [f"{name} {value:.2f}" for name, value in way.items()]
            print(f"{'uncounted' if number == 0 else case}: {', '.join(told)}", flush=True)
            if number:
                settings = {key: value for key, value in vars(options).items() if key not in ("output", "runs", "hardware", "commit")}
                append_line(
                    options.output, stamp(options.hardware, options.commit) | {"case": case, "settings": settings, "results": found}
                )
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
