"""Dataset files, ids, cuts and counts, the cache, the tokenizer's own errors, and the preview."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from records import read_records
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lora.commands.preview import preview_records, show_preview
from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data import dataset_sources, row_files, token_cache
from megatron_lora.data.sample_arrays import target_share
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.steps import job_steps
from megatron_lora.data.token_cache import fingerprint, source_digest
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.errors import UserError

PAIRS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "abcdef", "completion": "x"}, {"prompt": "a", "completion": "long answer"}]


def load_job_data(job, tokenizer, cache_dir, **options):
    """Load the data of one job."""
    return load_jobs_data([job], tokenizer, cache_dir, **options)[0]


@pytest.fixture(scope="module")
def tokenizer():
    """One byte is one token; </s> is the last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, "</s>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def write(path, records):
    """Write records in the format that the path's ending names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    return path


def job(*paths, type="prompt_completion", **keys):
    return JobConfig(name="j", datasets=tuple(DatasetConfig(path=str(path), type=type) for path in paths), **keys)


def texts(tokenizer, loaded):
    return [tokenizer.decode(sample.tokens) for sample in loaded.samples]


def test_the_share_of_targets_counts_samples_as_often_as_steps_take_them(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", PAIRS)
    part, every = (load_job_data(job(path, train_on_inputs=inputs), tokenizer, None).samples for inputs in (False, True))

    def steps(num_epochs=1, max_steps=None):
        return job_steps(3, 2, num_epochs, max_steps, shuffle=False, seed=0)

    assert target_share([(part, steps())]) == target_share([(part, steps(4))]) == (3 + 2 + 12) / (5 + 8 + 13)
    assert target_share([(every, steps())]) == (26 - 3) / 26
    assert target_share([(part, steps(max_steps=1))]) == (3 + 2) / (5 + 8)
    assert target_share([(part, steps(max_steps=3))]) == (2 * (3 + 2) + 12) / (2 * (5 + 8) + 13)
    assert target_share([(part, steps(max_steps=1)), (every, steps(2))]) == (5 + 2 * 23) / (13 + 2 * 26)


# ---- files ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_samples(tmp_path, tokenizer, name):
    loaded = load_job_data(job(write(tmp_path / name, PAIRS)), tokenizer, None)
    assert texts(tokenizer, loaded) == ["abcd</s>", "abcdefx</s>", "along answer</s>"]
    assert [tokenizer.decode(sample.tokens[sample.targets]) for sample in loaded.samples] == ["cd</s>", "x</s>", "long answer</s>"]
    assert loaded.samples.lengths.tolist() == [5, 8, 13] and loaded.num_targets == 3 + 2 + 12
    assert loaded.samples[0].tokens.dtype == np.int32 and loaded.samples[0].targets.dtype == bool


def test_nested_records_of_a_parquet_file(tmp_path, tokenizer):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
    chatty = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )
    path = write(tmp_path / "a.parquet", [{"conversations": turns}])
    loaded = load_job_data(job(path, type="sharegpt"), chatty, None)
    assert texts(tokenizer, loaded) == ["hi</s>ok</s>"]
    with pytest.raises(UserError, match=r"jobs.j.datasets: .*a.parquet is of type sharegpt and .* has no chat template"):
        load_job_data(job(path, type="sharegpt"), tokenizer, None)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a.jsonl:3: is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: is not valid JSON .*UTF-8"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a.jsonl:2: holds \[1\] where a record is an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', r"a.jsonl:2: 'text' is empty"),
        ("a.jsonl", "\n \n", r"a.jsonl: holds no records"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', r"a.jsonl:1: is not valid JSON \(an object has 'text' twice\)"),
        ("a.json", '[{"text": "a"},\n{"text": "a", "x": {"y": 1, "y": 2}}]', r"a.json:2: is not valid JSON \(an object has 'y' twice\)"),
        ("a.json", "[]", r"a.json: holds no records"),
        ("a.json", '{"text":\n "a"}', r"a.json:1: is not valid JSON"),
        ("a.json", '[{"text": "a"},\n\n{"text": ""}]', r"a.json:3: 'text' is empty"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', r"a.json:2: is not valid JSON"),
        ("a.json", '[{"text": "a"}\n', r"a.json:1: the record is not followed by"),
        ("a.json", '[{"text": "a"},\n', r"a.json:2: is not valid JSON"),
        ("a.json", '[{"text": "a"}] x', r"a.json: holds more than its list"),
        ("a.json", b"[\xff", r"a.json: is not UTF-8"),
        ("a.parquet", "PAR1 no", r"a.parquet: is not a readable Parquet file"),
        ("a.txt", "text\na", r"a.txt': is no kind of file that is read"),
    ],
)
def test_broken_files_name_their_place(tmp_path, tokenizer, name, content, named):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=named) as caught:
        load_job_data(job(tmp_path / name, type="text"), tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").glob("*"))


def test_errors_name_a_file_once_however_its_path_is_written(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), [{"text": "ok"}, {"text": ""}])
    for path in ("./a.jsonl", ".//a.jsonl", "./*.jsonl"):
        with pytest.raises(UserError, match="^a.jsonl:2: 'text' is empty"):
            load_job_data(job(path, type="text"), tokenizer, tmp_path / "cache")
        dropped = load_job_data(job(path, type="text", bad_rows="drop"), tokenizer, tmp_path / "cache")
        assert dropped.bad == ("a.jsonl:2: 'text' is empty; remove the record or complete it",)


def test_json_may_be_laid_out_in_any_way(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf \n[ {"a":\n 1}\n ,{"a": 2} ,\n{"a": 3}\n ]\n')
    assert list(read_records(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2}), (f"{path}:5", {"a": 3})]


def test_missing_files_and_a_missing_pyarrow(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere.jsonl': no such file in"):
        load_job_data(job(tmp_path / "nowhere.jsonl"), tokenizer, tmp_path / "cache")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the package pyarrow; pip install pyarrow"):
        load_job_data(job(tmp_path / "a.parquet"), tokenizer, None)


# ---- ids, cuts, counts ----


def test_ids_are_rows_of_the_concatenated_files_before_anything_is_dropped(tmp_path, tokenizer):
    first, second = write(tmp_path / "1.jsonl", PAIRS), write(tmp_path / "2.json", PAIRS[::-1])
    loaded = load_job_data(job(first, second, sequence_len=6), tokenizer, None)
    # "abcdef" + "x" has no target among its first six tokens; "a" + "long answer" keeps five.
    assert [sample.record for sample in loaded.samples] == [0, 2, 3, 5]
    assert texts(tokenizer, loaded) == ["abcd</s>", "along ", "along ", "abcd</s>"]
    assert (loaded.num_truncated, loaded.num_dropped) == (2, 2)
    assert loaded.describe() == "4 samples, 22 tokens, 16 targets, 2 cut at sequence_len, 2 dropped: no target before the cut"
    assert loaded.samples[1].targets.tolist() == [False, True, True, True, True, True]


def test_a_sample_of_just_the_right_length_is_whole(tmp_path, tokenizer):
    loaded = load_job_data(job(write(tmp_path / "a.jsonl", PAIRS[:1]), sequence_len=5), tokenizer, None)
    assert (loaded.samples.lengths.tolist(), loaded.num_truncated, loaded.num_dropped) == ([5], 0, 0)


def test_a_cut_that_leaves_nothing_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"jobs.j.sequence_len: 2 leaves no target token in any of the 1 records of its datasets; raise it"):
        load_job_data(job(write(tmp_path / "a.jsonl", PAIRS[:1]), sequence_len=2), tokenizer, None)


def test_tokens_beyond_the_base_model_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", PAIRS)
    load_job_data(job(path), tokenizer, None, vocab_size=257)
    with pytest.raises(UserError, match="gives token 256 and base_model has 256"):
        load_job_data(job(path), tokenizer, None, vocab_size=256)


# ---- cache ----


@pytest.fixture
def count_reads(monkeypatch):
    """Count how often files are tokenised."""
    reads = []
    monkeypatch.setattr(dataset_sources, "read_blocks", lambda path: reads.append(str(path)) or row_files.read_blocks(path))
    return reads


def same(one, other):
    return [(s.record, s.tokens.tolist(), s.targets.tolist()) for s in one.samples] == [
        (s.record, s.tokens.tolist(), s.targets.tolist()) for s in other.samples
    ] and (one.num_truncated, one.num_dropped) == (other.num_truncated, other.num_dropped)


def test_a_dataset_is_tokenised_once(tmp_path, tokenizer, count_reads):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"
    first, twin = load_jobs_data([job(path, sequence_len=6), job(path, sequence_len=6)], tokenizer, cache)
    assert len(count_reads) == 1 and same(first, twin)
    shutil.copy(path, tmp_path / "copy.jsonl")
    assert same(first, load_job_data(job(tmp_path / "copy.jsonl", sequence_len=6), tokenizer, cache))
    assert len(count_reads) == 1
    assert len(list(cache.iterdir())) == 1


def test_whatever_changes_the_tokens_is_another_dataset(tmp_path, tokenizer, count_reads):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"
    load_job_data(job(path), tokenizer, cache)
    load_job_data(job(path, train_on_inputs=True), tokenizer, cache)
    load_job_data(job(path, sequence_len=6), tokenizer, cache)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="a")
    load_job_data(job(path), other, cache)
    write(path, PAIRS[:2])
    load_job_data(job(path), tokenizer, cache)
    assert len(count_reads) == 5


@pytest.mark.parametrize("change", ["", "# a comment\n", "X = 1\n"])
def test_other_sources_make_another_dataset(tmp_path, change, monkeypatch):
    room = shutil.copytree(token_cache.__file__.rpartition("/")[0], tmp_path / "data")
    before = source_digest(room)
    for name in ("chat_turns.py", "row_formats.py", "text_tokens.py", "row_files.py", "token_cache.py"):
        source_digest.cache_clear()
        file = room / name
        content = file.read_text()
        file.write_text(content + change)
        assert (source_digest(room) == before) == (change == "")
        file.write_text(content)
    source_digest.cache_clear()
    (room / "a_new_module.py").write_text("")
    assert source_digest(room) != before
    source_digest.cache_clear()
    assert source_digest() == before, "the key is made from the sources that run"
    key = token_cache.dataset_key("content", "tokenizer", "text")
    monkeypatch.setattr(token_cache, "source_digest", lambda: "others")
    assert token_cache.dataset_key("content", "tokenizer", "text") != key


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "jinja2"])
def test_other_versions_of_what_tokenises_make_another_dataset(tokenizer, monkeypatch, package):
    before = fingerprint(tokenizer)
    version = token_cache.version
    monkeypatch.setattr(token_cache, "version", lambda name: "0.0" if name == package else version(name))
    assert fingerprint(tokenizer) != before


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:-3] + b"\x7f" + b[-2:], lambda b: b"\xff" * len(b)])
def test_a_damaged_cache_is_made_again(tmp_path, tokenizer, count_reads, damage):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"
    first = load_job_data(job(path), tokenizer, cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.unlink()  # the first samples stay mapped
    entry.write_bytes(damage(whole))
    assert same(first, load_job_data(job(path), tokenizer, cache))
    assert len(count_reads) == 2 and entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set MEGATRON_LORA_CACHE to a directory that you may write"):
        load_job_data(job(write(tmp_path / "a.jsonl", PAIRS)), tokenizer, tmp_path / "file" / "cache")


# ---- tokenizers ----


def test_tokenizers_that_cannot_be_used(tmp_path, tokenizer):
    with pytest.raises(UserError, match="base_model: .*nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model")("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="base_model: the tokenizer in .*empty cannot be loaded") as caught:
        load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(caught.value)


# ---- preview ----


def test_preview_shows_what_training_sees(tmp_path, tokenizer):
    first, second = write(tmp_path / "1.jsonl", PAIRS[:2]), write(tmp_path / "2.jsonl", PAIRS)
    whole, cut, other = preview_records(job(first, second, sequence_len=6), tokenizer, num_records=3)
    assert show_preview(whole, color=False) == f"{first}:1 (record 0): 5 tokens, 3 targets\nab«cd</s>»\n"
    assert show_preview(cut, color=False).startswith(f"{first}:2 (record 1): 6 tokens, cut from 8, 0 targets; dropped")
    assert (other.where, other.record) == (f"{second}:1", 2)
    assert whole.token_texts[2] == (tokenizer.convert_tokens_to_ids("c"), "c", True)
    assert "\x1b[1;32mcd</s>\x1b[0m" in show_preview(whole, color=True)
