"""Damaged and odd dataset files and configs through the code that reads them: a right result or one UserError, never another exception.

    python -m scripts.fuzz_records --kind records --num 2000 --seed 0

Prints a JSON line for each case: its seed, what was tried and what came of it. The exit status is 1 if any case raised something else;
`--seed N --num 1` repeats case N alone. Kinds: `records` (files of every kind and format, their records changed or their bytes damaged)
and `config` (YAML files and overrides).
"""

import argparse
import copy
import functools
import gzip
import io
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_lora.config.dataset_paths import DATASET_TYPES, PREFERENCE_TYPES
from megatron_lora.config.objective_keys import objective
from megatron_lora.config.schema import DatasetConfig, JobConfig, dump_config, load_config
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.errors import UserError
from tests.tiny_tokenizers import tiny_tokenizer

TURNS = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
RECORDS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHARED},
    "alpaca": {"instruction": "add", "input": "1 1", "output": "2", "system": "Be brief."},
    "alpaca_chat": {"instruction": "add", "input": "", "output": "2"},
    "prompt_completion": {"prompt": "Q: ", "completion": "yes"},
    "text": {"text": "one text"},
    "lengths": {"tokens": 12, "targets": 3},
    "preference": {"prompt": "Q: ", "chosen": "yes", "rejected": "no"},
    "preference_chat": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "kto": {"prompt": "Q: ", "completion": "yes", "label": True},
}
OBJECTIVE_OF = dict.fromkeys(PREFERENCE_TYPES, "dpo") | {"kto": "kto"}
TEMPLATES = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['content'] }}\n{% endfor %}",
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}\n{% endfor %}",
)
ODD_VALUES = (
    *(
        None,
        True,
        0,
        -1,
        1e400,
        10**30,
        float("nan"),
        "",
        " ",
        "\n",
        "</s>",
        "<s></s>",
        "\ud800",
        "\x00",
        "é🙂",
        "x" * 5000,
        "{{ 1 }}",
        "{0}",
    ),
    *([], {}, [[]], [None], {"a": {"b": [1]}}, [{"role": "user"}], [{"from": "gpt", "value": 1}], ["text"], "[1, 2]", "null"),
)
ODD_NAMES = ("weight", "loss", "tools", "id", "", "\ud800", "é", "messages", "text", "role", "content", "x" * 300, "input_ids", "system")
KEYS = (
    "path",
    "type",
    "name",
    "split",
    "sampling_weight",
    "jobs",
    "datasets",
    "seed",
    "r",
    "parallel",
    "defaults",
    "",
    "é",
    "bad_rows",
    "0",
)


def fuzz_records(draw: random.Random, folder: Path) -> dict:
    """Write a file of records, spoil it, and load it as a job's data."""
    kind, format = draw.choice(list(WRITERS)), draw.choice(DATASET_TYPES)
    records = [copy.deepcopy(RECORDS[format]) for _ in range(draw.randint(0, 6))]
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
        spoil(draw, records)
    tried = {"file": kind, "format": format}
    try:
        content = WRITERS[kind](records)
    except Exception as error:  # pyarrow and csv cannot write every odd record: such a file does not exist
        return tried | {"unwritten": type(error).__name__}
    if draw.random() < 0.4:
        content = damaged(draw, content)
    path = folder / f"a.{kind}"
    path.write_bytes(content)
    pairs = format in PREFERENCE_TYPES
    job = JobConfig(
        name="j",
        seed=0,
        objective=objective("objective", OBJECTIVE_OF.get(format, "sft")),
        datasets=(DatasetConfig(path=str(path), type=format, sampling_weight=draw.choice((1.0, 0.3, 2.5))),),
        bad_rows=draw.choice(("refuse", "drop")),
        sequence_len=draw.choice((2, 8, 2048)),
        train_on_inputs=draw.random() < 0.3,
    )
    tokenizer = tokenizers()[draw.randrange(len(tokenizers()))]
    (data,) = load_jobs_data([job], tokenizer, draw.choice((None, folder / "cache")), vocab_size=len(tokenizer))
    samples = list(data.samples)
    most = job.sequence_len * (1 + pairs)
    assert samples and all(2 <= len(sample) <= most and sample.targets.any() and not sample.targets[0] for sample in samples)
    assert len({sample.record for sample in samples}) == len(samples) == data.num_records - data.num_dropped - data.num_bad
    assert list(data.steps_of(job).lengths()[0]) and np.array_equal(data.samples.lengths, [len(sample) for sample in samples])
    assert "\n" not in data.describe() and data.describe().encode()
    return tried | {"samples": len(samples), "bad": data.num_bad}


