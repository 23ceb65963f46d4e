"""Conversations in templates of many families: ids as transformers makes them, targets as the same template's generation marks say."""

import re
from random import Random

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from byte_tokenizer import make_tokenizer
from chat_families import FAMILIES, unmarked

from megatron_lora.data import chat_turns
from megatron_lora.data.chat_template import TEMPLATE_DATE
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.errors import UserError

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather <of> a café", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


def says(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def calls(**arguments):
    return says("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}])


PLAIN = {
    "one turn": [user("hi"), says("ok!")],
    "many turns, the same question twice": [
        user("hi"),
        says("ok!"),
        user("more"),
        says("yes"),
        user("more"),
        says("yes"),
        user("x"),
        says("z"),
    ],
    "unicode": [user("né 🙂 ß"), says("日本語 e\u0301 🙂\n\nnaïve"), user("\u202eabc\u00a0"), says("\U0001f468\u200d\U0001f469 ok")],
    "white space": [user("  hi \n"), says("\n\n x \n"), user("\ttab\n\nline"), says("  two  words  ")],
    "contents that look like the template": [user("assistant"), says("user\n"), user("### End"), says("assistant: turn0x1x [INST]")],
    "code": [user("{% raw %}{{ x }}"), says("```py\nx = {'a': 1}\n```"), user("</s"), says("{{ messages }}")],
    "empty among others": [user("a"), says(""), user("b"), says("yes")],
    "one letter each": [user("a"), says("a"), user("a"), says("a"), user("a"), says("a")],
}
WITH_SYSTEM = {
    "system": [{"role": "system", "content": "Be brief."}, user("hi"), says("ok")],
    "system, many turns": [{"role": "system", "content": " é\n"}, user("hi"), says("ok"), user("again"), says("no")],
}
WITH_THOUGHTS = {
    "thought in the last answer": [user("a"), says("<think>\nhm\n</think>\n\nyes")],
    "thoughts in all": [user("a"), says("<think>\nhm\n</think>\n\nno"), user("b"), says("<think>\nso é\n</think>\n\nyes")],
    "thoughts in a field": [user("a"), says("no", reasoning_content="hm"), user("a"), says("yes", reasoning_content="so\nthen")],
    "a thought in the first alone": [user("a"), says("<think>\nhm\n</think>\n\nno"), user("b"), says("yes")],
}
WITH_TOOLS = {
    "call and result": [
        user("Paris?"),
        calls(city="Paris"),
        {"role": "tool", "content": '{"t": "20°"}'},
        says("warm"),
        user("a"),
        says("b"),
    ],
    "two calls in a row": [
        *(user("Paris and Rome?"), calls(city="Paris", n=1), {"role": "tool", "content": "20"}),
        *(calls(city="Rome", deep={"x": [1, None]}), {"role": "tool", "content": "25"}, says("Rome is warmer")),
    ],
    "a call at the end": [user("hi"), says("ok"), user("Paris?"), calls(city="Paris")],
}
CASES = [
    (name, case, messages, tools)
    for name, family in FAMILIES.items()
    for needs, cases, tools in (
        ("", PLAIN, None),
        ("system", WITH_SYSTEM, None),
        ("thoughts", WITH_THOUGHTS, None),
        ("tools", WITH_TOOLS, [TOOL]),
        ("tools", {f"tools unused, {case}": PLAIN[case] for case in ("one turn", "unicode")}, [TOOL]),
    )
    if not needs or needs in family.holds
    for case, messages in cases.items()
]


def tokenizer_of(family, template):
    return make_tokenizer(template, added=family.tokens, bos=family.bos, eos=family.eos)


def random_conversation(random, family):
    """Return turns made of scraps that look like parts of templates, with what the family's conversations may hold."""
    scraps = [
        "a",
        "b",
        " ",
        "\n",
        "é",
        "🙂",
        "yes",
        "turn0",
        "x1x",
        "assistant",
        "### End",
        "<|",
        "]",
        "</",
        ": ",
        "'",
        '"',
        "{",
        family.eos,
    ]
    scraps += [token for token in family.tokens if "think" not in token]

    def text(length):
        return "".join(random.choices(scraps, k=length))

    turns = [{"role": "system", "content": text(3)}] if "system" in family.holds and random.random() < 0.3 else []
    for _ in range(random.randint(1, 4)):
        turns.append(user(text(random.randint(0, 4))))
        if "tools" in family.holds and random.random() < 0.3:
            turns += [calls(x=random.choice(["1", 2, {"a": [1]}])), {"role": "tool", "content": text(2)}]
        answer = text(random.randint(0, 5))
        thinks = "thoughts" in family.holds and random.random() < 0.4
        turns.append(says(f"<think>\n{text(1).strip() or 'so'}\n</think>\n\n{answer.strip() or 'z'}" if thinks else answer))
    return [*turns, user("last"), says("answer")]


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations_of_scraps_of_templates(monkeypatch, name):
    family, random = FAMILIES[name], Random(name)
    for _ in range(25):
        test_ids_and_targets_are_those_of_transformers(
            monkeypatch, name, "random", random_conversation(random, family), [TOOL] if "tools" in family.holds else None, "at once"
        )


@pytest.mark.parametrize("finds", ["at once", "one by one", "by marks"])
@pytest.mark.parametrize(("name", "case", "messages", "tools"), CASES, ids=[f"{name}: {case}" for name, case, *_ in CASES])
def test_ids_and_targets_are_those_of_transformers(monkeypatch, name, case, messages, tools, finds):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, family.template if finds == "by marks" else unmarked(family.template))
    monkeypatch.setattr(chat_template_utils, "datetime", type("Date", (), {"now": staticmethod(lambda: TEMPLATE_DATE)}))
    if finds == "one by one":
        monkeypatch.setattr(chat_turns, "_between", lambda *_: [])
    oracle = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=family.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert oracle["input_ids"] == tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    encoded = RecordEncoder(tokenizer).encode({"messages": messages, "tools": tools}, "messages", False, "rows.jsonl:7")
    assert encoded.tokens.tolist() == oracle["input_ids"]
    assert shown(tokenizer, encoded.tokens, encoded.targets) == shown(tokenizer, oracle["input_ids"], oracle["assistant_masks"])


def shown(tokenizer, ids, targets):
    """Show a text's targets between « and »."""
    pieces = [f"«{token}»" if target else token for token, target in zip(tokenizer.convert_ids_to_tokens(list(ids)), targets, strict=True)]
    return re.sub("»«", "", "".join(pieces))


def test_an_order_of_roles_that_the_template_refuses():
    family = FAMILIES["strict order, system and tools on the last question"]
    with pytest.raises(UserError, match=r"^rows.jsonl:7: .* refuses this conversation of user, user: conversation roles must alternate"):
        RecordEncoder(tokenizer_of(family, unmarked(family.template))).encode(
            {"messages": [user("a"), user("b")]}, "messages", False, "rows.jsonl:7"
        )
