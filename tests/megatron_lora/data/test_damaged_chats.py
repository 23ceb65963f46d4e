"""Records of conversations with damage anywhere in them: a right sample or one line of UserError, never anything else."""

import copy
from random import Random

import numpy as np
import pytest
from byte_tokenizer import make_tokenizer
from chat_families import FAMILIES, unmarked

from megatron_lora.data.chat_fields import MARKS, REFUSED_IN_RECORD, REFUSED_IN_TURN, THOUGHTS
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.errors import UserError

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SYSTEM = {"role": "system", "content": "s"}
QUESTION = {"role": "user", "content": "q"}
TURNS = [
    *(SYSTEM, QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na", "weight": 1}, QUESTION),
    *({"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "name": "f", "tool_call_id": "1", "content": "x"}),
    {"role": "assistant", "content": [{"type": "text", "text": "b"}], "reasoning_content": "so"},
]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}, {"from": "observation", "value": "r"}]
RECORDS = [
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"enable_thinking": False}},
    {"conversations": [*SHAREGPT, {"from": "gpt", "value": "a"}], "system": "s", "tools": '[{"name": "f"}]', "loss_mask": [0, 1, 0, 1]},
    {"prompt": [SYSTEM, QUESTION], "completion": [{"role": "assistant", "content": "a", "train": True}]},
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    2.5,
    "",
    "x",
    "{",
    "[]",
    "null",
    '{"name": "f"}',
    "\ud800",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    float("nan"),
    10**30,
]
NAMES = [
    *MARKS,
    *REFUSED_IN_RECORD,
    *REFUSED_IN_TURN,
    *THOUGHTS,
    "masked",
    "system",
    "functions",
    "tools",
    "enable_thinking",
    "function_call",
]
NAMES += ["content", "role", "value", "from", "messages", "completion", "chat_template_kwargs", "name", "mood"]


def places(value, path=()):
    """List the paths of all values in a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def damaged(random: Random):
    record = copy.deepcopy(random.choice(RECORDS))
    for _ in range(random.randint(1, 2)):
        *above, last = random.choice(places(record)[1:])
        value = record
        for key in above:
            value = value[key]
        if random.random() < 0.2:
            del value[last]
        elif isinstance(value, dict) and random.random() < 0.5:
            value[random.choice(NAMES)] = copy.deepcopy(random.choice(VALUES))
        else:
            value[last] = copy.deepcopy(random.choice(VALUES))
    return record


@pytest.mark.parametrize("name", FAMILIES)
def test_damage_is_refused_in_one_line_or_harmless(name):
    family, random = FAMILIES[name], Random(name)
    encoders = [
        RecordEncoder(make_tokenizer(template, added=family.tokens, bos=family.bos, eos=family.eos))
        for template in (family.template, unmarked(family.template))
    ]
    for _ in range(60):
        record = damaged(random)
        try:
            encoded = random.choice(encoders).encode(record, "messages", random.random() < 0.2, "rows.jsonl:7")
        except UserError as error:
            assert str(error).startswith("rows.jsonl:7: ") and "\n" not in str(error)
        else:
            assert encoded.tokens.dtype == np.int32 and encoded.targets.any() and len(encoded.tokens) == len(encoded.targets)
