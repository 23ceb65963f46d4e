"""Conversations: which fields and marks of a record count, what the chat template leaves out, where turns end, and a job's own settings."""

import json

import numpy as np
import pytest
from byte_tokenizer import make_tokenizer
from chat_families import FAMILIES, unmarked

from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.chat_template import TEMPLATE_DATE, ChatSettings, chat_settings
from megatron_lora.data.left_out import EMPTY_ANSWER, NO_THOUGHT
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.serving import serving_advice
from megatron_lora.errors import UserError

BARE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
BARE_MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<end>' }}{% endgeneration %}{% else %}{{ m.content + '<end>' }}{% endif %}{% endfor %}"
)
WITH_ALL = (
    "{% for t in tools or [] %}{{ '<tool>' + t.function.name }}{% endfor %}{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.name %}{{ '(' + m.name + ')' }}{% endif %}{% if m.reasoning_content %}{{ '{' + m.reasoning_content + '}' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + c.function.arguments | tojson + ']' }}{% endfor %}"
    "{{ '<end>' }}{% endfor %}{% if style %}{{ style }}{% endif %}"
)


def tokenizer_of(template, **options):
    return make_tokenizer(template, added=("<end>",), eos="<end>", **options)


def encode(record, template=BARE, format="messages", inputs=False, **settings):
    """Return a record's text with its targets between « and », and its notes."""
    tokenizer = tokenizer_of(template)
    encoded = RecordEncoder(tokenizer, ChatSettings(**settings)).encode(record, format, inputs, "rows.jsonl:7")
    ids, targets = encoded.tokens.tolist(), encoded.targets.tolist()
    changes = np.flatnonzero(np.diff([False, *targets, False])).tolist()
    text, position = "", 0
    for start, end in zip(changes[::2], changes[1::2], strict=True):
        text += tokenizer.decode(ids[position:start]) + "«" + tokenizer.decode(ids[start:end]) + "»"
        position = end
    return text + tokenizer.decode(ids[position:]), encoded.notes


def chat(*contents, last=None):
    """Return turns of a user and an assistant; `last` are more fields of the last one."""
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    turns[-1] |= last or {}
    return turns


def messages(*contents, last=None, **fields):
    return {"messages": chat(*contents, last=last), **fields}


# ---- marks for "do not train this" ----

FOUR = ("q", "bad", "r", "good")
MARKED = "<user>q<end><assistant>bad<end><user>r<end><assistant>«good<end>»"
BOTH = "<user>q<end><assistant>«bad<end>»<user>r<end><assistant>«good<end>»"


@pytest.mark.parametrize(
    "mark",
    [
        *({"loss": False}, {"train": False}, {"weight": 0}, {"weight": 0.0}, {"training": False}, {"trainable": False}, {"masked": True}),
        *({"loss_mask": 0}, {"step_loss_mask": 0}, {"loss_weight": 0.0}, {"loss_scale": 0}, {"train_on_turn": False}),
        {"weight": 0, "train": False},
    ],
)
def test_a_turn_that_is_marked_is_not_trained(mark):
    record = messages(*FOUR)
    record["messages"][1] |= mark
    assert encode(record) == (MARKED, ())
    assert encode(record, BARE_MARKED)[0] == MARKED
    assert encode(record, inputs=True)[0] == "<«user>q<end><assistant>»bad<end>«<user>r<end><assistant>good<end>»"


@pytest.mark.parametrize("mark", [{"loss": True}, {"train": True}, {"weight": 1}, {"weight": 1.0}, {"masked": False}, {"weight": None}, {}])
def test_a_mark_that_says_nothing_new_passes(mark):
    record = messages(*FOUR)
    record["messages"][1] |= mark
    assert encode(record) == (BOTH, ())


@pytest.mark.parametrize(
    ("mark", "named"),
    [
        ({"weight": 0.5}, "'weight' of a turn is 0.5; use 0 or 1"),
        ({"loss_scale": 2.0}, "'loss_scale' of a turn is 2.0; use 0 or 1"),
        ({"train": "no"}, "'train' of a turn is \"no\"; use 0 or 1"),
        ({"weight": 1, "loss": False}, "'weight' and 'loss' of a turn contradict each other"),
        ({"train_detail": [{"begin_offset": 0}]}, "'train_detail' of a turn is not supported; use 'weight'"),
        ({"mask_ranges": [[0, 2]]}, "'mask_ranges' of a turn is not supported"),
        ({"token_weights": [1, 0]}, "'token_weights' of a turn is not supported"),
    ],
)
def test_marks_that_cannot_be_honoured_are_refused(mark, named):
    with pytest.raises(UserError, match=f"^rows.jsonl:7: {named}"):
        encode(messages("q", "a", last=mark))


