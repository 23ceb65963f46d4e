"""A stranger's base model with code of its own, its adapter and its records: read without a prompt, a hang, or a file outside."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from unittest import mock

from fuzz_kinds import adapter, base_model, mutate

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data import render_bounds
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.huggingface.base_files import digests_of_base

CODE = "import pathlib\npathlib.Path(__file__).with_name('RAN').write_text('code of the directory ran')\n"
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=messages|string) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'x' * 99999999999 }}",
    "{{ messages[0].content|center(40000000) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{% include 'tokenizer.json' %}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)
MAPS = {"AutoTokenizer": ["code.Own", "code.Own"], "AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def make(directory: Path, random: Random) -> None:
    """Write a base model with a tokenizer, an adapter and records in folders of their own, and code beside the model."""
    import oracle

    for name in ("model", "adapter"):
        (directory / name).mkdir()
    base_model.make(directory / "model", random)
    adapter.make(directory / "adapter", random)
    oracle.make_tokenizer(directory / "model")
    (directory / "model" / "code.py").write_text(CODE)
    (directory / "model" / "chat_template.jinja").write_text(TEMPLATE)
    record = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]}
    (directory / "rows.jsonl").write_text(4 * (json.dumps(record) + "\n"))


def read(directory: Path) -> None:
    """Read all of it as a run's checks do, with a `y` waiting on standard input; nothing may have been written."""
    before = {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}
    job = JobConfig(
        name="a", datasets=(DatasetConfig(path=str(directory / "rows.jsonl"), type="messages"),), seed=0, mode="min", keep="last"
    )
    try:
        bounds = mock.patch.multiple(render_bounds, MOST_CPU_S=1.0, MOST_BYTES=1 << 28)
        with mock.patch("builtins.input", lambda *words: _asked()), bounds:
            base_model.read(directory / "model")
            digests_of_base(directory / "model", False, directory / "cache")
            adapter.read(directory / "adapter")
            load_jobs_data([job], load_tokenizer(directory / "model"), None, None)
    finally:
        after = {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}
        assert before == after, f"written: {sorted(str(path) for path in after if after[path] != before.get(path))}"


def _asked() -> str:
    raise AssertionError("a question was asked on standard input")


def _auto_map(random: Random, directory: Path) -> str:
    """Have the model ask for code of its own."""
    names = [name for name in ("config.json", "tokenizer_config.json") if _is_plain(directory / "model" / name)]
    for name in names[: random.choice([1, 2])]:
        tree = json.loads((directory / "model" / name).read_text())
        tree |= {"auto_map": MAPS, "tokenizer_class": random.choice(["Own", "PreTrainedTokenizerFast", "../code.Own", 7])}
        (directory / "model" / name).write_text(json.dumps(tree))
    return f"auto_map in {names}"


def _is_plain(file: Path) -> bool:
    """Whether a file can be changed here: not once it has no end, or is none."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 24


def _template(random: Random, directory: Path) -> str:
    text = random.choice(TEMPLATES)
    if _is_plain(directory / "model" / "chat_template.jinja"):
        (directory / "model" / "chat_template.jinja").write_text(text)
    return f"template {text[:60]}"


def _special_file(random: Random, directory: Path) -> str:
    """Put a pipe, a device, a file without an end or a link that leads outside in the place of a file."""
    files = [path for path in sorted(directory.rglob("*")) if _is_plain(path)]
    what = random.choice(("pipe", "device", "endless", "link outside", "link in a circle"))
    file = random.choice([path for path in files if what != "endless" or path.parent != directory])  # records may take any size
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "endless":
        with open(file, "wb") as sparse:
            sparse.truncate(1 << 42)
    else:
        file.symlink_to({"device": "/dev/zero", "link outside": "/etc/passwd", "link in a circle": file.name}[what])
    return f"{file.relative_to(directory)}: {what}"


def _weight_map(random: Random, directory: Path) -> str:
    """Name shards outside the model's directory."""
    name = random.choice(["../adapter/adapter_model.safetensors", "/etc/passwd", "..", "a/b.safetensors", ".safetensors", 7])
    for file in (directory / "model").glob("model.safetensors"):
        file.unlink()
    (directory / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    return f"weight_map names {name}"


def _edit(name: str, random: Random, directory: Path) -> str:
    keys = ["eos_token", "chat_template", "model", "pre_tokenizer", "added_tokens", "x"]
    return mutate.edit_json(random, directory / "model" / name, keys) if _is_plain(directory / "model" / name) else "nothing"


MUTATIONS: tuple[Callable[[Random, Path], str], ...] = (
    *(_auto_map, _template, _template, _special_file, _special_file, _weight_map),
    *(partial(_edit, name) for name in ("tokenizer_config.json", "tokenizer.json")),
    lambda random, directory: mutate.spoil_text(random, directory / "rows.jsonl") if _is_plain(directory / "rows.jsonl") else "nothing",
)
