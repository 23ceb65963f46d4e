"""Validation data: drawn by the seed alone or read from files of their own, never trained on; and when a job is evaluated."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.evaluation import draw_validation, evaluation_steps
from megatron_lora.data.samples import JobData, load_jobs_data, read_all_records
from megatron_lora.data.steps import job_steps
from megatron_lora.errors import UserError

VOCABULARY = 97


def lengths_file(path, lengths) -> DatasetConfig:
    path.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in lengths))
    return DatasetConfig(path=str(path), type="lengths")


def job(*datasets, **keys) -> JobConfig:
    return JobConfig(name="j", datasets=datasets, **({"seed": 3} | keys))


def pairs(path) -> tuple[DatasetConfig, ...]:
    return (DatasetConfig(path=str(path), type="prompt_completion"),)


def load(asked: JobConfig) -> JobData:
    return load_jobs_data([asked], None, None, VOCABULARY)[0]


def records_of(data: JobData | None) -> list[int]:
    assert data is not None
    return [sample.record for sample in data.samples]


@pytest.mark.parametrize(("size", "drawn"), [(0.1, 4), (0.001, 1), (7, 7), (39, 39)])
def test_a_share_or_a_number_of_the_records_is_held_out(tmp_path, size, drawn):
    files = lengths_file(tmp_path / "a.jsonl", range(5, 30)), lengths_file(tmp_path / "b.jsonl", range(40, 55))
    whole, data = load(job(*files)), load(job(*files, val_set_size=size))
    held_out, trained = records_of(data.validation), records_of(data)
    assert len(held_out) == drawn and sorted(held_out + trained) == list(range(40)) and trained == sorted(trained)
    for part in (data, data.validation):
        for index, sample in enumerate(part.samples):  # each is the record's sample, under the number that it has in all data
            assert np.array_equal(sample.tokens, whole.samples[sample.record].tokens)
            assert (len(sample), sample.targets.sum()) == (part.samples.lengths[index], part.samples.num_targets[index])
            assert np.array_equal(part.samples[index - len(part.samples)].tokens, sample.tokens)
    assert data.mixture.sizes == (sum(record < 25 for record in trained), sum(record >= 25 for record in trained))
    steps = data.steps_of(job(*files, val_set_size=size, num_epochs=2))
    visited = {data.samples[index].record for step in steps.steps for _, index in step}
    assert visited == set(trained)


def test_the_draw_depends_on_the_seed_and_the_number_of_records_alone(tmp_path):
    drawn = draw_validation(1000, 0.2, seed=5)
    assert drawn.sum() == 200 and np.array_equal(drawn, draw_validation(1000, 200, seed=5))
    assert 20 < (drawn & draw_validation(1000, 0.2, seed=6)).sum() < 65, "another seed draws others"
    assert (draw_validation(1000, 50, seed=5) <= drawn).all()
    file = lengths_file(tmp_path / "a.jsonl", range(5, 30))
    asked = job(file, val_set_size=5)
    others = [dataclasses.replace(asked, name=name, seed=seed) for name, seed in (("x", 1), ("y", 3))]
    datas = load_jobs_data([*others, asked], None, None, VOCABULARY)
    first, second, third = (records_of(data.validation) for data in datas)
    assert second == third != first
    cut = load(dataclasses.replace(asked, sequence_len=8))  # the draw is of records, before anything is cut or dropped
    assert records_of(cut.validation) == third


def test_dropped_records_keep_their_place_in_the_draw(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p" * (n % 3 * 20), "completion": "word"}) + "\n" for n in range(30)))
    asked = JobConfig(name="j", seed=0, datasets=pairs(path), val_set_size=10, sequence_len=32)
    (data,) = load_jobs_data([asked], tiny_tokenizer(), tmp_path / "cache")
    assert data.num_dropped and data.validation is not None
    drawn = np.flatnonzero(draw_validation(30, 10, 0)).tolist()
    assert records_of(data.validation) == [record for record in drawn if record % 3 < 2]
    assert not set(records_of(data)) & set(drawn)


def test_files_of_validation_are_read_like_those_of_training(tmp_path):
    train, validation = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "yes"}) + "\n" for n in range(4)))
    validation.write_text("".join(json.dumps({"prompt": "q", "completion": "n" * n}) + "\n" for n in (3, 40)))
    asked = JobConfig(name="j", seed=0, sequence_len=16, datasets=pairs(train), val_datasets=pairs(validation))
    (data,) = load_jobs_data([asked], tiny_tokenizer(), tmp_path / "cache")
    (trained,) = load_jobs_data([dataclasses.replace(asked, datasets=asked.val_datasets, val_datasets=())], tiny_tokenizer(), None)
    assert data.validation is not None and data.validation.num_truncated == 1 and len(data.samples) == 4
    assert data.validation.digest() == trained.digest()
    assert "; for validation 2 samples, " in data.describe() and "1 cut at sequence_len" in data.describe()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert read_all_records(asked, tiny_tokenizer(), tmp_path / "cache").describe() == data.describe()


def test_the_digest_covers_validation(tmp_path):
    file, other = lengths_file(tmp_path / "a.jsonl", range(5, 30)), lengths_file(tmp_path / "v.jsonl", [9])
    asked = [job(file), job(file, val_set_size=4), job(file, val_set_size=5), job(file, val_datasets=(other,))]
    assert len({load(each).digest() for each in asked}) == 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"val_set_size": 25}, "jobs.j.val_set_size: 25 of 25 records leaves no sample to train on; use another number"),
        ({"val_set_size": 99}, "jobs.j.val_set_size: 99 of 25 records leaves no sample to train on"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        load(job(lengths_file(tmp_path / "a.jsonl", range(5, 30)), **keys))


def test_validation_without_a_sample_is_refused(tmp_path):
    path, long = tmp_path / "a.jsonl", json.dumps({"prompt": "p" * 40, "completion": "x"}) + "\n"
    drawn = int(np.flatnonzero(draw_validation(5, 1, 0))[0])
    path.write_text("".join(long if n == drawn else json.dumps({"prompt": "p", "completion": "x"}) + "\n" for n in range(5)))
    asked = JobConfig(name="j", seed=0, datasets=pairs(path), val_set_size=1, sequence_len=16)
    with pytest.raises(UserError, match="jobs.j.val_set_size: 1 of 5 records leaves no sample for validation"):
        load_jobs_data([asked], tiny_tokenizer(), None)
    (tmp_path / "v.jsonl").write_text(long)
    own = dataclasses.replace(asked, val_set_size=0, val_datasets=pairs(tmp_path / "v.jsonl"))
    with pytest.raises(UserError, match="sequence_len: 16 leaves no target token in any of the 1 records of its val_datasets"):
        load_jobs_data([own], tiny_tokenizer(), None)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (3, 6, 9)),  # 9 samples in steps of 3: three epochs
        ({"max_steps": 7}, (3, 6, 7)),
        ({"eval_steps": 4}, (4, 8, 9)),
        ({"eval_steps": 3, "eval_on_start": True}, (0, 3, 6, 9)),
        ({"eval_steps": 100}, (9,)),
        ({"val_set_size": 0}, ()),
    ],
)
def test_evaluations_come_at_eval_steps_or_epochs_and_at_the_end(keys, expected):
    asked = JobConfig(name="j", datasets=(), **({"val_set_size": 0.1, "global_batch_size": 3, "num_epochs": 3} | keys))
    steps = job_steps(9, asked.global_batch_size, asked.num_epochs, asked.max_steps, True, 0)
    assert evaluation_steps(asked, steps) == expected
    for taken in range(10):  # of a job that resumes
        assert evaluation_steps(asked, steps, taken, due=False) == tuple(step for step in expected if step > taken)
        assert evaluation_steps(asked, steps, taken) == tuple(step for step in expected if step >= taken)