def test_a_record_may_hold_the_marks_of_its_turns():
    assert encode(messages(*FOUR, loss_mask=[0, 0, 0, 1]))[0] == MARKED
    assert encode(messages(*FOUR, loss_mask=[False, True, False, True]))[0] == BOTH
    assert encode(messages(*FOUR, weight=1, train=True, loss=1.0)) == (BOTH, ())
    for fields, named in (
        ({"loss_mask": [1]}, "'loss_mask' is not a list with one mark for each of the 4 turns"),
        ({"loss_mask": [0, 0.5, 0, 1]}, "'loss_mask' of a turn is 0.5"),
        ({"weight": 0}, "'weight' is 0; write a number from 1e-06 to 1e"),
        ({"train": False}, "'train' is not used"),
        ({"mask_ranges": [[0, 1]]}, "'mask_ranges' is not used"),
        ({"masked": True}, "'masked' is not used"),
    ):
        with pytest.raises(UserError, match=named):
            encode(messages(*FOUR, **fields))


def test_a_mark_to_train_another_role_is_named():
    record = messages("q", "a")
    record["messages"][0]["train"] = True
    assert encode(record) == ("<user>q<end><assistant>«a<end>»", ("turns of user are marked to be trained and never are",))
    record["messages"][0]["train"] = False
    assert encode(record)[1] == ()
    with pytest.raises(UserError, match="a turn of 'user' is marked untrained; set train_on_inputs: false"):
        encode(record, inputs=True)


def test_nothing_left_to_train_is_refused():
    with pytest.raises(UserError, match="has nothing to train on: no assistant turn that is trained has content"):
        encode(messages("q", "a", last={"weight": 0}))


def test_train_on_last_trains_the_last_answer_of_a_record():
    assert encode(messages(*FOUR), train_on="last")[0] == MARKED
    assert encode(messages(*FOUR, "s"), train_on="last")[0] == MARKED + "<user>s<end>"
    assert encode(messages("q", "a"), train_on="last")[0] == "<user>q<end><assistant>«a<end>»"
    with pytest.raises(UserError, match="has nothing to train on"):
        encode(messages(*FOUR, last={"weight": 0}), train_on="last")


# ---- fields of records and turns ----


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"conversations": chat("q", "a")}, "messages"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "model", "value": "a"}]}, "messages"),
        ({"prompt": chat("q"), "completion": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"prompt": chat("q"), "completion": [{"role": "assistant", "content": "a"}]}, "prompt_completion"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": ["a"]}]}, "messages"),
        (messages("q", "a", id=3, source="x", metadata={"a": 1}, tags=["b"], images=[], tools=None), "messages"),
    ],
)
def test_ways_of_writing_the_same_conversation(record, format):
    assert encode(record, format=format) == ("<user>q<end><assistant>«a<end>»", ())


def test_only_a_completion_is_trained():
    record = {"prompt": chat("q", "a", "r"), "completion": [{"role": "assistant", "content": "b"}]}
    assert encode(record, format="prompt_completion")[0] == "<user>q<end><assistant>a<end><user>r<end><assistant>«b<end>»"
    assert encode(record | {"system": "S"})[0].startswith("<system>S<end><user>q<end><assistant>a<end><user>r<end><assistant>«b")


