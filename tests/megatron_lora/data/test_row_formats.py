"""Tokens and targets of every format and of chat templates as they are in the wild, against masks written by hand.

Targets stand between « and », so that an expectation reads as what the model is trained to say.
"""

import itertools

import pytest
from byte_tokenizer import make_tokenizer

from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.errors import UserError

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in c %}{% set thought = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.last %}{% set c = '<think>\n' + thought + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def chatml(**options):
    return make_tokenizer(CHATML, added=("<|im_start|>",), eos="<|im_end|>", **options)


def marked(tokenizer, record, format, train_on_inputs=False):
    """Show a record's text with its targets between « and »."""
    encoded = RecordEncoder(tokenizer).encode(record, format, train_on_inputs, "rows.jsonl:7")
    pieces = zip(tokenizer.convert_ids_to_tokens(encoded.tokens.tolist()), encoded.targets.tolist(), strict=True)
    text = ""
    for target, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        run = "".join(token for token, _ in run)
        text += f"«{run}»" if target else run
    return text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")


def chat(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return {"messages": [{"role": role, "content": content} for role, content in zip(itertools.cycle(roles), contents, strict=False)]}


# ---- text, prompt_completion, alpaca ----


def test_text_gets_its_special_tokens_and_one_eos():
    plain, with_bos = make_tokenizer(), make_tokenizer(bos="<s>", adds_bos=True)
    assert marked(plain, {"text": "abc"}, "text") == "a«bc</s>»"
    assert marked(plain, {"text": "abc</s>"}, "text") == "a«bc</s>»"
    assert marked(with_bos, {"text": "abc"}, "text") == "<s>«abc</s>»"


def test_prompt_and_completion_are_one_text():
    tokenizer = make_tokenizer(bos="<s>", adds_bos=True, merges=[("b", "c")])
    record = {"prompt": "ab", "completion": "cd"}
    assert marked(tokenizer, record, "prompt_completion") == "<s>abc«d</s>»"
    ids = RecordEncoder(tokenizer).encode(record, "prompt_completion", False, "").tokens
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<s>", "a", "bc", "d", "</s>"]
    assert marked(tokenizer, record, "prompt_completion", train_on_inputs=True) == "<s>«abcd</s>»"
    assert marked(tokenizer, {"prompt": "", "completion": "cd"}, "prompt_completion") == "<s>«cd</s>»"
    assert marked(make_tokenizer(), {"prompt": "", "completion": "cd"}, "prompt_completion") == "c«d</s>»"


def test_alpaca_uses_stanfords_two_templates():
    tokenizer = make_tokenizer()
    bare = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd {1}\n\n### Response:«2</s>»"
    )
    for record in ({"instruction": "add {1}", "output": "2"}, {"instruction": "add {1}", "input": "", "output": "2"}):
        assert marked(tokenizer, record, "alpaca") == bare
    assert marked(tokenizer, {"instruction": "add", "input": "1 1", "output": "2"}, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Input:\n1 1\n\n### Response:«2</s>»"
    )


# ---- chat templates ----


def test_chatml_with_a_default_system_prompt():
    assert marked(chatml(), chat("hi", "ok!", "more", "yes"), "messages") == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«ok!<|im_end|>»\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n"
    )


def test_sharegpt_is_the_same_conversation():
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok!"}]
    same = chat("S", "hi", "ok!", first="system")
    assert marked(chatml(), {"conversations": turns}, "sharegpt") == marked(chatml(), same, "messages")
    assert marked(chatml(), same, "messages").endswith("<|im_start|>assistant\n«ok!<|im_end|>»\n")


def test_training_on_inputs_leaves_out_the_first_token_only():
    text = marked(chatml(), chat("hi", "ok"), "messages", train_on_inputs=True)
    assert text.startswith("<|im_start|>«system\n") and text.endswith("ok<|im_end|>\n»") and text.count("«") == 1
    assert "«user" not in marked(chatml(), {"messages": [{"role": "user", "content": "a"}]}, "messages", train_on_inputs=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("user", "«user<|im_end|>»"),  # the same text as a prompt's and a header's
        ("assistant\n", "«assistant\n<|im_end|>»"),
        ("turn0 turn1", "«turn0 turn1<|im_end|>»"),  # the finder's own marker
        ("<|im_end|>", "«<|im_end|><|im_end|>»"),
        ("\n\n x \n", "«\n\n x \n<|im_end|>»"),
    ],
)
def test_awkward_contents(content, expected):
    assert marked(chatml(), chat("turn0", content), "messages").endswith(f"<|im_start|>assistant\n{expected}\n")


def test_characters_of_several_tokens():
    tokenizer = chatml()
    encoded = RecordEncoder(tokenizer).encode(chat("é", "né 🙂"), "messages", False, "")
    ids, targets = encoded.tokens, encoded.targets
    assert tokenizer.decode(ids[targets]) == "né 🙂<|im_end|>"
    assert targets.sum() == 1 + 2 + 1 + 4 + 1


def test_llama3_trims_and_the_date_stands_still():
    tokenizer = make_tokenizer(LLAMA3, added=("<|start|>", "<|end|>", "<|eot|>"), bos="<s>", adds_bos=True)
    assert marked(tokenizer, chat("  hi ", "  ok\n"), "messages") == (
        "<s>26 Jul 2024<|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n«ok<|eot|>»"
    )


def test_mistral_trains_the_word_that_carries_the_space():
    tokenizer = make_tokenizer(MISTRAL, merges=[("▁", "y"), ("e", "s"), ("▁y", "es")], bos="<s>", words=True)
    assert marked(tokenizer, chat("go", "yes", "a", "yes yes"), "messages").replace(" ", "_") == (
        "<s>[INST]_go_[/INST]«_yes</s>»[INST]_a_[/INST]«_yes_yes</s>»"
    )
    encoded = RecordEncoder(tokenizer).encode(chat("go", "yes"), "messages", False, "")
    ids, targets = encoded.tokens, encoded.targets
    assert tokenizer.convert_ids_to_tokens(ids[targets].tolist()) == ["▁yes", "</s>"]


