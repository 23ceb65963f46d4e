"""How long a file of records takes to be tokenised, and how much memory: one JSON line for each number of processes.

python -m scripts.bench.prepare_records --base-model models/SmolLM2-135M-Instruct --records 1000000 --processes 1 2
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data import tokenise
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.tokenizer import load_tokenizer
from scripts.bench.stamp import RESULTS, append_line, stamp

WORDS = ("training", "many", "adapters", "over", "one", "frozen", "base", "at", "once", "the", "a", "of")


def write_records(path: Path, num_records: int, seed: int) -> None:
    """Write short records of prompt and completion, of 10 to 55 words together."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i in range(num_records):
            prompt, completion = (" ".join(draw.choices(WORDS, k=draw.randint(5, most))) for most in (25, 30))
            file.write(json.dumps({"prompt": f"Question {i}: {prompt}?\n", "completion": f"{completion}."}) + "\n")


def time_of(path: Path, base_model: str, num_processes: int) -> dict:
    """Tokenise a file with an empty cache; seconds, CPU seconds, tokens, and the largest memory of this process and of a worker in MB."""
    tokenise.num_cores = lambda: num_processes
    tokenizer = load_tokenizer(base_model)
    job = JobConfig(name="j", datasets=(DatasetConfig(path=str(path), type="prompt_completion"),))
    with tempfile.TemporaryDirectory() as cache:
        start, cpu = time.perf_counter(), cpu_seconds()
        (data,) = load_jobs_data([job], tokenizer, cache)
        counted = {"processes": num_processes, "seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return counted | {"tokens": int(data.samples.lengths.sum()), "peak_mb": peaks[0], "peak_mb_of_worker": peaks[1]}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Time each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, options.records, seed=0)
        for num_processes in options.processes:
            line = {"records": options.records} | time_of(path, options.base_model, num_processes)
            print(json.dumps(line), flush=True)
            append_line(RESULTS / "prepare_records.jsonl", stamp() | line)


if __name__ == "__main__":
    main()