def test_a_system_prompt_beside_the_turns():
    expected = "<system>S<end><user>q<end><assistant>«a<end>»"
    assert encode(messages("q", "a", system="S"))[0] == expected
    assert encode({"system_prompt": "S", "conversations": chat("q", "a")}, format="sharegpt")[0] == expected
    both = {"system": "S", "messages": [{"role": "system", "content": "S"}, *chat("q", "a")]}
    assert encode(both)[0] == expected
    with pytest.raises(UserError, match="'system' is another system prompt than the record's other one"):
        encode(both | {"system": "T"})


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLED = '<tool>look<user>q<end><assistant>«[look{"at": 1}]<end>»<tool>seen<end><assistant>«a<end>»'


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"at": 1}'}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "look", "arguments": '{"at": 1}'}},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
        {"role": "tool_call", "content": '[{"name": "look", "parameters": {"at": 1}}]'},
        {"role": "assistant", "tool_calls": '[{"name": "look", "arguments": {"at": 1}}]', "content": ""},
    ],
)
def test_calls_and_results_of_tools(call):
    for result in (
        {"role": "tool", "content": "seen"},
        {"from": "observation", "value": "seen"},
        {"role": "tool_response", "content": "seen"},
    ):
        for tools in ({"tools": TOOLS}, {"tools": json.dumps(TOOLS)}, {"functions": [TOOLS[0]["function"]]}):
            record = {"messages": [*chat("q"), call, result, {"role": "assistant", "content": "a"}], **tools}
            assert encode(record, WITH_ALL) == (CALLED, ())


def test_thoughts_names_and_kwargs_go_to_the_template():
    for thoughts in ("reasoning_content", "thinking", "reasoning"):
        assert encode(messages("q", "a", last={thoughts: "hm"}), WITH_ALL) == ("<user>q<end><assistant>«{hm}a<end>»", ())
    named = messages("q", "a")
    named["messages"][0]["name"] = "B"
    assert encode(named, WITH_ALL)[0] == "<user>(B)q<end><assistant>«a<end>»"
    for fields in ({"chat_template_kwargs": {"style": "!", "none": None}}, {"chat_template_kwargs": '{"style": "!"}'}):
        assert encode(messages("q", "a", **fields), WITH_ALL)[0] == "<user>q<end><assistant>«a<end>»!"
    assert encode(messages("q", "a", enable_thinking=False))[1] == ("'enable_thinking' is not used by the chat template",)
    assert encode(messages("q", "a"), WITH_ALL, kwargs='{"style": "?"}')[0].endswith("»?")


def test_every_other_field_is_named():
    record = messages("q", "a", last={"mood": "glad", "empty": "", "id": 4}, rejected="b", none=None, score=0)
    assert encode(record)[1] == ("field 'mood' of a turn is not used", "field 'rejected' is not used", "field 'score' is not used")
    assert encode(messages("q", "a", conversations=chat("r", "b")))[1] == ("field 'conversations' is not used",)
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]
    assert encode(messages("q", "a", last={"content": parts}))[1] == ("field 'cache_control' of a part is not used",)
    call = {"name": "f", "arguments": {"y": 2}, "parameters": {"x": 1}, "strict": True}
    assert encode(messages("q", "", last={"tool_calls": [{"function": call, "mood": 1}]}), WITH_ALL)[1] == (
        "field 'mood' of a call is not used",
        "field 'parameters' of a call is not used",
        "field 'strict' of a call is not used",
    )


def test_names_that_the_template_does_not_show_are_counted():
    named = messages("q", "a")
    named["messages"][0]["name"] = "B"
    assert encode(named)[1] == ("names of turns left out",)
    assert encode(named, WITH_ALL)[1] == ()


def test_an_empty_answer_is_counted():
    text, notes = encode(messages("q", "", "r", "b"))
    assert (text, notes) == ("<user>q<end><assistant>«<end>»<user>r<end><assistant>«b<end>»", (EMPTY_ANSWER,))
    empty = messages("q", "", "r", "b")
    empty["messages"][1]["weight"] = 0
    assert encode(empty)[1] == ()


