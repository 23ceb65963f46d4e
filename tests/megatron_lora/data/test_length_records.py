"""Records of lengths: random tokens that are the same everywhere, the last of them targets, and no tokenizer."""

import json

import numpy as np
import pytest

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.sample_arrays import digest_of
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.tokenizer import tokenizer_for
from megatron_lora.errors import UserError

VOCABULARY = 97


def job(path, rows, **keys) -> JobConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JobConfig(name="j", datasets=(DatasetConfig(path=str(path), type="lengths"),), **keys)


def loaded_data(asked: JobConfig, tokenizer, cache, vocab_size):
    return load_jobs_data([asked], tokenizer, cache, vocab_size)[0]


def test_a_record_is_a_sample_of_its_length_whose_last_tokens_are_targets(tmp_path):
    asked = job(tmp_path / "a.jsonl", [{"tokens": 9, "targets": 3}, {"tokens": 5}, {"tokens": 9, "targets": 3}])
    assert tokenizer_for([asked], tmp_path / "nowhere") is None
    loaded = loaded_data(asked, None, None, VOCABULARY)
    assert loaded.samples.lengths.tolist() == [9, 5, 9] and [sample.targets.sum() for sample in loaded.samples] == [3, 4, 3]
    assert loaded.samples[0].targets.tolist() == [False] * 6 + [True] * 3 and not loaded.samples[1].targets[0]
    assert not np.array_equal(loaded.samples[0].tokens, loaded.samples[2].tokens), "records of one length differ"
    assert digest_of(loaded.samples) == digest_of(loaded_data(asked, None, tmp_path / "cache", VOCABULARY).samples)


def test_tokens_spread_over_the_whole_vocabulary(tmp_path):
    tokens = loaded_data(job(tmp_path / "a.jsonl", [{"tokens": 20_000}], sequence_len=20_000), None, None, VOCABULARY).samples[0].tokens
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY and counts.min() > 100 and counts.max() < 350


def test_cuts_and_train_on_inputs_are_those_of_all_rows(tmp_path):
    rows = [{"tokens": 30, "targets": 4}, {"tokens": 6, "targets": 1}]
    cut = loaded_data(job(tmp_path / "a.jsonl", rows, sequence_len=10), None, None, VOCABULARY)
    assert (cut.samples.lengths.tolist(), cut.num_dropped) == ([6], 1)
    every = loaded_data(job(tmp_path / "a.jsonl", rows, sequence_len=10, train_on_inputs=True), None, None, VOCABULARY)
    assert (every.samples.lengths.tolist(), every.num_truncated, every.num_targets) == ([10, 6], 1, 14)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": 1}, "'tokens' is 1; write a whole number from 2"),
        ({"targets": 3}, "'tokens' is null"),
        ({"tokens": 8, "targets": 8}, "'targets' is 8; write a whole number from 1 to 7"),
        ({"tokens": True}, "'tokens' is true"),
        ({"tokens": 8, "text": "a"}, "'text' is no field of a length"),
        ({"tokens": 8, "chosen": 9, "rejected": 6}, "'tokens' is no field of a pair"),
    ],
)
def test_what_is_no_length_is_one_line_with_its_place(tmp_path, row, says):
    with pytest.raises(UserError) as found:
        loaded_data(job(tmp_path / "a.jsonl", [{"tokens": 8}, row]), None, None, VOCABULARY)
    assert str(found.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ") and says in str(found.value)
