"""No field of a record is ignored in silence: used, refused by name, harmless, or named in a note; and what alpaca makes of `system`."""

import pytest
from tiny_tokenizers import tiny_tokenizer

from megatron_lora.data.record_fields import HARMLESS, REFUSED
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.errors import UserError

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
RECORDS = {
    "text": {"text": "abc"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "alpaca_chat": {"instruction": "a", "output": "b"},
}


ENCODER = RecordEncoder(tiny_tokenizer(template=TEMPLATE))


def encode(record, format):
    return ENCODER.encode(record, format, False, "a.jsonl:3")


def decode(record, format):
    encoded, tokenizer = encode(record, format), tiny_tokenizer()
    return tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.tokens[encoded.targets])


@pytest.mark.parametrize("format", RECORDS)
@pytest.mark.parametrize("name", [*sorted(HARMLESS), "ID", "Source"])
def test_harmless_fields_say_nothing(format, name):
    assert encode({name: "x", **RECORDS[format]}, format).notes == ()


@pytest.mark.parametrize("format", RECORDS)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_fields_that_would_change_what_is_trained_are_refused(format, name):
    if name == "system" and format.startswith("alpaca"):
        return
    for spelled in (name, name.upper()):
        with pytest.raises(UserError, match=f"^a.jsonl:3: '{spelled}' is not used by this type of dataset; remove it"):
            encode({spelled: ["x"], **RECORDS[format]}, format)
    for nothing in (None, "", [], {}):
        assert encode({name: nothing, **RECORDS[format]}, format).notes == ()


@pytest.mark.parametrize("format", RECORDS)
def test_marks_that_ask_for_what_is_done_anyway_pass_and_others_are_refused(format):
    for name, value in (("weight", 1), ("weight", 1.0), ("train", True), ("loss", True)):
        encode({name: value, **RECORDS[format]}, format)
    others = [("sample_weight", 2), ("loss_scale", 0.1), ("Loss_Mask", [0]), ("prompt_mask", [1]), ("masked", True), ("trainable", False)]
    assert encode({"weight": 0.5, **RECORDS[format]}, format).weight == encode({"weight": "0.5", **RECORDS[format]}, format).weight == 0.5
    for value in (0, -1, "much", [2], 1e400, float("nan"), 1e-20):
        with pytest.raises(UserError, match="'weight' is .*; write a number from 1e-06 to 1e"):
            encode({"weight": value, **RECORDS[format]}, format)
    for name, value in (("train", False), ("loss", False), *others):
        with pytest.raises(UserError, match=f"'{name}' is not used"):
            encode({name: value, **RECORDS[format]}, format)


@pytest.mark.parametrize("format", RECORDS)
def test_every_other_field_is_named(format):
    others = {"question": "x", "score": 0, "é\n": 1, "x" * 100: 1}
    assert encode({**others, **RECORDS[format]}, format).notes == (
        "field 'question' is not used",
        "field 'score' is not used",
        "field 'é\\n' is not used",
        f"field '{'x' * 36}... is not used",
    )


def test_alpacas_system_prompt_opens_the_prompt():
    record = {"instruction": "add", "output": "2", "system": "Be brief."}
    assert decode(record, "alpaca") == ("Be brief.\n\n### Instruction:\nadd\n\n### Response:2</s>", "2</s>")
    assert decode({**record, "input": "1 1"}, "alpaca")[0].startswith(
        "Be brief.\n\n### Instruction:\nadd\n\n### Input:\n1 1\n\n### Response:"
    )
    assert decode({**record, "system": ""}, "alpaca")[0].startswith("Below is an instruction")


def test_alpaca_in_the_models_chat_template():
    record = {"instruction": "add", "output": "2"}
    assert decode(record, "alpaca_chat") == ("[user]add</s>[assistant]2</s>", "2</s>")
    assert decode({**record, "input": "1 1"}, "alpaca_chat") == ("[user]add\n1 1</s>[assistant]2</s>", "2</s>")
    assert decode({**record, "system": "Be brief."}, "alpaca_chat")[0] == "[system]Be brief.</s>[user]add</s>[assistant]2</s>"
    with pytest.raises(UserError, match="'output' is empty"):
        encode({"instruction": "a", "output": " "}, "alpaca_chat")