def test_a_mark_to_train_a_prompt_is_named():
    marked = {"prompt": [*chat("q"), {"role": "assistant", "content": "a", "weight": 1}], "completion": chat("q", "b")}
    assert encode(marked, format="prompt_completion")[1] == ("turns of a prompt are marked to be trained and never are",)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (messages("q", "a", images=["a.png"]), "'images' is not used by this type of dataset"),
        (messages("q", "a", documents=[{"title": "a"}]), "'documents' is not used by this type of dataset"),
        (messages("q", "a", last={"audio": {"id": 1}}), "'audio' of a turn is not supported"),
        (messages("q", "a", last={"refusal": "no"}), "'refusal' of a turn is not supported"),
        (messages("q", "a", last={"content": [{"type": "image_url"}]}), "'content' has a part of type 'image_url'; write text"),
        (messages("q", "a", last={"content": [{"type": "thinking", "thinking": "x"}]}), "a part of type 'thinking'"),
        (messages("q", "a", last={"content": [{"type": "text"}]}), "has no 'text'"),
        (messages("q", "a", last={"tool_calls": "look"}), "'tool_calls' is 'look', which is not JSON"),
        (messages("q", "a", last={"tool_calls": [{"function": {}}]}), r"a call is \{\"function\": \{\}\}; write"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}, "of a turn of 'user'; only the assistant's"),
        (messages("q", "a", tools="look"), "'tools' is 'look', which is not JSON"),
        (messages("q", "a", tools=[1]), r"'tools' is \[1\]; write a list of objects"),
        (messages("q", "a", chat_template_kwargs=[1]), "'chat_template_kwargs' is .*; write an object"),
        (
            messages("q", "a", last={"tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}),
            "the conversation holds half of a character",
        ),
        (messages("q", "a\ud800"), "'content' holds half of a character"),
        ({"prompt": chat("q")}, "has no 'completion'"),
        ({"messages": [{"role": "function_call", "content": "look"}]}, "the turn of a call is 'look', which is not JSON"),
        (messages("q", 3), "'content' is 3; write it as text"),
        (messages("q", None), "'content' is null; remove the record or complete it"),
        (messages("q", "a", history=[["x", "y"]]), "'history' is not used by this type of dataset"),
        (messages("q", "a", assistant_masks=[1]), "'assistant_masks' is not used; remove it, or in a conversation give turns"),
        (messages("q", "a", last={"reasoning_content": "a", "thinking": "b"}), "'reasoning_content' and 'thinking' of a turn are two"),
        (messages("q", "<think>b</think>a", last={"reasoning": "b"}), "has a thought in 'reasoning' and one in its text, up to </think>"),
        (messages("q", "a", last={"content": [{"type": "text", "text": "a", "train": False}]}), "'train' of a part is not supported"),
        (messages("q", "a", chat_template_kwargs={"continue_final_message": True}), "'continue_final_message' in 'chat_template_kwargs'"),
        (messages("q", "a", chat_template_kwargs={"add_generation_prompt": False}), "is given to every template; remove it"),
    ],
)
def test_fields_that_are_refused_by_name(record, named):
    with pytest.raises(UserError, match=f"^rows.jsonl:7: .*{named}") as caught:
        encode(record, WITH_ALL)
    assert "\n" not in str(caught.value)


# ---- what the template leaves out ----

LAST_QUESTION = FAMILIES["strict order, system and tools on the last question"]
THINKS = FAMILIES["thoughts stripped before the last question"]
NEVER_THINKS = FAMILIES["thoughts never shown, prompt opens one"]


def notes_of(family, record):
    tokenizer = make_tokenizer(unmarked(family.template), added=family.tokens, bos=family.bos, eos=family.eos)
    return list(RecordEncoder(tokenizer).encode(record, "messages", False, "").notes)


def test_a_system_prompt_that_is_left_out_is_counted():
    dropped = {"messages": [{"role": "system", "content": "S"}, *chat("q", "a")]}
    assert notes_of(LAST_QUESTION, dropped) == ["system prompt left out"]
    assert notes_of(LAST_QUESTION, {"messages": [{"role": "system", "content": "q"}, *chat("q", "qq")]}) == ["system prompt left out"]
    assert notes_of(FAMILIES["system folded into the first question"], dropped) == []
    no_system = "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    assert encode(dropped, no_system)[1] == ("system prompt left out",)
    assert encode({"messages": [{"role": "developer", "content": "S"}, *chat("q", "a")]}, no_system)[1] == ()


