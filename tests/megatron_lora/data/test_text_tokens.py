"""Texts against transformers' own ids: bos and eos once each, whoever writes them, and the border between prompt and completion."""

import pytest
from tiny_tokenizers import tiny_tokenizer

from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.text_tokens import MERGED, REPEATED
from megatron_lora.errors import UserError

FAMILIES = {
    "adds nothing, as Qwen": {},
    "adds bos, as Llama 3": {"opening": ("<s>",)},
    "adds bos and marks words, as Llama 2": {"opening": ("<s>",), "words": True},
    "adds bos and eos": {"opening": ("<s>",), "closing": ("</s>",)},
    "adds eos alone": {"closing": ("</s>",)},
    "one token for both, as GPT-2": {"bos": "</s>"},
    "no bos": {"bos": None},
    "opens with two tokens, as GLM": {"opening": ("[gMASK]", "<sop>"), "bos": None},
    "closes with another token, as BERT": {"opening": ("[CLS]",), "closing": ("[SEP]",), "bos": None},
}


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return tiny_tokenizer(**FAMILIES[request.param])


def encode(tokenizer, record, format="prompt_completion"):
    return RecordEncoder(tokenizer).encode(record, format, False, "a.jsonl:3")


def once(tokenizer, text):
    """What transformers makes of a text, with eos at the end if it has none."""
    ids = tokenizer(text)["input_ids"]
    return ids if tokenizer.eos_token_id in ids[-1:] else [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["hello", "yes yes", " yes", "a </s> b", "né 🙂", "two\n\nlines"])
def test_a_plain_text_has_transformers_ids_and_one_eos(tokenizer, text):
    encoded = encode(tokenizer, {"text": text}, "text")
    assert encoded.tokens.tolist() == once(tokenizer, text)
    assert encoded.targets.tolist() == [False] + [True] * (len(encoded.tokens) - 1) and encoded.notes == ()


@pytest.mark.parametrize(
    "text", ["{0}hello{1}", "{0}{0}hello", " {0}hello", "hello{1}{1}", "hello{1}\n", "{0}hello{1} \n\n", "\n{0} {0}hello{1}"]
)
def test_a_text_that_writes_them_too_has_bos_and_eos_once(tokenizer, text):
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    encoded = encode(tokenizer, {"text": text.format(bos, eos)}, "text")
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
    assert tokens.count(eos) == 1 + (bos == eos and "{0}" in text) and tokens[-1] == eos
    if bos and bos != eos:
        wanted = int("{0}" in text or bos in tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"]))
        assert tokens.count(bos) == wanted
    inner = [token for token in tokens if token not in tokenizer.all_special_tokens]
    assert "".join(inner).strip("▁ĠĊ") == "hello"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Q:", " yes"), ("Q: ", "yes"), ("Q: y", "es"), ("", "yes"), ("a\n", "\nb"), ("Q:\n", "yes yes"), ("ne", "e!")],
)
def test_prompt_and_completion_have_the_ids_of_their_joined_text(tokenizer, prompt, completion):
    encoded = encode(tokenizer, {"prompt": prompt, "completion": completion})
    assert encoded.tokens.tolist() == once(tokenizer, prompt + completion)
    assert encoded.tokens.tolist().count(tokenizer.eos_token_id) == 1 and encoded.targets[-1] and not encoded.targets[0]
    trained = tokenizer.decode(encoded.tokens[encoded.targets], skip_special_tokens=True)
    if prompt:  # else the first token of the completion may be the first of the sample
        assert trained.strip() == {"es": "", "\nb": "b"}.get(completion, completion.strip())
        assert (MERGED in encoded.notes) == (completion == "es") or completion == "\nb"


def test_a_completion_that_begins_with_a_blank_gets_one():
    tokenizer = tiny_tokenizer(opening=("<s>",), words=True)
    for prompt, completion in (("Q:", " yes"), ("Q: ", "yes")):
        encoded = encode(tokenizer, {"prompt": prompt, "completion": completion})
        assert tokenizer.convert_ids_to_tokens(encoded.tokens[encoded.targets].tolist()) == ["▁yes", "</s>"]


def test_marks_at_the_outer_ends_of_prompt_and_completion_are_written_once():
    tokenizer = tiny_tokenizer(opening=("<s>",), closing=("</s>",))
    plain = encode(tokenizer, {"prompt": "Q:", "completion": "yes"})
    for prompt, completion in (("<s>Q:", "yes"), ("Q:", "yes</s>"), (" <s>Q:", "yes</s>\n"), ("<s><s>Q:", "yes</s></s>")):
        encoded = encode(tokenizer, {"prompt": prompt, "completion": completion})
        assert encoded.tokens.tolist() == plain.tokens.tolist() and encoded.targets.tolist() == plain.targets.tolist()
        assert encoded.notes == (REPEATED,)
    inside = encode(tokenizer, {"prompt": "Q</s><s>R", "completion": "yes"})
    assert tokenizer.convert_ids_to_tokens(inside.tokens.tolist()) == ["<s>", "Q", "</s>", "<s>", "R", "yes", "</s>"]


@pytest.mark.parametrize("completion", ["</s>", " </s>\n", "</s></s>"])
def test_a_completion_of_special_tokens_alone_is_refused(tokenizer, completion):
    with pytest.raises(UserError, match="a.jsonl:3: 'completion' gives no tokens but special ones; remove the record"):
        encode(tokenizer, {"prompt": "Q", "completion": completion})
    with pytest.raises(UserError, match="'text' gives no tokens but special ones"):
        encode(tokenizer, {"text": completion}, "text")


def test_a_completion_that_merges_into_the_prompt_is_said():
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, {"prompt": "Q: y", "completion": "es"}).notes == (MERGED,)
    assert encode(tokenizer, {"prompt": "Q: ", "completion": "yes"}).notes == ()