def fuzz_config(draw: random.Random, folder: Path) -> dict:
    """Write a config, spoil it, and load it; what loads must load again from its own dump."""
    dataset = {"path": draw.choice(("a.jsonl", "data/*.csv", "team/tales")), "type": draw.choice(DATASET_TYPES)}
    job = {"datasets": [dataset], "objective": OBJECTIVE_OF.get(str(dataset["type"]), "sft")}
    tree = {"base_model": "m", "output_dir": "o", "jobs": [{"name": "a", **job}, {"name": "b", **job}]}
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        spoil(draw, tree)
    content = json.dumps(tree).encode()
    if draw.random() < 0.4:
        content = damaged(draw, content)
    (folder / "c.yaml").write_bytes(content)
    value = draw.choice(("1", "true", "[]", "{", "'", "1e-4", "x", "", "&a", "*a", "null", "0x10", "é", "- a", "[" * 500))
    overrides = draw.choice(
        ([], [], [f"{draw.choice(KEYS)}={value}"], [f"jobs.{draw.choice(('0', 'a', '9', ''))}.{draw.choice(KEYS)}={value}"])
    )
    config = load_config(folder / "c.yaml", overrides)
    (folder / "d.yaml").write_text(dump_config(config))
    assert load_config(folder / "d.yaml") == config
    return {"jobs": len(config.jobs), "overrides": overrides}


def spoil(draw: random.Random, tree: object) -> None:
    """Change one thing at a random place of a tree of lists and dicts: a value, a name, or what is there at all."""
    while isinstance(tree, list | dict) and tree:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        inner = tree[key]
        if isinstance(inner, list | dict) and inner and draw.random() < 0.8:
            tree = inner
            continue
        how = draw.randrange(4)
        if how == 0:
            del tree[key]
        elif how == 1 and isinstance(tree, dict):
            tree[draw.choice(ODD_NAMES)] = copy.deepcopy(draw.choice(ODD_VALUES))
        elif how == 2 and isinstance(tree, dict):
            tree[draw.choice((*ODD_NAMES, *KEYS))] = tree.pop(key)
        else:
            tree[key] = copy.deepcopy(draw.choice(ODD_VALUES))
        return


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position = draw.randrange(len(content) + 1)
        how = draw.randrange(4)
        if how == 0:
            del content[position:]
        elif how == 1:
            content[position:position] = content[position : position + draw.randint(1, 40)]
        elif how == 2:
            content[position:position] = bytes(draw.choice((0, 10, 34, 91, 123, 255, 0xEF)) for _ in range(draw.randint(1, 4)))
        elif position < len(content):
            content[position] = draw.randrange(256)
    return bytes(content)


def _lines(records: list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _csv(records: list) -> bytes:
    import csv

    text = io.StringIO(newline="")
    names = list(records[0]) if records else ["text"]
    writer = csv.writer(text)
    writer.writerows([names, *([record.get(name) for name in names] for record in records)])
    return text.getvalue().encode()


def _arrow(records: list, kind: str) -> bytes:
    import pyarrow
    from pyarrow import ipc, parquet

    table, out = pyarrow.Table.from_pylist(records), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, out)
    else:
        with (ipc.new_file if kind == "file" else ipc.new_stream)(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


def _zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


WRITERS: dict[str, Callable[[list], bytes]] = {
    "jsonl": _lines,
    "json": _lines,
    "list.json": lambda records: json.dumps(records, indent=1).encode(),
    "csv": _csv,
    "parquet": lambda records: _arrow(records, "parquet"),
    "file.arrow": lambda records: _arrow(records, "file"),
    "stream.arrow": lambda records: _arrow(records, "stream"),
    "jsonl.gz": lambda records: gzip.compress(_lines(records)),
    "csv.gz": lambda records: gzip.compress(_csv(records)),
    "json.zst": lambda records: _zstd(_lines(records)),
}
KINDS = {"records": fuzz_records, "config": fuzz_config}


@functools.cache
def tokenizers() -> tuple:
    """Build tokenizers of several kinds, with and without a chat template."""
    ways = ({}, {"opening": ("<s>",)}, {"opening": ("<s>",), "closing": ("</s>",), "words": True}, {"bos": None})
    return tuple(tiny_tokenizer(template=template, **way) for way in ways for template in (*TEMPLATES, None))


def run_case(kind: str, seed: int) -> dict:
    """Run one case in a folder of its own; `failed` has the traceback of an exception that is no UserError of one line."""
    with tempfile.TemporaryDirectory() as folder:
        case = {"kind": kind, "seed": seed}
        try:
            return case | {"outcome": "right"} | KINDS[kind](random.Random(seed), Path(folder))
        except UserError as error:
            line = str(error).replace(folder, "")
            if "\n" in line or not line or len(line) > 2000 or "\ud800" in line:
                return case | {"outcome": "failed", "failed": f"not one line: {line!r}"}
            return case | {"outcome": "refused", "line": line[:300]}
        except Exception:  # any but a UserError is what this script looks for
            return case | {"outcome": "failed", "failed": traceback.format_exc()}


def main() -> int:
    """Run the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), nargs="+", default=sorted(KINDS))
    parser.add_argument("--num", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    failed = 0
    for kind in options.kind:
        for seed in range(options.seed, options.seed + options.num):
            case = run_case(kind, seed)
            failed += case["outcome"] == "failed"
            print(json.dumps(case), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