def test_other_messages_tools_and_calls_that_are_left_out_are_counted():
    no_tools = "{% for m in messages if m.role != 'tool' %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    call = {"role": "assistant", "content": "so", "tool_calls": [{"name": "look", "arguments": {}}]}
    record = {"messages": [*chat("q"), call, {"role": "tool", "content": "seen"}, {"role": "assistant", "content": "a"}], "tools": TOOLS}
    assert encode(record, no_tools)[1] == ("turn of tool left out", "calls of tools left out", "tools left out")
    by_content = "{% for m in messages if 'hush' not in m.content %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    assert encode(messages("q", "a", "r", "b"), by_content)[1] == ()
    assert encode(messages("hush", "a", "r", "b"), by_content)[1] == ("turn of user left out",)
    as_json = no_tools.replace("if m.role != 'tool' ", "").replace("+ m.content", "+ m.content | tojson")
    record = {"messages": [{"role": "user", "content": 'say "é"\n'}, {"role": "assistant", "content": "é"}]}
    assert encode(record, as_json)[1] == ()  # shown, in other characters


def test_thoughts_that_are_left_out_are_counted():
    thought = "<think>\nhm\n</think>\n\nyes"
    assert notes_of(THINKS, messages("q", thought, "r", thought)) == ["thoughts of earlier turns left out"]
    assert notes_of(THINKS, messages("q", thought)) == []
    assert notes_of(NEVER_THINKS, messages("q", thought)) == ["thought of the last turn left out"]
    assert notes_of(FAMILIES["chatml on a tokenizer without its tokens"], messages("q", "a", last={"reasoning_content": "hm"})) == [
        "thought of the last turn left out"
    ]


def test_answers_without_a_thought_say_how_to_serve_them(tmp_path):
    assert notes_of(THINKS, messages("q", "a")) == [NO_THOUGHT]
    assert notes_of(NEVER_THINKS, messages("q", "a")) == [NO_THOUGHT]
    assert notes_of(FAMILIES["an empty thought in every turn"], messages("q", "a")) == [NO_THOUGHT]
    assert notes_of(FAMILIES["eos after a line"], messages("q", "a")) == []

    (tmp_path / "a.jsonl").write_text(
        json.dumps(messages("q", "a")) + "\n" + json.dumps(messages("q", "<think>\nhm\n</think>\n\na")) + "\n"
    )
    job = JobConfig(name="j", datasets=(DatasetConfig(path=str(tmp_path / "a.jsonl"), type="messages"),))
    tokenizer = make_tokenizer(unmarked(THINKS.template), added=THINKS.tokens, eos=THINKS.eos)
    (tmp_path / "chat_template.jinja").write_text(unmarked(THINKS.template))
    (data,) = load_jobs_data([job], tokenizer, None)
    assert f"{NO_THOUGHT} (1 of 2 records)" in data.describe()
    assert "The answers of 1 of its 2 records have no thought, so serve it with enable_thinking=False" in serving_advice(
        job, data, tmp_path
    )
    plain = JobConfig(name="j", datasets=job.datasets, chat_template="chatml", chat_template_kwargs={"enable_thinking": False})
    assert serving_advice(plain, data, tmp_path) == (
        "It was trained with the chat template chatml, so serve it with that one. "
        "Its chat template was given enable_thinking=False, so give it the same."
    )


# ---- ends of turns ----

NO_END = "no end of a turn is trained, because the chat template writes none"


def test_a_template_that_writes_no_end_is_named():
    assert encode(messages("q", "a"), "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")[1] == (NO_END,)
    assert encode(messages("q", "a"), "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}")[1] == (NO_END,)
    between = "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ '<end>' }}{% endif %}{% endfor %}"
    assert encode(messages("q", "a"), between)[1] == (NO_END,)
    assert encode(messages("q", "a", "r", "b"), between) == ("q<end>«a<end>»r<end>«b»", ())
    marks = "{% for m in messages %}{{ '[' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<end>' }}{% endfor %}"
    assert encode(messages("q", "a"), marks)[1] == (
        "no end of a turn is trained, because the chat template's generation marks leave it out",
    )


@pytest.mark.parametrize(
    ("end", "trained"),
    [
        ("<|im_end|>\n", "a<|im_end|>"),
        ("\n### End\n\n", "a\n### End"),
        ("</s><end>\n", "a</s><end>"),
        (" [/A]", "a [/A]"),
        ("\n", "a"),
    ],
)
def test_ends_of_several_tokens(end, trained):
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + END }}{% endfor %}".replace("END", repr(end))
    text, _ = encode(messages("q", "a", "r", "a"), template)
    assert text == f"[user]q{end}[assistant]«{trained}»{end[len(trained) - 1 :]}[user]r{end}[assistant]«{trained}»{end[len(trained) - 1 :]}"


