"""Tokenising in blocks: the same result by one process and by several, in order, with little in memory; progress; kinds of bad records."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer
from worker_functions import process_id, slow_square

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data import row_files, tokenise, worker_pool
from megatron_lora.data.chat_template import ChatSettings
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.sample_arrays import Sample, Samples, digest_of
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.tokenise import first_of_each_kind
from megatron_lora.data.worker_pool import map_in_order
from megatron_lora.errors import UserError


def test_results_come_in_the_order_of_the_items_and_few_wait():
    given = []

    def items():
        for number in range(12):
            given.append(number)
            yield number

    found = []
    for number, square in map_in_order(slow_square, items(), 2):
        assert square == number * number and len(given) - len(found) <= 2 * worker_pool.AHEAD + 2
        found.append(number)
    assert found == list(range(12))


def test_what_a_worker_raises_is_raised_here_and_the_workers_end():
    found = []
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError: thirteen"):
        for number, _ in map_in_order(slow_square, range(20), 2):
            found.append(number)
    assert found == list(range(len(found))) and len(found) <= 13


def test_several_processes_work_and_end_with_the_loop():
    workers = set()
    for _, process in map_in_order(process_id, range(1000), 2):
        workers.add(process)
        if len(workers) == 2:
            break
    assert len(workers) == 2 and os.getpid() not in workers
    for process in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


# ---- records ----


@pytest.fixture
def job(tmp_path):
    """900 records of three blocks, some of them bad, cut, dropped or with fields that are noted."""
    path = tmp_path / "a.jsonl"
    records = [{"prompt": "p" * (i % 40), "completion": f"answer {i}"} | ({"grade": i} if i % 3 == 0 else {}) for i in range(900)]
    for i in range(5, 900, 100):
        records[i]["completion"] = ""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets = (DatasetConfig(path=str(path), type="prompt_completion"),)
    return JobConfig(name="j", datasets=datasets, bad_rows="drop", sequence_len=30)


def test_the_number_of_processes_changes_nothing(job, tmp_path, monkeypatch):
    alone = load_jobs_data([job], tiny_tokenizer(), None)[0]
    monkeypatch.setattr(row_files, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(tokenise, "POOL_BYTES", 0)
    monkeypatch.setattr(tokenise, "num_cores", lambda: 2)
    dealt = []
    monkeypatch.setattr(tokenise, "map_in_order", lambda *given: dealt.append(given[2]) or map_in_order(*given))
    together = load_jobs_data([job], tiny_tokenizer(), tmp_path / "cache")[0]
    assert dealt == [2] and digest_of(together.samples) == digest_of(alone.samples)
    assert (together.bad, dict(together.notes), together.num_bad) == (alone.bad, dict(alone.notes), 9)
    assert (together.num_truncated, together.num_dropped) == (alone.num_truncated, alone.num_dropped)
    assert alone.num_truncated > 0 < alone.num_dropped and alone.notes == {"field 'grade' is not used": 297}
    refusing = JobConfig(name="j", datasets=job.datasets, sequence_len=30)
    with pytest.raises(UserError, match="a.jsonl:6: 'completion' is empty"):
        load_jobs_data([refusing], tiny_tokenizer(), None)


def test_progress_says_how_long_the_rest_takes(job, monkeypatch, capfd):
    monkeypatch.setattr(row_files, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(tokenise, "FIRST_WORD_S", 0)
    monkeypatch.setattr(tokenise, "NEXT_WORD_S", 0)
    load_jobs_data([job], tiny_tokenizer(), None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) > 3 and all("a.jsonl: " in line and "% tokenised, about 0 min" in line for line in lines)


def test_a_digest_is_that_of_earlier_versions():
    samples = [Sample(3, np.arange(4, dtype=np.int32), np.arange(4) > 1), Sample(7, np.arange(2, dtype=np.int32), np.arange(2) > 0)]
    by_hand = hashlib.sha256()
    for sample in samples:
        by_hand.update(f"{sample.record} {len(sample)} ".encode() + sample.tokens.tobytes() + sample.targets.tobytes())
    assert digest_of(Samples.of(samples)) == digest_of(samples) == by_hand.hexdigest()
    assert digest_of(samples) == "cad76adbe68d748ac78236349e75b1f0f33dba16eb5233e972b1002f4cd8658d"


def test_samples_are_a_sequence():
    samples = Samples.of([Sample(i, np.arange(i + 1, dtype=np.int32), np.arange(i + 1) > 0) for i in range(3)])
    assert [sample.record for sample in samples] == [0, 1, 2] and samples[-1].record == 2 and len(samples) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"sample {index} of 3"):
            samples[index]


def test_errors_are_of_a_kind_by_field_and_remedy():
    errors = [f":{i}: 'a' is {i}; write it as text" for i in range(9)] + [":10: 'b' is 1; write it as text", ":11: 'a' is 1; remove it"]
    assert first_of_each_kind(errors) == [*errors[:3], *errors[9:]]
    many = [f":{i}: 'f{i}' is 1; remove it" for i in range(100)]
    assert first_of_each_kind(many) == many[: tokenise.MOST_BAD_KINDS]


def test_fields_without_end_do_not_fill_the_notes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "abc", f"field {i}": 1, "same": 1}) + "\n" for i in range(200)))
    asked = JobConfig(name="j", datasets=(DatasetConfig(path=str(path), type="text"),))
    notes = load_jobs_data([asked], tiny_tokenizer(), None)[0].notes
    assert len(notes) == tokenise.MOST_NOTES + 1 and notes["field 'same' is not used"] == 200 and notes["other notes"] == 151


def test_an_encoder_of_conversations_can_be_sent_to_a_process():
    tokenizer = tiny_tokenizer(template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    encoder = RecordEncoder(tokenizer, ChatSettings())
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    sent, own = (one.encode(record, "messages", False, "a:1") for one in (pickle.loads(pickle.dumps(encoder)), encoder))
    assert sent.tokens.tolist() == own.tokens.tolist() and sent.targets.tolist() == own.targets.tolist()
