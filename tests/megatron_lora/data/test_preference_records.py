"""Pairs of every form of record against masks written by hand; both answers keep the same prompt when they are cut."""

import json
from unittest import mock

import numpy as np
import pytest
from byte_tokenizer import make_tokenizer

from megatron_lora.commands.preview import preview_records, show_preview
from megatron_lora.config.objective_keys import objective
from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.sample_arrays import JobSamples, Sample, Samples
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.steps import job_steps
from megatron_lora.errors import UserError
from megatron_lora.training.job_checks import check_lengths, check_pairs

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
USER = {"role": "user", "content": "hi"}


def says(text):
    return {"role": "assistant", "content": text}


def masked(tokenizer, tokens, targets) -> str:
    text, inside = "", False
    for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        text += ("«" if target else "»") * (target != inside) + tokenizer.decode([token])
        inside = target
    return text + "»" * inside


def both(record, format="preference", tokenizer=None):
    tokenizer = tokenizer or make_tokenizer(CHATML, added=("<|im_start|>",), eos="<|im_end|>")
    pair = RecordEncoder(tokenizer).encode(record, format, False, "f:1")
    parts = slice(0, pair.border), slice(pair.border, None)
    return [masked(tokenizer, pair.tokens[part], pair.targets[part]) for part in parts], pair


CHAT = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«{}<|im_end|>»\n"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]},
        {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},  # the prompt is what they begin with
        {"prompt": "hi", "chosen": [USER, says("yes")], "rejected": [USER, says("no")], "score_chosen": 8.5},
        {"prompt": "hi", "chosen": [says("yes")], "rejected": [says("no")]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
    ],
)  # fmt: skip
def test_turns(record):
    found, pair = both(record)
    assert found == [CHAT.format("yes"), CHAT.format("no")]
    assert pair.num_prompt == len(pair.tokens[: pair.border]) - len("yes") - 2


