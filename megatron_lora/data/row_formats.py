"""One row of a dataset to tokens and targets, for each of the formats that hold text (lengths are in length_rows.py).

    text               {text}                          tokenizer(text) with its special tokens, eos appended if absent
    prompt_completion  {prompt, completion}            tokenizer(prompt) with special tokens + tokenizer(completion) without + eos
    alpaca             {instruction, input, output}    the same, with the Stanford Alpaca template as the prompt
    messages           {messages: [{role, content}]}   the tokenizer's chat template over the whole conversation
    sharegpt           {conversations: [{from, value}]}    the same

A target is a token that is predicted: every token but the first of a text, completion and eos, or assistant turns (chat_turns.py).
With `train_on_inputs` every token but the first is a target in all formats. Nothing is cut here.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.chat_turns import closing_tokens, encode_chat
from megatron_lora.errors import UserError

CHAT_TYPES = ("messages", "sharegpt")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "tool": "tool",
    }
)
# Fields that would change what is trained if they were honoured.
REFUSED_IN_ROW = ("tools", "functions", "system")
REFUSED_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train")

# The templates of Stanford Alpaca (Taori et al., 2023), with which the data set's models are prompted.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class RowEncoder:
    """Turns rows into (ids, targets) with one tokenizer; a row that cannot be trained on is a UserError that names its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UserError("base_model: its tokenizer has no eos_token, so no completion could end; name one in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._closing = closing_tokens(tokenizer)

    def encode(self, row: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a whole row: tokens [L] int32 and targets [L] bool, of which at least one is set."""
        encoders = {
            "text": self._text,
            "prompt_completion": self._prompt_completion,
            "alpaca": self._alpaca,
            "messages": self._messages,
            "sharegpt": self._sharegpt,
        }
        ids, targets = encoders[format](row, where)
        targets = np.ones(len(ids), dtype=bool) if train_on_inputs else np.asarray(targets, dtype=bool)
        targets[:1] = False
        if not targets.any():
            turns = ": no assistant turn has content" if format in CHAT_TYPES else ""
            raise UserError(f"{where}: has nothing to train on{turns}; remove the row or complete it")
        return np.asarray(ids, dtype=np.int32), targets

    def _text(self, row: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        ids = self._tokenizer(_filled(row, "text", where))["input_ids"]
        if ids[-1:] != [self._tokenizer.eos_token_id]:
            ids = [*ids, self._tokenizer.eos_token_id]
        return ids, [True] * len(ids)

    def _prompt_completion(self, row: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        return self._pair(_string(row, "prompt", where), _filled(row, "completion", where))

    def _alpaca(self, row: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        instruction, output = _filled(row, "instruction", where), _filled(row, "output", where)
        context = "" if row.get("input") is None else _string(row, "input", where)
        template = ALPACA_WITH_INPUT if context else ALPACA
        return self._pair(template.format(instruction=instruction, input=context), output)

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        given = self._tokenizer(prompt)["input_ids"]
        answer = [*self._tokenizer(completion, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return given + answer, [False] * len(given) + [True] * len(answer)

    def _messages(self, row: Mapping[str, object], where: str) -> tuple[list[int], np.ndarray]:
        turns = _turns(row, "messages", where)
        return self._chat([(_role(turn, "role", where), turn, "content") for turn in turns], where)

    def _sharegpt(self, row: Mapping[str, object], where: str) -> tuple[list[int], np.ndarray]:
        turns = _turns(row, "conversations", where)
        return self._chat([(_role(turn, "from", where), turn, "value") for turn in turns], where)

    def _chat(self, turns: list[tuple[str, Mapping[str, object], str]], where: str) -> tuple[list[int], np.ndarray]:
        messages = [{"role": role, "content": _string(turn, key, where)} for role, turn, key in turns]
        ids, targets = encode_chat(self._tokenizer, messages, self._closing, where)
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            targets = np.zeros_like(targets)
        return ids, targets


def _string(row: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text."""
    value = row.get(key)
    if value is None:
        raise UserError(f"{where}: has no {key!r} (it has {', '.join(map(repr, row)) or 'nothing'}); add it, or change the dataset's type")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {json.dumps(value, default=str)[:40]}; write it as text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half of a character (a lone surrogate escape); remove it") from None
    return value


def _filled(row: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text with something in it."""
    value = _string(row, key, where)
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; remove the row or complete it")
    return value


def _turns(row: Mapping[str, object], key: str, where: str) -> list[Mapping[str, object]]:
    """Get a conversation's turns, none of which asks for something that is not done."""
    turns = row.get(key)
    if turns is None:
        raise UserError(f"{where}: has no {key!r} (it has {', '.join(map(repr, row)) or 'nothing'}); add it, or change the dataset's type")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: {key!r} is {json.dumps(turns, default=str)[:40]}; write a list of turns")
    if not turns:
        raise UserError(f"{where}: {key!r} is empty; remove the row or complete it")
    _refuse(row, REFUSED_IN_ROW, where)
    for turn in turns:
        _refuse(turn, REFUSED_IN_MESSAGE, where)
    return turns


def _refuse(fields: Mapping[str, object], names: tuple[str, ...], where: str) -> None:
    """Refuse fields that would be ignored although they mean something."""
    for name in names:
        if fields.get(name) not in (None, "", [], {}):
            raise UserError(f"{where}: {name!r} is not supported; remove it, or write what it says into the turns' text")


def _role(turn: Mapping[str, object], key: str, where: str) -> str:
    """Get who speaks, in the words of chat templates."""
    roles = SHAREGPT_ROLES if key == "from" else dict(zip(ROLES, ROLES, strict=True))
    said = _string(turn, key, where)
    if said not in roles:
        raise UserError(f"{where}: {key!r} is {said!r}; use one of {', '.join(roles)}")
    return roles[said]
