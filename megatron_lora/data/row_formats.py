"""One dataset record to tokens and targets, in each of the formats that hold text (length_records.py has the other).

    text               {text}                          tokenizer(text) with its special tokens, eos appended if absent
    prompt_completion  {prompt, completion}            tokenizer(prompt) with special tokens + tokenizer(completion) without + eos
    alpaca             {instruction, input, output}    the same, with the Stanford Alpaca template as the prompt
    messages           {messages: [{role, content}]}   the tokenizer's chat template over the whole conversation
    sharegpt           {conversations: [{from, value}]}    the same

A target is a token that the loss predicts: every token but the first in text, the completion and
its eos in the next two formats, and the assistant turns in conversations (chat_turns.py). With
`train_on_inputs` every token but the first is a target in all formats. Nothing is cut here.
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
# Fields that ask for a different training, and that this trainer does not support.
REFUSED_IN_RECORD = ("tools", "functions", "system")
REFUSED_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train")

# The prompt templates of Stanford Alpaca (Taori et al., 2023).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class RecordEncoder:
    """Turns records into (ids, targets) with one tokenizer; UserError says where a record stands that cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UserError("base_model: its tokenizer has no eos_token, so no completion could end; name one in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._closing = closing_tokens(tokenizer)

    def encode(self, record: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a complete record: tokens [L] int32 and targets [L] bool, of which at least one is set."""
        encoders = {
            "text": self._text,
            "prompt_completion": self._prompt_completion,
            "alpaca": self._alpaca,
            "messages": self._messages,
            "sharegpt": self._sharegpt,
        }
        ids, targets = encoders[format](record, where)
        targets = np.ones(len(ids), dtype=bool) if train_on_inputs else np.asarray(targets, dtype=bool)
        targets[:1] = False
        if not targets.any():
            turns = ": no assistant turn has content" if format in CHAT_TYPES else ""
            raise UserError(f"{where}: has nothing to train on{turns}; remove the record or complete it")
        return np.asarray(ids, dtype=np.int32), targets

    def _text(self, record: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        ids = self._tokenizer(_filled(record, "text", where))["input_ids"]
        if ids[-1:] != [self._tokenizer.eos_token_id]:
            ids = [*ids, self._tokenizer.eos_token_id]
        return ids, [True] * len(ids)

    def _prompt_completion(self, record: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        return self._pair(_string(record, "prompt", where), _filled(record, "completion", where))

    def _alpaca(self, record: Mapping[str, object], where: str) -> tuple[list[int], list[bool]]:
        instruction, output = _filled(record, "instruction", where), _filled(record, "output", where)
        context = "" if record.get("input") is None else _string(record, "input", where)
        template = ALPACA_WITH_INPUT if context else ALPACA
        return self._pair(template.format(instruction=instruction, input=context), output)

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        completion_ids = [*self._tokenizer(completion, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)

    def _messages(self, record: Mapping[str, object], where: str) -> tuple[list[int], np.ndarray]:
        turns = _turns(record, "messages", where)
        return self._chat([(_role(turn, "role", where), turn, "content") for turn in turns], where)

    def _sharegpt(self, record: Mapping[str, object], where: str) -> tuple[list[int], np.ndarray]:
        turns = _turns(record, "conversations", where)
        return self._chat([(_role(turn, "from", where), turn, "value") for turn in turns], where)

    def _chat(self, turns: list[tuple[str, Mapping[str, object], str]], where: str) -> tuple[list[int], np.ndarray]:
        messages = [{"role": role, "content": _string(turn, key, where)} for role, turn, key in turns]
        ids, targets = encode_chat(self._tokenizer, messages, self._closing, where)
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            targets = np.zeros_like(targets)
        return ids, targets


def _string(record: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text."""
    value = record.get(key)
    if value is None:
        raise _missing(record, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {json.dumps(value, default=str)[:40]}; write it as text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half of a character (a lone surrogate escape); remove it") from None
    return value


def _missing(record: Mapping[str, object], key: str, where: str) -> UserError:
    """Return the error for a field that a record does not have."""
    fields = ", ".join(map(repr, record)) or "nothing"
    return UserError(f"{where}: has no {key!r} (it has {fields}); add it, or change the dataset's type")


def _filled(record: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text with something in it."""
    value = _string(record, key, where)
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    return value


def _turns(record: Mapping[str, object], key: str, where: str) -> list[Mapping[str, object]]:
    """Get a conversation's turns; UserError for a field that asks for something unsupported."""
    turns = record.get(key)
    if turns is None:
        raise _missing(record, key, where)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: {key!r} is {json.dumps(turns, default=str)[:40]}; write a list of turns")
    if not turns:
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    _refuse(record, REFUSED_IN_RECORD, where)
    for turn in turns:
        _refuse(turn, REFUSED_IN_MESSAGE, where)
    return turns


def _refuse(fields: Mapping[str, object], names: tuple[str, ...], where: str) -> None:
    """Raise UserError for a field that is set and would be ignored."""
    for name in names:
        if fields.get(name) not in (None, "", [], {}):
            raise UserError(f"{where}: {name!r} is not supported; remove it, or write what it says into the turns' text")


def _role(turn: Mapping[str, object], key: str, where: str) -> str:
    """Get who speaks, as the role that chat templates know."""
    roles: Mapping[str, str] = SHAREGPT_ROLES if key == "from" else dict(zip(ROLES, ROLES, strict=True))
    speaker = _string(turn, key, where)
    if speaker not in roles:
        raise UserError(f"{where}: {key!r} is {speaker!r}; use one of {', '.join(roles)}")
    return roles[speaker]