def test_texts():
    plain = make_tokenizer(None, eos="</s>")
    expected = ["Q: «yes</s>»", "Q: «no</s>»"]
    for record in (
        {"prompt": "Q: ", "chosen": "yes", "rejected": "no"},
        {"question": "Q: ", "chosen_response": "yes", "rejected_response": "no", "id": 3},
    ):
        assert both(record, tokenizer=plain)[0] == expected
    assert both({"chosen": "Q: yes", "rejected": "Q: no"}, tokenizer=plain)[0] == ["Q:« yes</s>»", "Q:« no</s>»"]  # as TRL has it
    chat = {"system": "Be kind", "question": "hi", "chosen": "yes", "rejected": "no"}
    assert both(chat, "preference_chat")[0] == [CHAT.format("yes"), CHAT.format("no")]
    assert "'score' is not used" in both({"prompt": "Q", "chosen": "a", "rejected": "b", "score": 1}, tokenizer=plain)[1].notes[0]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt": "another"}, "prompt"),
        ({"question": "another"}, "question"),
        ({"prompt": USER["content"]}, None),
        ({"prompt": [USER], "completion": "another"}, "completion"),
        ({"prompt": "another", "messages": [USER], "chosen": [says("yes")], "rejected": [says("no")]}, "prompt"),
    ],
)
def test_a_prompt_that_turns_do_not_begin_with_is_named(fields, name):
    record = {"chosen": [USER, says("yes")], "rejected": [USER, says("no")], **fields}
    assert both(record)[1].notes == ((f"field {name!r} is not used",) if name else ())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "are the same; remove the record"),
        ({"prompt": "Q", "chosen": "a"}, "has no 'rejected'"),
        ({"prompt": "Q", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "Q", "chosen": "a", "rejected": [says("b")]}, "are a text and a list of turns"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "system": "S"}, "'system' is not used by this type"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "weight": 0}, "'weight' is 0; write a number"),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "add a 'prompt'"),
        ({"prompt": [USER], "chosen": [USER, says("a")], "rejected": [says("b")]}, "do not begin with one prompt"),
        ({"prompt": [USER], "chosen": [says("a")], "rejected": [says("")]}, "'rejected' has no assistant turn with content"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_a_line(record, words):
    with pytest.raises(UserError, match=words) as refused:
        both(record)
    assert "\n" not in str(refused.value)


def test_a_cut_takes_the_same_prompt_from_both_and_then_the_ends_of_the_answers():
    prompt = np.arange(10, dtype=np.int32)
    chosen, rejected = np.arange(20, 24, dtype=np.int32), np.arange(30, 32, dtype=np.int32)
    tokens = np.concatenate([prompt, chosen, prompt, rejected])
    targets = np.concatenate([np.zeros(10, bool), np.ones(4, bool), np.zeros(10, bool), np.ones(2, bool)])
    pair = Encoded(tokens, targets, border=14, num_prompt=10)
    assert pair.cut(14) is pair
    for length, kept, first, second in ((9, 5, chosen, rejected), (3, 1, chosen[:2], rejected)):
        cut = pair.cut(length)
        assert cut.tokens[: cut.border].tolist() == [*prompt[-kept:], *first] and cut.targets[: cut.border].sum() == len(first)
        assert cut.tokens[cut.border :].tolist() == [*prompt[-kept:], *second] and cut.num_prompt == kept and cut.trains
    same = Encoded(np.concatenate([prompt, [5, 6], prompt, [5, 7]]).astype(np.int32), np.array(([0] * 10 + [1] * 2) * 2, bool), (), 12, 10)
    assert same.trains and not same.cut(2).trains  # the answers differ in what was cut


def job(path, **settings):
    objective = settings.pop("objective", JobConfig.__dataclass_fields__["objective"].metadata["rule"]("o", {"type": "dpo"}))
    kind = settings.pop("type", "preference")
    return JobConfig(name="a", seed=0, datasets=(DatasetConfig(path=str(path), type=kind),), objective=objective, **settings)


def test_pairs_are_counted_kept_and_shown_with_both_masks(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "abcdef", "chosen": "xxxy", "rejected": "xx"}\n{"prompt": "abcdef", "chosen": "xa", "rejected": "xb"}\n')
    tokenizer = make_tokenizer(None, eos="</s>")
    for length, text in ((20, "2 pairs, 38 tokens"), (6, "2 pairs, 22 tokens"), (2, "0 pairs")):
        if length == 2:
            with pytest.raises(UserError, match="leaves no target token"):
                load_jobs_data([job(file, sequence_len=length)], tokenizer, tmp_path / "cache")
            continue
        for _ in range(2):  # made, then read from the cache
            (data,) = load_jobs_data([job(file, sequence_len=length)], tokenizer, tmp_path / "cache")
            assert data.describe().startswith(text), data.describe()
            assert data.samples[0].pair_targets == (5, 3) and data.samples.num_chosen.tolist() == [5, 3]
    shown = show_preview(preview_records(job(file, sequence_len=7), tokenizer)[0], color=False)
    assert "chosen: ef«xxxy</s>»\nrejected: ef«xx</s>»" in shown and "cut from 20" in shown


def test_lengths_are_pairs_where_the_objective_takes_pairs(tmp_path):
    file = tmp_path / "lengths.jsonl"
    file.write_text('{"chosen": 9, "rejected": 6, "targets": 4}\n')
    pairs = job(file, type="lengths")
    (data,) = load_jobs_data([pairs], None, None, 50)
    assert data.samples[0].lengths == (9, 6) and data.samples[0].pair_targets == (4, 4)
    check_pairs(pairs, data)
    with pytest.raises(UserError, match="is a pair, and the job's objective is sft"):
        check_pairs(job(file, type="lengths", objective="sft"), data)


def test_labelled_answers_have_a_label_and_are_joined_with_each_other(tmp_path):
    plain = make_tokenizer(None, eos="</s>")
    rows = [{"prompt": "Q: ", "completion": "yes", "label": True}, {"prompt": "Why? ", "completion": "no", "label": "false", "weight": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = JobConfig(name="j", objective=objective("o", "kto"), datasets=(DatasetConfig(path=str(tmp_path / "a.jsonl"), type="kto"),))
    (data,) = load_jobs_data([job], plain, tmp_path / "cache")
    samples = data.samples
    assert [masked(plain, sample.tokens, sample.targets) for sample in samples] == ["Q: «yes</s>»", "Why? «no</s>»"]
    assert samples.weights.tolist() == [1.0, -3.0] and samples.num_prompt.tolist() == [3, 5]
    batch = np.array([0, 1])
    for k, expected in enumerate(("Q: «no</s>»", "Why? «yes</s>»")):
        found = samples.mismatched(batch, k, 100)
        assert masked(plain, found.tokens, found.targets) == expected
        assert samples.mismatched_lengths(batch, np.array([2]), 100)[k] == len(found)
        assert len(samples.mismatched(batch, k, 4)) == 4 == samples.mismatched_lengths(batch, np.array([2]), 4)[k]
    assert samples.longest_mismatched(100) == len("Why? ") + len("yes") + 1
    assert [record.spans[0][1] for record in preview_records(job, plain)] == ["desirable: ", "undesirable: "]
    with pytest.raises(UserError, match="microbatch_tokens: 8 is less than the 9 tokens of the longest prompt"):
        check_lengths(job, data, 8, mock.Mock(max_positions=100))
    conversation = {"prompt": [USER], "completion": [says("yes")], "label": 0}
    chat = RecordEncoder(make_tokenizer(CHATML, added=("<|im_start|>",), eos="<|im_end|>")).encode(conversation, "kto", False, "f:1")
    assert chat.weight == -1 and chat.num_prompt == int(chat.targets.argmax())
    for label, words in ((None, "has no 'label'"), ("good", "'label' is \"good\"; write true")):
        bad = {"prompt": "Q", "completion": "a", **({} if label is None else {"label": label})}
        with pytest.raises(UserError, match=words):
            RecordEncoder(plain).encode(bad, "kto", False, "f:1")


def test_the_steps_of_a_job_join_the_answers_of_one_batch_alone():
    samples = Samples.of(Sample(i, np.arange(3 + 2 * i, dtype=np.int32), np.arange(3 + 2 * i) > i, num_prompt=i + 1) for i in range(5))
    job = JobSamples(seed=0, samples=samples, steps=job_steps(5, 2, 2, None, True, 0), longest=9)
    for step, lengths in enumerate(job.mismatched_lengths()):
        batch = job.steps.batch(step)
        assert lengths == [len(samples.mismatched(batch, k, 9)) for k in range(len(batch))]


@pytest.mark.parametrize("format", ["kto", "prompt_completion"])
def test_turns_without_a_chat_template_are_refused(format):
    record = {"prompt": [USER], "completion": [says("yes")], **({"label": True} if format == "kto" else {})}
    with pytest.raises(UserError, match="f:1: is a conversation, and the base model's tokenizer has no chat template; use an instruct"):
        RecordEncoder(make_tokenizer()).encode(record, format, False, "f:1")


def test_margins_of_validation_answers_need_both_labels(tmp_path):
    both_labels, one = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)], tmp_path / "one.jsonl"
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(record) + "\n" for record in both_labels))
    one.write_text(json.dumps(both_labels[1]) + "\n")
    for file, metric, refused in (
        (one, "eval_rewards/margins", True),
        (one, "eval_loss", False),
        (tmp_path / "both.jsonl", "eval_rewards/margins", False),
    ):
        held = [DatasetConfig(path=str(path), type="kto") for path in (tmp_path / "both.jsonl", file)]
        job = JobConfig(name="a", datasets=held[:1], val_datasets=held[1:], objective=objective("", "kto"), metric=metric)
        (data,) = load_jobs_data([job], make_tokenizer(), tmp_path / "cache")
        if refused:
            with pytest.raises(
                UserError, match="jobs.a.metric: eval_rewards/margins is the difference of both labels, and all 1 .* label false"
            ):
                check_pairs(job, data)
        else:
            check_pairs(job, data)