def test_calls_may_have_an_end_of_their_own():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ '[/stop]' if m.tool_calls else '<e>' }}{% endfor %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}
    record = {"messages": [*chat("q"), call, {"role": "tool", "content": "seen"}, {"role": "assistant", "content": "a"}]}
    tokenizer = make_tokenizer(template, added=("<tool>", "[/stop]", "<e>", "<assistant>"))
    encoded = RecordEncoder(tokenizer).encode(record, "messages", False, "")
    assert tokenizer.decode(encoded.tokens[encoded.targets]) == "look[/stop]a<e>"


# ---- a job's settings ----


def job_of(path, **keys):
    return JobConfig(name="j", datasets=(DatasetConfig(path=str(path), type="messages"),), **keys)


def test_a_job_may_bring_its_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(messages("q", "a", "r", "b")) + "\n")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content + (style or '') + '<end>' }}{% endfor %}")
    bare = tokenizer_of(None)

    def trained(**keys):
        (data,) = load_jobs_data([job_of(path, **keys)], bare, tmp_path / "cache")
        (sample,) = data.samples
        return bare.decode(sample.tokens), bare.decode(sample.tokens[sample.targets])

    own = str(tmp_path / "own.jinja")
    assert trained(chat_template=own) == ("q<end>a<end>r<end>b<end>", "a<end>b<end>")
    assert trained(chat_template=own, chat_template_kwargs={"style": "!"}) == ("q!<end>a!<end>r!<end>b!<end>", "a!<end>b!<end>")
    assert trained(chat_template=own, train_on="last")[1] == "b<end>"
    assert trained(chat_template="chatml")[1] == "a<|im_end|>b<|im_end|>"
    assert trained(chat_template="plain")[1] == " a<end> b<end>"
    for name, end in (("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")):
        assert trained(chat_template=name)[1] == f"a{end}b{end}"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content + '?<end>' }}{% endfor %}")
    assert trained(chat_template=own)[1] == "a?<end>b?<end>"  # the text of the file decides what the cache holds
    assert len(list((tmp_path / "cache").iterdir())) == 8
    with pytest.raises(UserError, match=r"has no chat template; .* set jobs.j.chat_template to a file or one of chatml, llama3"):
        trained()
    with pytest.raises(UserError, match="jobs.j.chat_template_kwargs: the chat template does not use 'stile'"):
        trained(chat_template=own, chat_template_kwargs={"stile": "!"})
    with pytest.raises(UserError, match="jobs.j.chat_template_kwargs: 'add_generation_prompt' is given to every chat template"):
        trained(chat_template="chatml", chat_template_kwargs={"add_generation_prompt": True})
    (tmp_path / "own.jinja").write_text("\n{% for m in messages %}{{ m.content }")
    with pytest.raises(UserError, match=r"^.*a.jsonl:1: the chat template cannot be read \(unexpected '}' in its line 2\); correct it$"):
        trained(chat_template=own)
    (tmp_path / "own.jinja").write_text(" \n")
    with pytest.raises(UserError, match=r"jobs.j.chat_template: '.*own.jinja' cannot be read \(it is empty\)"):
        trained(chat_template=own)
    with pytest.raises(UserError, match=r"jobs.j.chat_template: 'nowhere' cannot be read \(No such file.*one of chatml"):
        chat_settings(job_of(path, chat_template="nowhere"))


@pytest.mark.parametrize("format", ["%d %b %Y", "%-d/%-m/%y %H:%M", "%A, %B %e", "%F %T", "100"])
def test_the_date_that_a_template_prints(format):
    dated = "{{ strftime_now('FORMAT') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}".replace("FORMAT", format)
    text = TEMPLATE_DATE.strftime(format)
    assert encode(messages("q", "a"), dated)[0] == f"{text}<user>q<end><assistant>«a<end>»"


def test_a_date_that_is_not_known_is_refused():
    with pytest.raises(
        UserError, match=r"refuses this conversation of user, assistant: it asks for the date as %s, which is not supported"
    ):
        encode(messages("q", "a"), "{{ strftime_now('%s') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}")
