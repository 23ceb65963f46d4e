"""How long records take to become tokens, beside the chat template and tokenizer alone: one JSON line a case.

    python -m scripts.bench.tokenise --model models/SmolLM2-135M-Instruct --case chats

`ratio` is the median over rounds of our time over theirs, measured in turn on one core; `spread` its lowest and highest.
"""

import argparse
import os
import random
import statistics
import time

os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"

from megatron_lora.data.row_formats import RecordEncoder  # noqa: E402 (the tokenizer reads the environment when it is imported)
from megatron_lora.data.tokenizer import load_tokenizer  # noqa: E402
from scripts.bench.stamp import RESULTS, append_line, stamp  # noqa: E402

WORDS = ("the", "a", "of", "model", "is", "very", "good", "answer", "why", "how", "12", "3.5", "and", "because", "however", "it", "works")
CHATS = {"40 messages": (40, 20), "200 messages": (200, 4), "600 messages": (600, 2)}  # messages of a record, records


def chats(tokenizer, rounds: int):
    """Yield a line for conversations of each length."""
    encoder, seed = RecordEncoder(tokenizer), random.Random(0)
    for name, (num_messages, num_records) in CHATS.items():
        roles = ("user", "assistant") * (num_messages // 2)
        records = [
            {"messages": [{"role": role, "content": " ".join(seed.choices(WORDS, k=60))} for role in roles]} for _ in range(num_records)
        ]
        times = []
        for _ in range(rounds):
            start = time.process_time()
            for record in records:
                tokenizer(tokenizer.apply_chat_template(record["messages"], tokenize=False), add_special_tokens=False)
            middle = time.process_time()
            for record in records:
                encoder.encode(record, "messages", False, "")
            times.append((middle - start, time.process_time() - middle))
        ratios = sorted(ours / alone for alone, ours in times)
        ours_ms = statistics.median(ours for _, ours in times) / num_records * 1e3
        yield {"case": name, "ms_a_record": ours_ms, "us_a_message": ours_ms / num_messages * 1e3, "ratio": statistics.median(ratios)} | {
            "spread": [ratios[0], ratios[-1]]
        }


CASES = {"chats": chats}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a tokenizer that has a chat template")
    parser.add_argument("--case", choices=CASES, default="chats")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for line in CASES[arguments.case](load_tokenizer(arguments.model), arguments.rounds):
        append_line(RESULTS / "tokenise.jsonl", stamp() | line)
        print(f"{line['case']}: {line['ms_a_record']:.2f} ms a record, {line['ratio']:.2f} times template and tokenizer alone")