def test_tokens_that_merge_across_the_border():
    merges = [("\u010a", "o"), ("k", "!"), ("x", "Ċ")]
    # "\no" begins in the header, so it is the header's; "x\n" begins in the content, so it is the content's.
    assert marked(chatml(merges=merges), chat("q", "ok!"), "messages").endswith("assistant\no«k!<|im_end|>»\n")
    assert marked(make_tokenizer(NO_END, merges=merges), chat("q", "x"), "messages") == "user: q\nassistant: «x\n»"

    # All that the template writes between a content and the next turn ends the turn, merged or not.
    bracketed = "{% for m in messages %}{{ '[' + m['content'] + ']' + eos_token }}{% endfor %}"
    assert marked(make_tokenizer(bracketed), chat("q", "ab"), "messages") == "[q]</s>[«ab]</s>»"
    assert marked(make_tokenizer(bracketed, merges=[("b", "]")]), chat("q", "ab"), "messages") == "[q]</s>[«ab]</s>»"


def test_thoughts_are_trained_where_the_template_shows_them():
    tokenizer = make_tokenizer(QWEN3, added=("<|im_start|>",), eos="<|im_end|>")
    thinking = "<think>\nhm\n</think>\n\nyes"
    assert marked(tokenizer, chat("a", thinking, "b", thinking), "messages") == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nyes<|im_end|>»\n"
    )
    assert marked(tokenizer, chat("a", "yes"), "messages").endswith("assistant\n<think>\n\n</think>\n\n«yes<|im_end|>»\n")


def test_an_end_of_turn_token_may_stand_off_or_open_the_next_turn_or_be_absent():
    apart = make_tokenizer("{% for m in messages %}{{ '[' + m['content'] + ' ' + eos_token + bos_token }}{% endfor %}", bos="<s>")
    assert marked(apart, chat("q", "a"), "messages") == "[q </s><s>[«a </s>»<s>"
    opening = make_tokenizer(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}", added=("<|user|>", "<|assistant|>")
    )
    assert marked(opening, chat("q", "a", "r", "b"), "messages") == "<|user|>q<|assistant|>«a<|user|>»r<|assistant|>«b»"
    begin = make_tokenizer("{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}", bos="<s>")
    assert marked(begin, chat("q", "a", "r"), "messages") == "<s>q<s>«a»<s>r"
    assert marked(make_tokenizer(NO_END), chat("q", "a"), "messages") == "user: q\nassistant: «a»\n"


def test_an_empty_turn_among_others_is_trained_to_end():
    text = marked(chatml(), chat("a", "", "b", "yes"), "messages")
    assert "assistant\n«<|im_end|>»\n<|im_start|>user" in text and text.endswith("«yes<|im_end|>»\n")


# ---- refusals ----


@pytest.mark.parametrize(
    ("format", "record", "named"),
    [
        ("text", {"text": " \n"}, "'text' is empty"),
        ("text", {"prompt": "a"}, r"has no 'text' \(it has 'prompt'\)"),
        ("text", {"text": 3}, "'text' is 3; write it as text"),
        ("text", {"text": "\ud800"}, "half of a character"),
        ("prompt_completion", {"prompt": "a"}, "has no 'completion'"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
        ("alpaca", {"instruction": "", "output": "a"}, "'instruction' is empty"),
        ("alpaca", {"instruction": "a", "input": 1, "output": "a"}, "'input' is 1"),
        ("messages", {"conversations": []}, "has no 'messages'"),
        ("messages", {"messages": []}, "'messages' is empty"),
        ("messages", {"messages": "hi"}, "write a list of turns"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no assistant turn that is trained has content"),
        ("messages", chat("a", " "), "no assistant turn that is trained has content"),
        ("messages", {"messages": [{"role": "bot", "content": "a"}]}, "'role' is 'bot'; use one of system,"),
        ("messages", {"messages": [{"role": "user"}]}, "has no 'content'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'content' has a part of type 'image'"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}]}, r"a call is \{\"a\": 1\}; write"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "'weight' of a turn is 0.5; use 0 or 1"),
        ("messages", {**chat("a", "b"), "images": ["a.png"]}, "'images' of a record is not supported"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "'from' is 'alien'; use one of system, developer"),
    ],
)
def test_records_that_cannot_be_trained_on(format, record, named):
    with pytest.raises(UserError, match=rf"^rows.jsonl:7: .*{named}") as caught:
        marked(chatml(), record, format)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "record", "named"),
    [
        (
            MISTRAL,
            chat("s", "q", "a", first="system"),
            "refuses this conversation of system, user, assistant: Conversation roles must alternate",
        ),
        (MISTRAL, chat("q", "a") | {"messages": [{"role": "assistant", "content": "a"}]}, "of assistant: Conversation roles must"),
        ("{{ messages[0]['content'] }}", chat("q", "a"), "does not show message 2 once"),
        ("{{ messages[1]['content'] * 2 }}", chat("q", "a"), "does not show message 2 once"),
        ("{% for m in messages %}{{ m['content'] }}", chat("q", "a"), "refuses this conversation"),
    ],
)
def test_templates_that_do_not_take_a_conversation(template, record, named):
    with pytest.raises(UserError, match=f"^rows.jsonl:7: .*{named}"):
        marked(make_tokenizer(template, bos="<s>"), record, "messages")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        RecordEncoder(tokenizer)
