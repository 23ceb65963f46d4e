"""How long records take to become tokens: conversations beside the chat template and tokenizer alone, or all records of a file.

    python -m scripts.bench.tokenise --model models/SmolLM2-135M-Instruct
    python -m scripts.bench.tokenise --model models/SmolLM2-135M-Instruct --case file --records 1000000 --processes 1 2

`chats` appends a line for each length of conversation to tokenise.jsonl: `ratio` is the median over rounds of our time over theirs,
measured in turn on one core; `spread` its lowest and highest. `file` appends a line for each number of processes to
prepare_records.jsonl: seconds, CPU seconds, tokens, and the largest memory of this process and of a worker in MB.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"  # read when the tokenizer is imported

from megatron_lora.config.schema import DatasetConfig, JobConfig  # noqa: E402
from megatron_lora.data import tokenise  # noqa: E402
from megatron_lora.data.row_formats import RecordEncoder  # noqa: E402
from megatron_lora.data.samples import load_jobs_data  # noqa: E402
from megatron_lora.data.tokenizer import load_tokenizer  # noqa: E402
from scripts.bench.stamp import RESULTS, append_line, stamp  # noqa: E402
from scripts.one_line import OneLineParser, whole  # noqa: E402

WORDS = ("the", "a", "of", "model", "is", "very", "good", "answer", "why", "how", "12", "3.5", "and", "because", "however", "it", "works")
CHATS = {"40 messages": (40, 20), "200 messages": (200, 4), "600 messages": (600, 2)}  # messages of a record, records


def chats(tokenizer, options: argparse.Namespace):
    """Yield a line for conversations of each length."""
    encoder, seed = RecordEncoder(tokenizer), random.Random(0)
    for name, (num_messages, num_records) in CHATS.items():
        roles = ("user", "assistant") * (num_messages // 2)
        records = [{"messages": [{"role": role, "content": words(seed, 60)} for role in roles]} for _ in range(num_records)]
        times = []
        for _ in range(options.rounds):
            start = time.process_time()
            for record in records:
                tokenizer(tokenizer.apply_chat_template(record["messages"], tokenize=False), add_special_tokens=False)
            middle = time.process_time()
            for record in records:
                encoder.encode(record, "messages", False, "")
            times.append((middle - start, time.process_time() - middle))
        ratios = sorted(ours / alone for alone, ours in times)
        ours_ms = statistics.median(ours for _, ours in times) / num_records * 1e3
        line = {"case": name, "ms_a_record": ours_ms, "us_a_message": ours_ms / num_messages * 1e3}
        yield line | {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


def words(seed: random.Random, count: int) -> str:
    """Draw a text."""
    return " ".join(seed.choices(WORDS, k=count))


def file(tokenizer, options: argparse.Namespace):
    """Yield a line for each number of processes that tokenise a file of short records, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        path, seed = Path(folder) / "records.jsonl", random.Random(0)
        with path.open("w") as opened:
            for i in range(options.records):
                prompt, completion = (words(seed, seed.randint(5, most)) for most in (25, 30))
                opened.write(json.dumps({"prompt": f"Question {i}: {prompt}?\n", "completion": f"{completion}."}) + "\n")
        job = JobConfig(name="j", datasets=(DatasetConfig(path=str(path), type="prompt_completion"),))
        for num_processes in options.processes:
            tokenise.num_cores = lambda count=num_processes: count
            with tempfile.TemporaryDirectory() as cache:
                start, cpu = time.perf_counter(), sum(os.times()[:4])  # this process's, and those that it has waited for
                (data,) = load_jobs_data([job], tokenizer, cache)
                spent = {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4]) - cpu}
            peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            found = {"tokens": int(data.samples.lengths.sum()), "peak_mb": peaks[0], "peak_mb_of_worker": peaks[1]}
            yield {"records": options.records, "processes": num_processes, **spent, **found}


CASES = {"chats": (chats, "tokenise.jsonl"), "file": (file, "prepare_records.jsonl")}

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a tokenizer that has a chat template")
    parser.add_argument("--case", choices=CASES, default="chats")
    parser.add_argument("--rounds", type=whole, default=9)
    parser.add_argument("--records", type=whole, default=1_000_000)
    parser.add_argument("--processes", type=whole, nargs="+", default=[1, 2])
    options = parser.parse_args()
    measure, results = CASES[options.case]
    for line in measure(load_tokenizer(options.model), options):
        append_line(RESULTS / results, stamp() | line)
        print(json.dumps(line), flush=True)
